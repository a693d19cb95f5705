"""What makes it open source: parts can be removed, reordered, refused and withstood."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert, make_expert, save_expert
from composable.corpora.documents import Document, Spliced
from composable.demo.measure import begins
from composable.errors import ComposableError
from composable.files import atomic
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version
from composable.vetting.evaluation import mix_scorer, safe_scorer, score_documents, trace_routing
from composable.workflows.vet import check_expert
from composable.workflows.workspace import WORK

# Room for the experts, the backbone and an adversarial expert: one compilation serves all.
CAPACITY: Final = 8
# An adversarial expert may change the bits of public text by less than this share.
MAX_CHANGE: Final = 1e-3


def show_properties(
    folder: Path,
    loaded: LoadedBackbone,
    project: Project,
    plugged: Sequence[Pluggable],
    public: Sequence[Document],
    spliced: Sequence[Spliced],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Show each property and return its name, whether it held, and what was found.

    Args:
        folder: The demo's.
        loaded: The backbone.
        project: The user's project.
        plugged: Its experts.
        public: Held-out public documents.
        spliced: Texts that switch domain midway.
        progress: Called with properties done, properties in all, and the newest one's name.
    """
    shows: dict[str, Callable[[], tuple[bool, str]]] = {
        "remove": lambda: _show_remove(loaded, plugged, spliced),
        "reorder": lambda: _show_reorder(loaded, plugged, spliced),
        "refuse": lambda: _show_refusal(folder, loaded, project, plugged[0].name),
        "withstand": lambda: _show_hostile(folder, loaded, plugged, public),
    }
    properties = []
    for name, show in shows.items():
        passed, found = show()
        properties.append({"name": name, "passed": passed, "found": found})
        if progress:
            progress(len(properties), len(shows), name)
    return properties


def _tokens(model: Model, spliced: Sequence[Spliced]) -> np.ndarray:
    rows = [model.encode(document.text)[: model.context] for document in spliced[:4]]
    return np.stack([row for row in rows if len(row) == model.context])


def _same_bits(one: Model, other: Model, tokens_BT: np.ndarray) -> tuple[bool, int]:
    """Compare two models in both modes; return whether all values agree, and how many there are."""
    pairs = [
        (np.asarray(one(tokens_BT)), np.asarray(other(tokens_BT))),
        (np.asarray(one.safe(tokens_BT)), np.asarray(other.safe(tokens_BT))),
    ]
    # Compared as integers: -0.0 and 0.0 differ, and so would two kinds of NaN.
    same = all((a.view(np.int32) == b.view(np.int32)).all() for a, b in pairs)
    return same, sum(a.size for a, _ in pairs)


def _show_remove(
    loaded: LoadedBackbone, plugged: Sequence[Pluggable], spliced: Sequence[Spliced]
) -> tuple[bool, str]:
    """Remove an expert; the logits are those of the model that never had it."""
    gone = plugged[1]
    model = loaded.plug(plugged, CAPACITY)
    model.remove(gone.name)
    rest = [expert for expert in plugged if expert is not gone]
    never = loaded.plug(rest, CAPACITY)
    same, n_values = _same_bits(model, never, _tokens(model, spliced))
    verb = "equal" if same else "differ from"
    return same, (
        f"{gone.name} removed: all {n_values:,} logits {verb}, bit for bit, those of the model "
        "that never had it"
    )


def _show_reorder(
    loaded: LoadedBackbone, plugged: Sequence[Pluggable], spliced: Sequence[Spliced]
) -> tuple[bool, str]:
    """Install in another order; the logits are the same."""
    model = loaded.plug(plugged, CAPACITY)
    other = loaded.plug(capacity=CAPACITY)
    order = list(reversed(plugged))
    for expert in order:
        other.install(expert)
    same, n_values = _same_bits(model, other, _tokens(model, spliced))
    names = ", ".join(expert.name for expert in order)
    verb = "equal" if same else "differ from"
    return same, f"installed as {names}: all {n_values:,} logits {verb}, bit for bit, the first"


def _show_refusal(
    folder: Path, loaded: LoadedBackbone, project: Project, name: str
) -> tuple[bool, str]:
    """Ask for an expert of another interface version; resolution refuses and says why."""
    future = folder / "contributors" / f"{name}-2"
    shutil.copytree(
        folder / "contributors" / name, future, ignore=shutil.ignore_patterns(WORK, "text", "log*")
    )
    manifest = Manifest.read(future)
    other_digest = "sha256:" + "0" * 64
    manifest = dataclasses.replace(
        manifest,
        version=Version("2.0.0"),
        interface=dataclasses.replace(
            manifest.interface,
            requires=Requirement.parse("interface>=2.0,<3").constraint,
            digest=other_digest,
        ),
    )
    atomic.write_text(future / EXPERT_FILE, manifest.to_toml())
    open_for_publishing(folder / "registry").publish(future)
    asked = Requirement.parse(f"{name}>=2.0")
    wanted = dataclasses.replace(project.experts[name], constraint=asked.constraint)
    wanting = dataclasses.replace(
        project,
        experts={name: wanted},
        registries={"demo": str(folder / "registry")},
        root=folder / "refused",
    )
    try:
        lock_project(wanting, loaded.interface, is_dry_run=True)
    except ComposableError as error:
        return True, f"{asked} refused: {error}"
    return False, f"{asked} was not refused"


def _show_hostile(
    folder: Path,
    loaded: LoadedBackbone,
    plugged: Sequence[Pluggable],
    public: Sequence[Document],
) -> tuple[bool, str]:
    """Plug in an expert with an untrained scout and a huge random body."""
    source, own = folder / "contributors" / plugged[0].name, folder / "contributors" / "hostile"
    own.mkdir()
    manifest = dataclasses.replace(Manifest.read(source), name="hostile")
    atomic.write_text(own / EXPERT_FILE, manifest.to_toml())
    expert = make_expert(loaded, manifest, seed=1)
    key = jax.random.key(1)
    noise = jax.tree.map(lambda x: 100.0 * jax.random.normal(key, x.shape), nnx.state(expert.body))
    nnx.update(expert.body, noise)
    save_expert(own, expert, manifest)
    shutil.copytree(source / WORK, own / WORK)
    verdict = check_expert(loaded, own)
    failed = [check.name for check in verdict.checks if not check.passed]

    clean = loaded.plug(plugged, CAPACITY)
    dirty = loaded.plug(plugged, CAPACITY)
    dirty.install(load_expert(loaded, own))
    documents = begins(public)
    change = {}
    for mode, scorer in (("mix", mix_scorer), ("safe", safe_scorer)):
        before, after = (
            score_documents(scorer(model), documents, context=model.context).bits_per_byte
            for model in (clean, dirty)
        )
        change[mode] = after / before - 1
    index = dirty.names.index("hostile")
    taken = np.concatenate(trace_routing(dirty, documents))[:, index]
    passed = max(map(abs, change.values())) < MAX_CHANGE and bool(failed)
    return passed, (
        f"an untrained scout with a huge random body took {taken.mean():.4%} of the public text's "
        f"bytes and changed its bits by {change['mix']:+.4%} in mix mode, {change['safe']:+.4%} in "
        f"safe mode; vetting refuses it ({', '.join(failed)})"
    )
