"""Compute the logits of the releases in a folder: `python -m tests.golden.logits FOLDER OUT`."""

import os

# One instruction set on every x86 machine, and the optimisations that users have, so that what is
# computed can be compared to the bit.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
os.environ["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX2"
os.environ["JAX_PLATFORMS"] = "cpu"

import hashlib
import json
import platform
import sys
from pathlib import Path

import jax
import numpy as np

import composable as cx
from composable.assembly.backbones import load_backbone

TEXT = "it was φ→ψ and 1+1=2 that Γ,Δ of"


def compute_logits(folder: Path) -> dict[str, np.ndarray]:
    """Return mix, safe and route of every interface in the folder, with both experts installed."""
    backbone = load_backbone(str(folder / "backbone"))
    source = {"backbone": str(folder / "backbone"), "registry": folder / "registry"}
    loaded = cx.load(source["backbone"], experts=["sums"], registry=source["registry"])
    experts = [cx.expert(name, **source) for name in ("sums", "logic")]
    tokens_BT = loaded.encode(TEXT)[None]
    arrays = {"loaded": loaded(tokens_BT)}
    for path in sorted((folder / "interfaces").glob("*.json")):
        if path.stem == "digests":
            continue
        interface = cx.RouterInterface.from_json(path.read_text())
        model = cx.Model(backbone.backbone, interface, experts)
        arrays[f"{path.stem}/mix"] = model(tokens_BT)
        arrays[f"{path.stem}/safe"] = model.safe(tokens_BT)
        arrays[f"{path.stem}/route"] = model.route(tokens_BT)
    return {name: np.asarray(array) for name, array in arrays.items()}


def read_cpu_model() -> str:
    """Return the model of the processor; libraries choose block sizes, and so rounding, by it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def save_logits(folder: Path, out: Path) -> None:
    """Write a digest of every array to OUT.json, and its last two positions to OUT.npz."""
    arrays = compute_logits(folder)
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    made_by = {"jax": jax.__version__, "machine": platform.machine(), "cpu": read_cpu_model()}
    out.with_suffix(".json").write_text(
        json.dumps({**made_by, "digests": digests}, indent=2) + "\n"
    )
    np.savez_compressed(out.with_suffix(".npz"), **{n: a[:, -2:] for n, a in arrays.items()})


if __name__ == "__main__":
    save_logits(Path(sys.argv[1]), Path(sys.argv[2]))
