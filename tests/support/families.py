"""Experts that derive from one: a base of random numbers, and sides that differ by noise."""

import dataclasses

import numpy as np

from composable.files.safetensors import write_tensors
from composable.interface import body_signature, scout_signature
from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version


def write_family(root, loaded, *, noise=0.02, kind="ffn", names=("base", "ours", "theirs")):
    """Write an expert and others that derive from it.

    Args:
        root: Folder of their folders.
        loaded: Their backbone.
        noise: Size of the sides' changes, relative to weights of unit outputs.
        kind: Kind of their bodies.
        names: The base's name and those of the sides.

    Returns:
        Their folders.
    """
    base = Manifest(
        name=names[0],
        version=Version("1.0.0"),
        backbone=loaded.interface.name,
        license="MIT",
        description="Noise.",
        domains=("noise",),
        interface=InterfaceNeed(name=loaded.interface.name, requires=Constraint("^1.0")),
        body=BodySpec(kind=kind, rank=2 if kind == "lora" else None),
        scout_width=8,
    )
    start = make_tensors(loaded, base, 0.3, seed=0)
    folders = []
    for seed, name in enumerate(names):
        side = dataclasses.replace(base, name=name, derives_from="base@1.0.0" if seed else None)
        change = make_tensors(loaded, side, noise * bool(seed), seed=seed)
        own = {
            file: {key: x + change[file][key] for key, x in tensors.items()}
            for file, tensors in start.items()
        }
        folders.append(write_side(root / name, side, own))
    return folders


def make_tensors(loaded, manifest, noise, seed):
    """Return random tensors of body and scout by file."""
    rng = np.random.default_rng(seed)
    specs = {
        "body.safetensors": body_signature(
            loaded.interface, manifest.body.kind, manifest.body.rank
        ),
        "scout.safetensors": scout_signature(loaded.interface, manifest.scout_width),
    }
    return {
        file: {
            name: (noise * rng.normal(size=spec.shape) * spec.shape[0] ** -0.5).astype(np.float32)
            for name, spec in tensors.items()
        }
        for file, tensors in specs.items()
    }


def write_side(folder, manifest, tensors):
    """Write an expert's folder."""
    folder.mkdir(parents=True)
    (folder / "expert.toml").write_text(manifest.to_toml())
    for file, arrays in tensors.items():
        write_tensors(folder / file, arrays)
    return folder
