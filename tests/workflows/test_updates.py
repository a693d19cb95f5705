"""Low-rank updates: trained on their factors alone, exact, resumed, small to send."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, write_documents
from composable.errors import TrainingError
from composable.files.delta import add_product
from composable.files.safetensors import TensorFile, write_tensors
from composable.interface import body_signature, scout_signature
from composable.model.tensors import shapes_of, to_tensors
from composable.packaging import Project, Registry, Requirement, Store, lock_project, sync_project
from composable.packaging.install import deltas as deltas_module
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.project import sync as sync_module
from composable.packaging.registry.inbox import Inbox
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.trust.keyring import Keyring
from composable.packaging.versions.version import Version
from composable.training.config import TrainConfig
from composable.training.updates import FACTOR_BITS, SCOUT_BITS, add_factors, find_factors
from composable.workflows import train as train_module
from composable.workflows.accept import accept_proposal
from composable.workflows.propose import propose_expert
from composable.workflows.publish import publish_expert
from composable.workflows.review import review_proposal
from composable.workflows.train import parse_update, train_expert
from composable.workflows.updates import UPDATE_FILE, read_factors, write_factors
from composable.workflows.vet import check_expert
from composable.workflows.workspace import WORK
from tests.support.tiny import PRIVATE_WORDS
from tests.support.updates import CountedFolder

CFG = TrainConfig(
    steps=6, batch_size=8, window=32, learning_rate=1e-2, checkpoint_every=2, log_every=2
)
FILES = ("body.safetensors", "scout.safetensors")


@pytest.fixture
def parent(loaded, trained_folder):
    return load_expert(loaded, trained_folder)


@pytest.fixture
def make_update(trained_folder, tmp_path):
    """Return a function that makes the folder of the next generation."""

    def make(name="update"):
        folder = tmp_path / name
        folder.mkdir()
        text = (trained_folder / "expert.toml").read_text().replace('"1.0.0"', '"2.0.0"')
        derived = text.replace("description", 'derives-from = "logic@1.0.0"\ndescription')
        (folder / "expert.toml").write_text(derived)
        (folder / "README.md").write_text("An update.\n")
        return folder

    return make


@pytest.fixture
def text(trained_folder):
    return trained_folder.parent / "logic.jsonl"


def read(folder):
    return [(folder / file).read_bytes() for file in FILES]


def test_an_update_is_its_parent_plus_products(
    loaded, trained_folder, parent, make_update, text, monkeypatch
):
    seen = {}
    fit = train_module.fit

    def watched(objective, trained, *args, **options):
        seen["sizes"] = sum(x.size for x in jax.tree.leaves(trained))
        state = jax.eval_shape(options["optimizer"].init, trained)
        seen["state"] = sum(x.size for x in jax.tree.leaves(state))
        return fit(objective, trained, *args, **options)

    monkeypatch.setattr(train_module, "fit", watched)
    folder = make_update()
    record = train_expert(loaded, folder, [text], CFG, parent=parent, update_rank=2)
    assert (record.update_rank, record.derives_from) == (2, "logic@1.0.0")

    n_scout = sum(int(np.prod(shape)) for shape in shapes_of(parent.scout).values())
    matrices = shapes_of(parent.body).values()
    assert seen["sizes"] == n_scout + sum(2 * sum(shape) for shape in matrices)
    assert seen["state"] < 3 * seen["sizes"], "there is state for factors, and for no matrix"

    factors = read_factors(folder)
    body = body_signature(loaded.interface, "ffn", None)
    scout = scout_signature(loaded.interface, Manifest.read(folder).scout_width)
    for file, specs, n_bits in ((FILES[0], body, FACTOR_BITS), (FILES[1], scout, SCOUT_BITS)):
        files = [TensorFile(home / file, specs) for home in (trained_folder, folder)]
        assert factors[file].keys() == {n for n, spec in specs.items() if len(spec.shape) == 2}
        for name, pair in factors[file].items():
            before, after = (tensors[name] for tensors in files)
            assert not np.array_equal(before, after)
            np.testing.assert_array_equal(after, add_product(before, *pair))
            whole = [np.frexp(factor.astype(np.float32))[0] * 2**n_bits for factor in pair]
            assert all(np.array_equal(x, np.rint(x)) for x in whole)
    # What is loaded and run is the sum, so no one needs to know of the factors.
    updated = load_expert(loaded, folder)
    assert updated.body.kind == "ffn"


def test_an_update_is_resumed(loaded, parent, make_update, text):
    whole, broken = make_update("whole"), make_update("broken")
    options = {"parent": parent, "update_rank": 2}
    train_expert(loaded, whole, [text], CFG, salt="a", **options)

    def interrupt(stage, step, steps, figures):
        if stage == "body and scout" and step == 4:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        train_expert(loaded, broken, [text], CFG, salt="a", progress=interrupt, **options)
    assert not (broken / FILES[0]).exists()
    train_expert(loaded, broken, [text], CFG, salt="a", **options)
    assert read(broken) == read(whole)
    train_expert(loaded, broken, [text], CFG, salt="a", **options)  # already complete
    assert read(broken) == read(whole)
    with pytest.raises(TrainingError, match="the rank of the update is not the one") as caught:
        train_expert(loaded, broken, [text], CFG, salt="a", parent=parent, update_rank=3)
    assert "use the same rank of the update to resume" in caught.value.hint
    with pytest.raises(TrainingError, match="the rank of the update is not the one"):
        train_expert(loaded, broken, [text], CFG, salt="a", parent=parent)


@pytest.fixture
def target(loaded, trained_folder, tmp_path, monkeypatch):
    """Return a registry that has the parent, and takes deltas of small files."""
    for module in (deltas_module, sync_module):
        monkeypatch.setattr(module, "MIN_DELTA_BYTES", 1000)
    registry = open_for_publishing(tmp_path / "registry")
    publish_expert(trained_folder, loaded.interface, registry)
    return registry


def test_an_update_is_published_and_installed_as_its_factors(
    loaded, trained_folder, parent, target, make_update, text, tmp_path
):
    folder = make_update()
    train_expert(loaded, folder, [text], CFG, parent=parent, update_rank=2)
    check_expert(loaded, folder)
    published = publish_expert(folder, loaded.interface, target)
    assert published.parent == "logic@1.0.0" and FILES[0] not in published.whole
    sizes = {file.name: file.size for file in published.manifest.files}
    assert published.deltas[FILES[0]] < 0.2 * sizes[FILES[0]], "a tiny body of 2 ranks of 32"

    counted = CountedFolder(tmp_path / "registry")
    project = Project.create(tmp_path / "project", str(loaded.folder), {"local": "../registry"})
    store = Store(tmp_path / "store")
    for version in ("1.0.0", "2.0.0"):
        counted.sent.clear()
        project = project.add(Requirement.parse(f"logic@{version}"))
        lock = lock_project(project, loaded.interface)
        sync_project(project, lock, store, source=Registry(counted))
    expected = {**sizes, **published.deltas}
    assert sum(counted.sent.values()) < sum(expected.values()) + 3000
    installed = project.environment.expert_path("logic")
    assert read(installed) == read(folder)
    # Without the factors, the same release is published, in more bytes.
    (folder / WORK / UPDATE_FILE).unlink()
    other = open_for_publishing(tmp_path / "other")
    publish_expert(trained_folder, loaded.interface, other)
    again = publish_expert(folder, loaded.interface, other)
    assert again.manifest.digest == published.manifest.digest
    assert again.deltas.get(FILES[0], sizes[FILES[0]]) > 2 * published.deltas[FILES[0]]


def test_a_proposed_update_is_reviewed_and_published_as_its_factors(
    loaded, trained_folder, parent, target, make_update, tiny, tmp_path
):
    folder = make_update()
    body = to_tensors(parent.body)
    rng = np.random.default_rng(0)
    # So small a change that nothing is worse beyond noise, and nothing better.
    factors = find_factors(
        {
            f"{name}.{side}": 1e-3 * rng.normal(size=shape)
            for name, array in body.items()
            for side, shape in (("a", (len(array), 2)), ("b", (2, array.shape[1])))
        }
    )
    write_tensors(folder / FILES[0], add_factors(body, factors))
    shutil.copyfile(trained_folder / FILES[1], folder / FILES[1])
    write_factors(folder, {FILES[0]: factors})

    inbox, base = Inbox(target, Keyring(tmp_path / "keys")), ("logic", Version("1.0.0"))
    store = Store(tmp_path / "proposer")
    proposal, whole = propose_expert(folder, base, loaded.interface, inbox, store=store)
    assert proposal.deltas.keys() == {*FILES} and not whole
    assert proposal.deltas[FILES[0]].size < 0.2 * proposal.sizes[FILES[0]]
    words = [tiny.text(PRIVATE_WORDS, seed=100 + i, length=300) for i in range(8)]
    write_documents(tmp_path / "own.jsonl", [Document(f"{i}", x) for i, x in enumerate(words)])
    received = inbox.find(proposal.id)
    for name in ("review", "accept"):
        (tmp_path / name).mkdir()
    verdict = review_proposal(
        loaded,
        inbox,
        received,
        tmp_path / "review",
        [tmp_path / "own.jsonl"],
        registry=str(tmp_path / "registry"),
    )
    assert verdict.passed, verdict.failed
    digest = "sha256:" + "0" * 64
    accept_proposal(inbox, received, tmp_path / "accept", loaded.interface, verdict, digest)
    release = target.versions("logic")[-1]
    body_file = next(file for file in release.files if file.name == FILES[0])
    assert body_file.digest == proposal.digests[FILES[0]]
    assert body_file.deltas == (proposal.deltas[FILES[0]],), "what was sent is what clients get"
    assert not target.has_blob(body_file.digest)

    project = Project.create(tmp_path / "project", str(loaded.folder), {"local": "../registry"})
    project = project.add(Requirement.parse(f"logic@{release.version}"))
    sync_project(project, lock_project(project, loaded.interface), Store(tmp_path / "store"))
    assert read(project.environment.expert_path("logic")) == read(folder)


def test_training_all_numbers_forgets_an_update(loaded, parent, make_update, text, tmp_path):
    folder = make_update()
    train_expert(loaded, folder, [text], CFG, parent=parent, update_rank=2)
    assert read_factors(folder)
    for name in ("checkpoints", "text.digest"):
        (folder / WORK / name).rename(tmp_path / name)
    train_expert(loaded, folder, [text], CFG, parent=parent)
    assert read_factors(folder) == {}


def test_what_cannot_be_updated(loaded, tiny, parent, make_update, trained_folder, text, tmp_path):
    with pytest.raises(TrainingError, match="none is named") as caught:
        train_expert(loaded, trained_folder, [text], CFG, update_rank=2)
    assert 'derives-from = "logic@VERSION"' in caught.value.hint
    for rank in (0, 1000):
        with pytest.raises(TrainingError, match=f"rank {rank} is not from 1 to"):
            train_expert(
                loaded, make_update(str(rank)), [text], CFG, parent=parent, update_rank=rank
            )
    low = dataclasses.replace(parent, body=tiny.expert("low", kind="lora", rank=2).body)
    with pytest.raises(TrainingError, match="already low-rank"):
        train_expert(loaded, make_update(), [text], CFG, parent=low, update_rank=2)


@pytest.mark.parametrize("text", ["8", "rank", "rank=", "rank=-1", "rank=8.5", "width=8"])
def test_what_is_no_update(text):
    with pytest.raises(TrainingError, match="is not rank=N"):
        parse_update(text)
    assert parse_update("rank=16") == 16
