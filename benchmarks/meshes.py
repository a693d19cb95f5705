"""Do processes and meshes change what is learned? The same steps on all of them, over loopback.

    python -m benchmarks.meshes [--processes 1 2 4] [--devices 8] [--json FILE]

Every group of processes has 8 simulated CPU devices between its members. On every mesh of them, two
steps of a small backbone and of an FFN and a low-rank expert are trained, and a composed model of
four experts is evaluated in mix mode. Losses are compared with those of one process on one device.

Processes wait for each other before a program that exchanges: gloo, by which CPUs do, gives up on
one that comes 30 seconds after another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.environment import describe_environment

KINDS: Final = ("backbone", "FFN expert", "low-rank expert", "mix mode")
ROWS, WINDOW, STEPS = 8, 16, 2
# Sums over rows, heads and widths are taken in another order; losses are about 8 nats.
TOLERANCE: Final = 2e-4
Mesh = dict[str, int]


def list_meshes(n_devices: int, kind: str) -> list[Mesh]:
    """Return every mesh of that many devices; bodies of one expert are not split over `expert`."""
    axes = ("data", "fsdp", "expert" if kind == "mix mode" else "tensor")
    sizes = [size for size in range(1, n_devices + 1) if n_devices % size == 0]
    return [
        dict(zip(axes, (n_devices // (a * b), a, b), strict=True))
        for a, b in itertools.product(sizes, repeat=2)
        if n_devices % (a * b) == 0
    ]


def measure_group(
    n_processes: int, n_devices: int, kinds: Sequence[str], cache: Path
) -> dict[str, Any]:
    """Return the losses on every mesh, by a group of processes that share the devices.

    Args:
        n_processes: Number of processes.
        n_devices: Devices of all of them.
        kinds: What to run.
        cache: Folder of compiled programs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={n_devices // n_processes}"
    command = [sys.executable, "-m", __spec__.name, "--member", "--kinds", *kinds]
    with tempfile.TemporaryFile() as errors:
        members = []
        for index in range(n_processes):
            group = {
                "COMPOSABLE_COORDINATOR": address,
                "COMPOSABLE_PROCESSES": str(n_processes),
                "COMPOSABLE_PROCESS": str(index),
            }
            env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            env |= group if n_processes > 1 else {}
            env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            members.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors)
            )
        said = [member.communicate()[0] for member in members]
        if any(member.returncode for member in members):
            errors.seek(0)
            raise RuntimeError(errors.read().decode()[-3000:])
    losses: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return losses


def run_member(kinds: Sequence[str]) -> None:
    """Run every kind on every mesh of the devices, and print losses in the first process."""
    import jax

    from composable.parallel import is_first_process, make_mesh, start_processes

    start_processes()
    losses = {
        kind: {
            ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one": (
                _LOSSES[kind](make_mesh(**sizes))
            )
            for sizes in list_meshes(jax.device_count(), kind)
        }
        for kind in kinds
    }
    if is_first_process():
        print(json.dumps(losses), flush=True)


def train_backbone(mesh: Any) -> list[float]:
    """Return the losses of a backbone's first steps."""
    from flax import nnx

    from composable.training.objectives import backbone_objective

    parts: Any = nnx.split(_tiny().backbone, nnx.Param, ...)
    graph, params, rest = parts
    return _train(backbone_objective(graph), params, rest, mesh)


def train_expert(kind: Any, rank: int | None, mesh: Any) -> list[float]:
    """Return the losses of an expert's first steps."""
    from flax import nnx

    from composable.model.body import Expert
    from composable.training.objectives import expert_objective

    backbone = _tiny().backbone
    expert = Expert(backbone, kind=kind, rank=rank, scout_width=8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    return _train(expert_objective(graph), params, backbone, mesh)


def evaluate_mix(mesh: Any) -> list[float]:
    """Return the loss of a composed model on documents."""
    import jax
    import numpy as np

    from composable.model.model import Model
    from composable.parallel import exchange, fetch_tree

    tiny = _tiny()
    model = Model(tiny.backbone, tiny.interface, [tiny.expert(n) for n in "abcd"], mesh=mesh)
    tokens_BT = tiny.tokens(batch=ROWS, length=WINDOW)
    exchange("installed")
    log_prob_BTV = np.asarray(jax.nn.log_softmax(fetch_tree(model(tokens_BT))))
    picked = np.take_along_axis(log_prob_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    return [float(-picked.mean())]


def _train(objective: Any, trained: Any, frozen: Any, mesh: Any) -> list[float]:
    import numpy as np
    import optax

    from composable.parallel import batch_share
    from composable.training.config import TrainConfig
    from composable.training.data import batches
    from composable.training.loop import fit

    part, n_parts = batch_share(mesh)
    cfg = TrainConfig(steps=STEPS, batch_size=ROWS, window=WINDOW, learning_rate=0.1, log_every=1)
    data = batches(
        np.random.default_rng(1).integers(0, 256, 2000),
        window=WINDOW,
        batch_size=ROWS,
        seed=0,
        process=part,
        n_processes=n_parts,
    )
    # Plain descent: what is compared is the gradient, and other optimisers hide its scale.
    optimizer = optax.sgd(cfg.learning_rate)
    fitted = fit(objective, trained, frozen, data, cfg, optimizer=optimizer, mesh=mesh)
    return [row["loss"] for row in fitted.history]


def _tiny() -> Any:
    from tests.support.tiny import Tiny

    return Tiny()


_LOSSES: Final[dict[str, Any]] = {
    "backbone": train_backbone,
    "FFN expert": lambda mesh: train_expert("ffn", None, mesh),
    "low-rank expert": lambda mesh: train_expert("lora", 4, mesh),
    "mix mode": evaluate_mix,
}


def compare(
    groups: Sequence[int], n_devices: int, kinds: Sequence[str], cache: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the largest difference of a loss, in nats, by kind, number of processes and mesh."""
    reference = measure_group(1, 1, kinds, cache)
    differences: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in kinds}
    for n_processes in groups:
        found = measure_group(n_processes, n_devices, kinds, cache)
        for kind in kinds:
            (expected,) = reference[kind].values()
            differences[kind][str(n_processes)] = {
                mesh: max(abs(a - b) for a, b in zip(losses, expected, strict=True))
                for mesh, losses in found[kind].items()
            }
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--devices", type=int, default=8, help="of each group")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of compiled programs, to keep")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        run_member(arguments.kinds)
        return
    head = {
        **describe_environment(),
        "devices": arguments.devices,
        "tolerance": TOLERANCE,
    }
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        cache = arguments.cache or Path(scratch)
        differences = compare(arguments.processes, arguments.devices, arguments.kinds, cache)
    for kind, by_group in differences.items():
        for n_processes, by_mesh in by_group.items():
            worst = max(by_mesh, key=by_mesh.__getitem__)
            print(
                f"{kind}, {n_processes} processes: {len(by_mesh)} meshes, "
                f"at most {by_mesh[worst]:.1e} nats ({worst})"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(head | {"differences": differences}, indent=2) + "\n")
    largest = max(x for by in differences.values() for m in by.values() for x in m.values())
    if largest > TOLERANCE:
        sys.exit(f"losses differ by {largest:.1e} nats")


if __name__ == "__main__":
    main()
