"""The contributors of the benchmark: parts of a domain, and experts that are trained on them.

Every training is a folder that is kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, read_documents, write_documents
from composable.corpora.recipe import shipped_folder
from composable.interface import BodyKind
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    BodySpec,
    InterfaceNeed,
    Manifest,
)
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.workflows.train import expert_config, train_expert
from composable.workflows.workspace import HELDOUT_FILE, WORK

PARTS: Final = 4
# Documents are cut into pieces of so many characters; every eighth is test text.
PIECE: Final = 1100
TEST_SHARE: Final = 8
# Pieces of a part, at most, that merges are decided on and decisions are checked on.
_MORE: Final = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run of the benchmark, but for its seed.

    Args:
        domain: Shipped text.
        kind: Kind of the bodies.
        rank: Their rank, for `lora`.
        steps: Steps of each contributor and of the base.
        rows: Sequences per step.
        window: Tokens of a sequence.
        part_bytes: Text of each part, test text included, at most.
        rounds: Rounds of merging.
    """

    domain: str = "python-code"
    kind: BodyKind = "ffn"
    rank: int | None = None
    steps: int = 40
    rows: int = 4
    window: int = 256
    part_bytes: int = 64_000
    rounds: int = 5


SETTINGS: Final = {
    "tiny-bytes": Setting(),
    "smollm2-135m": Setting(
        domain="set-mm", kind="lora", rank=8, steps=20, rows=2, window=128, rounds=0
    ),
    # Seconds instead of minutes: whether it runs at all.
    "smoke": Setting(steps=2, rows=2, window=64, part_bytes=18_000, rounds=1),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The text of one contributor, or of the base.

    Args:
        train: What its training is given.
        test: What nothing is trained or chosen on.
        more: Other pieces of the same documents, which are neither: in turn of `kept` and `unseen`.
    """

    train: tuple[Document, ...]
    test: tuple[Document, ...]
    more: tuple[Document, ...]

    @property
    def kept(self) -> tuple[Document, ...]:
        """What its contributor keeps aside, besides what training holds out, to merge on."""
        return self.more[::2]

    @property
    def unseen(self) -> tuple[Document, ...]:
        """What decisions are checked on: the test text, and more of it."""
        return self.test + self.more[1::2]


def cut_parts(setting: Setting, seed: int) -> tuple[Part, list[Part]]:
    """Return the text of the base and of every contributor: disjoint documents of one domain.

    Documents are in the order of their names, so that a part is of neighbouring ones, such as the
    modules of some packages: contributors of a domain differ in what they have.
    """
    file = shipped_folder(setting.domain) / "text" / "train.jsonl"
    documents = sorted(read_documents([file]), key=lambda document: document.id)
    shift = 7 * seed % len(documents)
    documents = documents[shift:] + documents[:shift]
    # Every fifth document is the base's; the others go to the contributors in contiguous runs.
    groups = [documents[::5]]
    rest = [document for i, document in enumerate(documents) if i % 5]
    n = len(rest) // PARTS
    groups += [rest[i * n : (i + 1) * n] for i in range(PARTS)]
    base, *parts = (_cut(group, setting.part_bytes) for group in groups)
    return base, parts


def _cut(documents: Sequence[Document], n_bytes: int) -> Part:
    pieces = [
        Document(f"{document.id}#{start}", document.text[start : start + PIECE])
        for document in documents
        for start in range(0, len(document.text) - PIECE + 1, PIECE)
    ]
    step = max(1, len(pieces) * PIECE // n_bytes)  # pieces of all documents, if there are too many
    used = pieces[::step][: n_bytes // PIECE]
    test = used[TEST_SHARE // 2 :: TEST_SHARE]
    tested, taken = {piece.id for piece in test}, {piece.id for piece in used}
    more = [piece for piece in pieces if piece.id not in taken]
    return Part(
        train=tuple(piece for piece in used if piece.id not in tested),
        test=tuple(test),
        more=tuple(more[:: max(1, len(more) // _MORE)][:_MORE]),
    )


def train(
    loaded: LoadedBackbone,
    setting: Setting,
    folder: Path,
    documents: Sequence[Document],
    *,
    parent: Path | None = None,
    steps: int | None = None,
    seed: int,
) -> Path:
    """Train an expert as `composable train` does, from a parent if there is one."""
    if (folder / BODY_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    origin = Manifest.read(parent) if parent else None
    manifest = Manifest(
        name=folder.name,
        version=Version("1.0.0"),
        backbone=loaded.interface.name,
        license="Apache-2.0",
        description="A contributor of the benchmark of merging.",
        interface=InterfaceNeed(
            name=loaded.interface.name, requires=Constraint(f"^{loaded.interface.version}")
        ),
        body=BodySpec(kind=setting.kind, rank=setting.rank),
        scout_width=64,
        derives_from=f"{origin.name}@{origin.version}" if origin else None,
    )
    (folder / EXPERT_FILE).write_text(manifest.to_toml())
    text = folder / WORK / "train.jsonl"
    text.parent.mkdir(exist_ok=True)
    write_documents(text, documents)
    cfg = expert_config(
        steps or setting.steps,
        seed,
        rows=setting.rows,
        window=setting.window,
        backbone=loaded.backbone,
        kind=setting.kind,
    )
    train_expert(
        loaded,
        folder,
        [text],
        dataclasses.replace(cfg, checkpoint_every=10 * cfg.steps),
        parent=load_expert(loaded, parent) if parent else None,
        trunk=folder.parent / "trunk",
    )
    return folder


def heldout(folder: Path) -> list[Document]:
    """Return what a contributor's training held out: statistics are made on it."""
    return read_documents([folder / WORK / HELDOUT_FILE])
