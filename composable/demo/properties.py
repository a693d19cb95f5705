"""Properties of composition that the demo shows.

Experts can be removed, installed in any order and refused if they do not fit, their signatures can
be verified, and adversarial ones barely change the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert, make_expert, save_expert
from composable.corpora.documents import Document, Spliced
from composable.corpora.recipe import shipped_folder
from composable.demo.measure import HeldOutTexts, truncate_documents
from composable.demo.operator import REGISTRY, confirm_publications, keys_of
from composable.demo.result import Property
from composable.errors import ComposableError
from composable.files import atomic
from composable.interface import RouterInterface
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.verification import verify_signatures
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import format_public_key
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version
from composable.progress import CountProgress, StageProgress
from composable.vetting.evaluation import mix_scorer, safe_scorer, score_documents, trace_routing
from composable.workflows.vet import check_expert
from composable.workflows.workspace import HELDOUT_FILE, WORK

# Entries for the experts, the backbone and an adversarial expert: one compilation serves all.
CAPACITY: Final = 8
# An adversarial expert may change the bits of public text by less than this share.
MAX_CHANGE: Final = 1e-3
# The expert whose manifest and held-out text the adversarial one uses.
_IMITATED: Final = "python-code"


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """An adversarial expert, and the checks that it failed.

    Args:
        expert: The expert.
        failed: Names of the checks.
    """

    expert: Pluggable
    failed: tuple[str, ...]


def show_properties(
    folder: Path,
    loaded: LoadedBackbone,
    project: Project,
    plugged: Sequence[Pluggable],
    texts: HeldOutTexts,
    adversary: Adversary,
    *,
    progress: StageProgress | None = None,
) -> tuple[Property, ...]:
    """Show each property, and return whether it held and what was found.

    Args:
        folder: The demo's folder.
        loaded: The backbone.
        project: The user's project.
        plugged: Its experts.
        texts: The held-out texts.
        adversary: What `vet_adversary` returned.
        progress: Called after each property with its name, properties done, and properties in all.
    """
    shows: dict[str, Callable[[], tuple[bool, str]]] = {
        "remove": lambda: _show_remove(loaded, plugged, texts.spliced),
        "reorder": lambda: _show_reorder(loaded, plugged, texts.spliced),
        "refuse": lambda: _show_refusal(folder, loaded.interface, project, plugged[0].name),
        "verify": lambda: show_signatures(folder, project),
        "withstand": lambda: _show_withstand(loaded, plugged, texts.public, adversary),
    }
    done, lock = itertools.count(1), threading.Lock()

    def run(names: Sequence[str]) -> list[Property]:
        properties = []
        for name in names:
            passed, found = shows[name]()
            properties.append(Property(name=name, passed=passed, found=found))
            with lock:
                if progress:
                    progress(name, next(done), len(shows))
        return properties

    # Side by side, except where two need the same compiled programs.
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (("remove", "reorder"), ("refuse", "verify", "withstand")))
    return (*first, *second)


def _encode_texts(model: Model, spliced: Sequence[Spliced]) -> np.ndarray:
    """Return the first four texts as token ids (B, T), T the model's context."""
    rows = [model.encode(document.text)[: model.context] for document in spliced[:4]]
    return np.stack([row for row in rows if len(row) == model.context])


def _compare_logits(one: Model, other: Model, tokens_BT: np.ndarray) -> tuple[bool, int]:
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
    removed = plugged[1]
    model = loaded.plug(plugged, CAPACITY)
    model.remove(removed.name)
    rest = [expert for expert in plugged if expert is not removed]
    without = loaded.plug(rest, CAPACITY)
    same, n_values = _compare_logits(model, without, _encode_texts(model, spliced))
    verb = "equal" if same else "do not equal"
    return same, (
        f"{removed.name} removed: all {n_values:,} logits {verb}, bit for bit, those of a model "
        "without it"
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
    same, n_values = _compare_logits(model, other, _encode_texts(model, spliced))
    names = ", ".join(expert.name for expert in order)
    verb = "equal" if same else "do not equal"
    return same, (
        f"installed in the order {names}: all {n_values:,} logits {verb}, bit for bit, those of "
        "the first order"
    )


def _show_refusal(
    folder: Path, interface: RouterInterface, project: Project, name: str
) -> tuple[bool, str]:
    """Ask for an expert of another interface version; resolution refuses it and explains why."""
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
    open_for_publishing(folder / REGISTRY, keys=keys_of(folder, name)).publish(future)
    confirm_publications(folder)
    asked = Requirement.parse(f"{name}>=2.0")
    dependency = dataclasses.replace(project.experts[name], constraint=asked.constraint)
    asking = dataclasses.replace(
        project,
        experts={name: dependency},
        registries={"demo": str(folder / REGISTRY)},
        root=folder / "refused",
    )
    try:
        lock_project(asking, interface, is_dry_run=True)
    except ComposableError as error:
        return True, f"{asked} refused: {error}"
    return False, f"{asked} was not refused"


def show_signatures(folder: Path, project: Project) -> tuple[bool, str]:
    """Verify the statements and files of what is installed, each by its contributor's own key.

    Args:
        folder: The demo's folder.
        project: The user's project.
    """
    checked = verify_signatures(project.root)
    damaged = project.environment.verify()
    problems = [f"{file} differs" for file in damaged]
    for each in checked:
        files = Keyring(keys_of(folder, each.name)).files()
        own = {format_public_key(file.public) for file in files}
        if each.problem is not None:
            problems.append(f"{each.name}: {each.problem.message}")
        elif each.signer is None or each.signer.key not in own:
            problems.append(f"{each.name} is not signed by its contributor")
    passed = len(checked) == len(project.experts) and not problems
    names = ", ".join(f"{each.name} {each.version}" for each in checked)
    return passed, (
        f"{names}: every file is as its contributor signed it, each with a key of its own"
        if passed
        else "; ".join(problems) or "nothing is installed"
    )


def vet_adversary(
    folder: Path, loaded: LoadedBackbone, *, progress: CountProgress | None = None
) -> Adversary:
    """Make an adversarial expert, and vet it as if a contributor had sent it.

    Args:
        folder: Where it is written; its name is the expert's.
        loaded: The backbone.
        progress: As for `check_expert`.
    """
    source = shipped_folder(_IMITATED)
    _write_adversarial(folder, source, loaded)
    verdict = check_expert(loaded, folder, [source / "text" / HELDOUT_FILE], progress=progress)
    failed = tuple(check.name for check in verdict.checks if not check.passed)
    return Adversary(expert=load_expert(loaded, folder), failed=failed)


def _show_withstand(
    loaded: LoadedBackbone,
    plugged: Sequence[Pluggable],
    public: Sequence[Document],
    adversary: Adversary,
) -> tuple[bool, str]:
    """Plug in an adversarial expert: public text keeps its bits, and vetting refuses the expert."""
    clean = loaded.plug(plugged, CAPACITY)
    attacked = loaded.plug([*plugged, adversary.expert], CAPACITY)
    documents = truncate_documents(public)
    change = {}
    for mode, scorer in (("mix", mix_scorer), ("safe", safe_scorer)):
        before, after = (
            score_documents(scorer(model), documents, context=model.context).bits_per_byte
            for model in (clean, attacked)
        )
        change[mode] = after / before - 1
    index = attacked.names.index(adversary.expert.name)
    routed = np.concatenate(trace_routing(attacked, documents))[:, index]
    passed = max(map(abs, change.values())) < MAX_CHANGE and bool(adversary.failed)
    return passed, (
        "an adversarial expert, with an untrained scout and a huge random body: "
        f"{routed.mean():.4%} of the public text is routed to it, whose bits change by "
        f"{change['mix']:+.4%} in mix mode and {change['safe']:+.4%} in safe mode; vetting refuses "
        f"it ({', '.join(adversary.failed)})"
    )


def _write_adversarial(folder: Path, source: Path, loaded: LoadedBackbone) -> None:
    """Write an expert with an untrained scout and a huge random body.

    Args:
        folder: Where; its name is the expert's.
        source: The expert whose manifest it gets.
        loaded: The backbone.
    """
    folder.mkdir(parents=True)
    manifest = dataclasses.replace(Manifest.read(source), name=folder.name)
    atomic.write_text(folder / EXPERT_FILE, manifest.to_toml())
    expert = make_expert(loaded.backbone, manifest, seed=1)
    key = jax.random.key(1)
    noise = jax.tree.map(lambda x: 100.0 * jax.random.normal(key, x.shape), nnx.state(expert.body))
    nnx.update(expert.body, noise)
    save_expert(folder, expert, manifest)
