"""Small worlds for packaging tests: an interface, experts on disk, a registry, a project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from composable.interface import RouterInterface, TensorSpec, body_signature, scout_signature
from composable.packaging import Project, Registry, Store, open_for_publishing, write_tensors

ANY_DIGEST = "sha256:" + "0" * 64
MakeExpert = Callable[..., Path]


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface()


def make_interface(**changes: object) -> RouterInterface:
    fields = {
        "name": "tiny-bytes",
        "version": "1.2.0",
        "backbone": ANY_DIGEST,
        "trunk": ANY_DIGEST,
        "tokenizer": ANY_DIGEST,
        "class_map": ANY_DIGEST,
        "anchor": ANY_DIGEST,
        "vocab_size": 256,
        "n_classes": 16,
        "d_model": 4,
        "d_ff": 8,
        "tap": 1,
        "slots": (1, 2),
        "scout_max_width": 8,
        "lora_max_rank": 4,
        "discount": 0.98,
        "top_k": 2,
        "backbone_prior": 0.5,
        "switch_rate": 0.01,
        "output_bounds": (1.0, 1.0),
    }
    return RouterInterface(**{**fields, **changes})  # type: ignore[arg-type]


def make_tensors(specs: dict[str, TensorSpec], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}


@pytest.fixture
def make_expert(tmp_path: Path, interface: RouterInterface) -> MakeExpert:
    """Return a function that writes an expert's directory and returns it."""

    def make(
        name: str = "german",
        version: str = "1.0.0",
        *,
        requires: dict[str, str] | None = None,
        seed: int = 0,
        needs: str = "^1",
        extra: str = "",
        license_: str | None = None,
        domains: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / "experts" / f"{name}-{version}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        body = body_signature(interface, "lora", 2)
        scout = scout_signature(interface, 8)
        write_tensors(folder / "body.safetensors", make_tensors(body, seed))
        write_tensors(folder / "scout.safetensors", make_tensors(scout, seed + 1))
        (folder / "README.md").write_text(f"# {name}\n")
        ranges = "".join(f'{other} = "{text}"\n' for other, text in (requires or {}).items())
        stated = "" if license_ is None else f'license = "{license_}"\n'
        stated += f"domains = {json.dumps(domains)}\n" if domains else ""
        (folder / "expert.toml").write_text(
            f'[expert]\nname = "{name}"\nversion = "{version}"\nbackbone = "tiny-bytes"\n'
            f"{stated}"
            f'[interface]\nname = "tiny-bytes"\nrequires = "{needs}"\n'
            '[body]\nkind = "lora"\nrank = 2\n[scout]\nwidth = 8\n'
            f"[requires]\n{ranges}{extra}"
        )
        return folder

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_for_publishing(tmp_path / "registry")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "project", "tiny-bytes", {"local": "../registry"})
