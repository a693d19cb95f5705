"""Backbones imported from random checkpoints, and experts for them that know nothing."""

import numpy as np
import pytest


@pytest.fixture
def imported(write_checkpoint, tiny, tmp_path):
    """Return a function that imports a random checkpoint: the release and the checkpoint."""
    from composable.assembly.backbones import load_backbone
    from composable.corpora.documents import Document
    from composable.workflows.import_backbone import ImportPlan, import_backbone

    def run(family="llama", **options):
        folder, _ = write_checkpoint(family, **options)
        documents = [
            Document(f"public/{i}", tiny.text("the of and to in", seed=i, length=200))
            for i in range(12)
        ]
        plan = ImportPlan(name="small", scout_width=8, scout_tokens=1000, scout_steps=0)
        package = tmp_path / "package"
        import_backbone(
            folder, package, plan, documents[:8], documents[8:], cache=tmp_path / "cache"
        )
        return load_backbone(str(package)), folder

    return run


@pytest.fixture
def write_expert(tmp_path):
    """Return a function that writes an expert whose bodies are noisy copies of the backbone's."""
    from composable.files.safetensors import write_tensors
    from composable.interface import body_signature, scout_signature
    from composable.model.tensors import to_tensors
    from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
    from composable.packaging.versions.constraint import Constraint
    from composable.packaging.versions.version import Version

    def write(loaded, name, *, kind="lora", seed=0, dtype="F32", words=""):
        """Write an expert whose scout says, whatever it reads, how often `words` come."""
        interface = loaded.interface
        body = BodySpec(kind=kind, rank=2 if kind == "lora" else None, dtype=dtype)
        manifest = Manifest(
            name=name,
            version=Version("1.0.0"),
            backbone=interface.name,
            license="MIT",
            interface=InterfaceNeed(name=interface.name, requires=Constraint("^1.0")),
            body=body,
            scout_width=8,
        )
        folder = tmp_path / "experts" / name
        folder.mkdir(parents=True)
        (folder / "expert.toml").write_text(manifest.to_toml())
        rng = np.random.default_rng(seed)
        own = to_tensors(loaded.backbone)
        tensors = {}
        for tensor, spec in body_signature(interface, kind, body.rank).items():
            noise = 0.3 * rng.normal(size=spec.shape)
            if kind == "ffn":
                _, layer, matrix = tensor.split(".")
                noise = own[f"layers.{layer}.ffn.{matrix}"] + 0.3 * noise
            tensors[tensor] = noise.astype(np.float32 if dtype == "F32" else "bfloat16")
        write_tensors(folder / "body.safetensors", tensors)
        scout = {
            tensor: 0.01 * rng.normal(size=spec.shape).astype(np.float32)
            for tensor, spec in scout_signature(interface, 8).items()
        }
        tokens_T = loaded.tokenizer.encode(words or "a")
        classes_T = np.asarray(loaded.backbone.class_map[...])[tokens_T]
        counts_C = np.bincount(classes_T, minlength=interface.n_classes) + 0.1
        scout["b_out"] = np.log(counts_C).astype(np.float32)
        write_tensors(folder / "scout.safetensors", scout)
        return folder

    return write
