"""One contributor of the demo: a process that can read its own text and key, and the backbone.

With the backbone come the programs that its owner compiled, in the folder that jax is configured
to read them from. The process prints one JSON object per line: what it may not do, its progress,
what it published. What starts it is in `contribution.py`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from composable.demo.sandbox import python_paths, restrict


def main(arguments: list[str]) -> None:
    """Contribute: train, check and publish the expert of a folder.

    Args:
        arguments: Folder of the expert, folder of the backbone, registry, steps, seed, and another
            contributor's file, which must turn out to be unreadable.
    """
    folder, backbone, registry, others = (Path(arguments[i]) for i in (0, 1, 2, 5))
    steps, seed = int(arguments[3]), int(arguments[4])
    # Temporary files of libraries go to the contributor's own folder, too.
    os.environ["TMPDIR"] = str(folder)
    registry.mkdir(parents=True, exist_ok=True)
    # /dev/shm holds the semaphores of multiprocessing, which the curve writer uses.
    shared = [path for path in (Path("/dev/shm"),) if path.exists()]
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    programs = [Path(compiled)] if compiled else []
    chosen = os.environ["COMPOSABLE_KERNELS"]
    kernels = [] if chosen == "portable" else [Path(chosen)]
    keys = Path(os.environ["COMPOSABLE_KEYS"])
    mechanism = restrict(
        read=[*python_paths(), backbone, keys, *kernels, *programs],
        write=[folder, registry, *shared],
    )
    report(
        "confined",
        mechanism=mechanism,
        refused=_try_to_read(others),
        can_write_programs=any(map(_can_write, programs)),
    )

    from composable.assembly.backbones import load_backbone
    from composable.packaging.registry.locations import open_for_publishing
    from composable.workflows.publish import publish_expert
    from composable.workflows.train import expert_config, train_expert
    from composable.workflows.vet import check_expert

    loaded = load_backbone(str(backbone))
    cfg = expert_config(steps, seed)
    record = train_expert(
        loaded,
        folder,
        [folder / "text"],
        cfg,
        progress=lambda stage, done, total, row: _report_progress(stage, done, total, **row),
    )
    verdict = check_expert(
        loaded, folder, progress=lambda done, total: _report_progress("check", done, total)
    )
    manifest = publish_expert(folder, loaded.interface, open_for_publishing(registry)).manifest
    report(
        "published",
        name=manifest.name,
        version=str(manifest.version),
        seconds=record.seconds,
        measured=verdict.measured,
        bytes=sum(file.size for file in manifest.files),
        peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def report(event: str, **fields: Any) -> None:
    """Report an event to the process that started this one.

    Args:
        event: Kind of the event.
        fields: Its data, as JSON allows.
    """
    print(json.dumps({"event": event, **fields}), flush=True)


def _report_progress(stage: str, done: int, total: int, **figures: float) -> None:
    report("progress", stage=stage, done=done, total=total, **figures)


def _try_to_read(path: Path) -> str | None:
    """Return why a file cannot be read, or None if it can."""
    try:
        path.read_bytes()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    return None


def _can_write(folder: Path) -> bool:
    """Return whether a file can be made in a folder."""
    try:
        (folder / "written").touch()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
