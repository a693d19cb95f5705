"""The command that compares two experts or two locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import Backbone, Data, Json, LookupRegistry, Quiet
from composable.cli.output import format_bytes, format_table, note, show
from composable.errors import PackagingError

if TYPE_CHECKING:
    from composable.assembly.backbones import LoadedBackbone
    from composable.corpora.documents import Document
    from composable.model.model import Model
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.queries import LockChange
    from composable.workflows.diff import ExpertDiff, MatrixChange, TextChange

app = typer.Typer(rich_markup_mode=None)

_SHOWN = 3  # documents at each end


@app.callback()
def _commands() -> None:
    """Keep the command's name: an app of one command without this would have none."""


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", show_default=False)],
    after: Annotated[str, typer.Argument(metavar="AFTER", show_default=False)],
    data: Data = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a page with plots.", show_default=False),
    ] = None,
    registry: LookupRegistry = None,
    backbone: Backbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Show what changed between two experts, or between two locks.

    BEFORE and AFTER are two experts, each NAME@V or the folder of one; or two locks, each a lock
    file, the folder of a project, or the number of an installed generation of this project.

    With --data, what the change means on text: bits per byte of every document before and after.
    Between two locks each of FILES is a domain of its own.
    """
    old, new = _find_lock(before), _find_lock(after)
    if (old is None) != (new is None):
        expert, lock = (before, after) if old is None else (after, before)
        raise PackagingError(
            f"{lock} is a lock and {expert} an expert",
            hint="compare two locks, or two experts as NAME@V or folders",
        )
    files = data or []
    if old is not None and new is not None:
        found = _compare_locks(old, new, files, registry, backbone, is_quiet)
    else:
        found = _compare_experts(before, after, files, registry, backbone, is_quiet)
    if html is not None:
        from composable.workflows.diff_page import write_page

        write_page(html, before, after, found.matrices, found.texts)
        note(f"wrote {html}", is_quiet=is_quiet)
    show("\n\n".join(found.parts), found.plain, as_json=as_json, is_quiet=is_quiet)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A comparison, as text, as plain data, and what a page shows."""

    parts: list[str]
    plain: Any
    matrices: Sequence[MatrixChange] = ()
    texts: Mapping[str, TextChange]


def _find_lock(side: str) -> Lock | None:
    """Return the lock that an argument names, or None if it names no lock."""
    from composable.packaging.install.lock import LOCK_FILE, Lock
    from composable.packaging.project.project import Project

    path = Path(side)
    if path.is_file() or (path / LOCK_FILE).is_file():
        return Lock.read(path)
    if side.isdigit() and not path.exists():
        generations = Project.find().environment.generations()
        for generation in generations:
            if generation.number == int(side):
                return generation.lock
        kept = ", ".join(str(generation.number) for generation in generations) or "none"
        raise PackagingError(f"no generation {side}", hint=f"kept generations: {kept}")
    return None


def find_expert(side: str, loaded: LoadedBackbone, registry: str | None) -> Path:
    """Return the folder of an expert: the one named, or that of an installed release.

    Args:
        side: The folder, or NAME@V.
        loaded: The backbone that it is for.
        registry: Registry to install from; by default as for `load`.
    """
    from composable.assembly.load import install_experts
    from composable.packaging.manifests.manifest import EXPERT_FILE
    from composable.packaging.versions.constraint import Requirement

    path = Path(side)
    if (path / EXPERT_FILE).is_file():
        return path
    wanted = Requirement.parse(side)
    return install_experts(loaded, [wanted], registry).expert_path(wanted.name)


def _compare_experts(
    before: str,
    after: str,
    data: Sequence[Path],
    registry: str | None,
    backbone: str | None,
    is_quiet: bool,
) -> _Found:
    from composable.assembly.backbones import load_backbone
    from composable.assembly.load import default_backbone
    from composable.corpora.documents import read_documents
    from composable.files.records import to_plain
    from composable.workflows.diff import diff_experts

    documents = read_documents(data) if data else []
    loaded = load_backbone(backbone or default_backbone())
    old, new = (find_expert(side, loaded, registry) for side in (before, after))
    with bars.show_counts("documents", is_quiet=is_quiet or not documents) as progress:
        found = diff_experts(loaded, old, new, documents, progress)
    texts = {"": found.text} if found.text else {}
    parts = list(_describe_experts(found))
    return _Found(parts=parts, plain=to_plain(found), matrices=found.matrices, texts=texts)


def _describe_experts(found: ExpertDiff) -> Iterator[str]:
    if not found.fields and not any(matrix.difference != 0 for matrix in found.matrices):
        yield "no difference"
        return
    fields = [(c.field, _cell(c.before), _cell(c.after)) for c in found.fields]
    if fields:
        yield format_table(("FIELD", "BEFORE", "AFTER"), fields)
    yield format_table(("TENSORS", "CHANGE", "RANK"), _list_groups(found.matrices))
    yield (
        f"{format_bytes(found.n_bytes)} of tensors, "
        f"{format_bytes(found.patch_bytes)} as a compressed difference"
    )
    if found.text is not None:
        yield from _describe_text(found.text)


def _list_groups(matrices: Sequence[MatrixChange]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for every slot and for the scout: relative change, and the largest rank."""
    groups: dict[str, list[MatrixChange]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.name.rsplit(".", 1)[0], []).append(matrix)
    for name, group in groups.items():
        if any(matrix.difference is None for matrix in group):
            yield name, "other shapes", "–"
            continue
        norm, difference = (
            sum(value**2 for value in values) ** 0.5
            for values in ([m.norm for m in group], [m.difference or 0.0 for m in group])
        )
        ranks = [matrix.rank for matrix in group if matrix.rank is not None]
        relative = f"{difference / norm:.1%}" if norm else f"{difference:.3g}"
        yield name, relative, str(max(ranks, default=0))


def _describe_text(text: TextChange) -> Iterator[str]:
    base, old, new = (
        sum(doc.bits[i] * doc.n_bytes for doc in text.documents)
        / sum(doc.n_bytes for doc in text.documents)
        for i in range(3)
    )
    yield format_table(
        ("BITS PER BYTE", ""),
        [
            ("backbone", f"{base:.3f}"),
            ("before", f"{old:.3f}"),
            ("after", f"{new:.3f}"),
            ("change", _describe_change(text)),
        ],
    )
    ordered = sorted(text.documents, key=lambda doc: doc.change)
    shown = ordered if len(ordered) <= 2 * _SHOWN else [*ordered[:_SHOWN], *ordered[-_SHOWN:]]
    yield format_table(
        ("DOCUMENT", "BEFORE", "AFTER", "CHANGE", "EXPERT'S WEIGHT"),
        [
            (
                *(doc.id, f"{doc.bits[1]:.3f}", f"{doc.bits[2]:.3f}", f"{doc.change:+.3f}"),
                f"{doc.weight[0]:.2f} → {doc.weight[1]:.2f}",
            )
            for doc in shown
        ],
    )


def _describe_change(text: TextChange) -> str:
    low_high = "" if text.interval is None else "[{:+.3f}, {:+.3f}]".format(*text.interval)
    return f"{text.change:+.3f} {low_high}".strip()


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def _compare_locks(
    before: Lock,
    after: Lock,
    data: Sequence[Path],
    registry: str | None,
    backbone: str | None,
    is_quiet: bool,
) -> _Found:
    from composable.files.records import to_plain
    from composable.packaging.project.queries import diff_locks

    changes = list(diff_locks(before, after))
    texts: dict[str, TextChange] = {}
    if data:
        from composable.assembly.backbones import load_backbone
        from composable.assembly.load import default_backbone
        from composable.corpora.documents import read_documents

        domains = {str(path): read_documents([path]) for path in data}
        loaded = load_backbone(backbone or default_backbone())
        models = [_compose(lock, loaded, registry) for lock in (before, after)]
        texts = _diff_domains(models, domains, is_quiet)
    moves = [_describe_move(change) for change in changes]
    parts = [format_table(("EXPERT", "BEFORE", "AFTER"), moves) or "the same experts"]
    if texts:
        rows = [(name, _describe_change(text)) for name, text in texts.items()]
        parts.append(format_table(("TEXT", "CHANGE IN BITS PER BYTE"), rows))
    experts = [
        {
            "name": change.name,
            "before": str(change.before.version) if change.before else None,
            "after": str(change.after.version) if change.after else None,
        }
        for change in changes
    ]
    return _Found(parts=parts, plain={"experts": experts, "text": to_plain(texts)}, texts=texts)


def _diff_domains(
    models: Sequence[Model], domains: dict[str, list[Document]], is_quiet: bool
) -> dict[str, TextChange]:
    from composable.workflows.diff import diff_on_text

    texts = {}
    for name, documents in domains.items():
        with bars.show_counts(name, is_quiet=is_quiet) as progress:
            texts[name] = diff_on_text(models[0], models[1], documents, progress)
    return texts


def _describe_move(change: LockChange) -> tuple[str, str, str]:
    old, new = (str(e.version) if e else "–" for e in (change.before, change.after))
    return change.name, old, new if old != new else f"{new}, other content"


def _compose(lock: Lock, loaded: LoadedBackbone, registry: str | None) -> Model:
    """Return the model of a lock's experts, from the registries."""
    from composable.assembly.experts import load_expert
    from composable.assembly.load import install_experts
    from composable.errors import IntegrityError
    from composable.packaging.versions.constraint import Requirement

    for expert in lock.experts:
        if expert.path is not None:
            raise PackagingError(
                f"{expert.name} comes from a folder, whose earlier content is not kept",
                where=expert.path,
                hint="without --data the locks can be compared",
            )
    wanted = [Requirement.parse(f"{e.name}@{e.version}") for e in lock.experts]
    if not wanted:
        return loaded.plug([])
    environment = install_experts(loaded, wanted, registry)
    for expert in lock.experts:
        found = environment.lock[expert.name].manifest
        if found != expert.manifest:
            raise IntegrityError(
                f"the registry's {expert.name} {expert.version} has the manifest {found}, the lock "
                f"has {expert.manifest}",
                where=expert.registry or "",
                hint="without --data the locks can be compared",
            )
    folders = [environment.expert_path(expert.name) for expert in lock.experts]
    return loaded.plug([load_expert(loaded, folder) for folder in folders])
