"""Can hostile text do more than be refused? Coverage-guided, one target after the other.

Every reader of the project's formats is fed bytes that atheris mutates from good ones. A reader may
return or raise a `ComposableError`; what it returned must survive being written and read again. Any
other exception, more than 512 MB or more than 5 s for an input of at most 64 KiB is a find, kept as
a file under `--finds`.

    python -m benchmarks.fuzz --seconds 60 [--target NAME ...] [--json FILE] [--finds DIR]

The same readers are tried on Hypothesis's inputs in
`tests/packaging/manifests/test_hostile_input.py`, and on all finds so far, which are in
`tests/packaging/finds/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.readers import TARGET_NAMES, Target, make_targets

MAX_INPUT_BYTES = 1 << 16
MAX_MEGABYTES = 512
MAX_SECONDS = 5


def dictionary(target: Target) -> Iterator[str]:
    """Yield the words of a target's seeds, as libFuzzer reads a dictionary."""
    words = {word for seed in target.seeds for word in re.findall(rb"[\w.-]+|[^\w\s]+", seed)}
    words |= {b"[[", b"]]", b'"""', b"\\u0000", b"1e999", b"nan", b"-0", b"9" * 30, b"\xff"}
    for word in sorted(words):
        yield '"' + "".join(f"\\x{byte:02x}" for byte in word[:60]) + '"'


def fuzz_here(name: str, seconds: int, corpus: Path, finds: Path) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["composable", "tomllib", "json", "semver"]):
        import tomllib  # noqa: F401

        from composable.errors import ComposableError

        target = make_targets(corpus.parent)[name]

    def read(data: bytes) -> None:
        with contextlib.suppress(ComposableError):
            target.read(data)

    words = corpus.parent / "words"
    words.write_text("\n".join(dictionary(target)) + "\n")
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "max_len": MAX_INPUT_BYTES,
        "rss_limit_mb": MAX_MEGABYTES,
        "timeout": MAX_SECONDS,
        "dict": words,
        "artifact_prefix": f"{finds}/{name}-",
        "print_final_stats": 1,
    }
    arguments = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], read)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, finds: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own; return what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        before = set(finds.iterdir())
        command = [sys.executable, "-m", "benchmarks.fuzz", "--here", name]
        command += ["--seconds", str(seconds), "--corpus", str(corpus), "--finds", str(finds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        runs = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        peak = re.search(r"peak_rss_mb: *(\d+)", done.stderr)
        found = sorted(path.name for path in set(finds.iterdir()) - before)
        if done.returncode != 0 and not found:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        return {
            "target": name,
            "seconds": seconds,
            "inputs": int(runs[1]) if runs else 0,
            "edges": int(covered[-1]) if covered else 0,
            "peak_mb": int(peak[1]) if peak else 0,
            "finds": found,
            "error": done.stderr.partition("Uncaught Python exception")[2][:1500].strip(),
        }


def main() -> int:
    """Fuzz the targets asked for; exit with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", action="append", choices=TARGET_NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--finds", type=Path, default=Path("finds"))
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzzing needs atheris: pip install atheris", file=sys.stderr)
        return 2
    if arguments.here:
        fuzz_here(arguments.here, arguments.seconds, arguments.corpus, arguments.finds)
    arguments.finds.mkdir(exist_ok=True)
    rows = []
    print(f"{'target':<20} {'seconds':>7} {'inputs':>10} {'edges':>6} {'peak MB':>8}  finds")
    for name in arguments.target or TARGET_NAMES:
        row = fuzz(name, arguments.seconds, arguments.finds.resolve())
        rows.append(row)
        print(
            f"{name:<20} {row['seconds']:>7} {row['inputs']:>10,} {row['edges']:>6} "
            f"{row['peak_mb']:>8}  {', '.join(row['finds']) or '-'}",
            flush=True,
        )
        if row["error"]:
            print(row["error"])
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if not any(row["finds"] for row in rows):
        with contextlib.suppress(OSError):
            os.rmdir(arguments.finds)  # noqa: PTH106
    return int(any(row["finds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
