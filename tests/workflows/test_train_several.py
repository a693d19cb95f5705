"""Several experts in one process: what texts they share, what runs once, and what is compared."""

import jax
import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, read_documents, write_documents
from composable.errors import TrainingError
from composable.training.config import TrainConfig
from composable.training.loop import _compile_step
from composable.workflows import train as contribution
from composable.workflows import train_several, trunk_cache
from composable.workflows.train import train_expert
from composable.workflows.train_several import train_experts
from tests.support.tiny import PRIVATE_WORDS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_scout_pass")]

CFG = TrainConfig(steps=4, batch_size=2, window=16, learning_rate=1e-2)
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def texts(tiny, tmp_path_factory):
    """Return two texts: that of the first two experts, and that of the third."""
    folder = tmp_path_factory.mktemp("texts")
    for name, start in (("shared", 0), ("own", 100)):
        documents = [
            Document(f"{name}/{i}", tiny.text(PRIVATE_WORDS, seed=start + i, length=60))
            for i in range(30)
        ]
        write_documents(folder / f"{name}.jsonl", documents)
    return folder / "shared.jsonl", folder / "own.jsonl"


def write_folder(trained_folder, folder, name):
    folder.mkdir(parents=True)
    text = (trained_folder / "expert.toml").read_text()
    text = text.replace('name = "logic"', f'name = "{name}"')
    assert name in text
    (folder / "expert.toml").write_text(text.replace('kind = "ffn"', 'kind = "lora"\nrank = 2'))
    return folder


class Together:
    """Three experts trained together, and what was run for them."""

    def __init__(self, loaded, trained_folder, texts, parent):
        self.folders = [write_folder(trained_folder, parent / name, name) for name in NAMES]
        self.data = dict(zip(self.folders, ([texts[0]], [texts[0]], [texts[1]]), strict=True))
        self.compiled, self.at_start = [], []

        def listen(event, duration, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                self.compiled.append(duration)

        def train(loaded, folder, *arguments, **options):
            self.at_start.append(len(self.compiled))
            return train_expert(loaded, folder, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trunk_cache, "_WORTH_CACHING", 0)
            patch.setattr(train_several, "train_expert", train)
            _compile_step.cache_clear()
            jax.monitoring.register_event_duration_secs_listener(listen)
            try:
                self.experts = train_experts(loaded, self.data, dict.fromkeys(self.data, CFG))
            finally:
                jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def together(loaded, trained_folder, texts, tmp_path_factory):
    return Together(loaded, trained_folder, texts, tmp_path_factory.mktemp("together"))


def test_experts_on_one_text_hold_out_the_same_and_read_one_trunk(together):
    first, second, third = (folder / ".work" for folder in together.folders)
    heldout = [read_documents([work / "heldout.jsonl"]) for work in (first, second, third)]
    assert heldout[0] == heldout[1] != heldout[2]
    assert not (second / "trunk").exists()
    for trunk in (first / "trunk", third / "trunk"):
        # One for the text and one for what is held out; features of more text, for scouts.
        assert len(list(trunk.glob("*.tap"))) == 2
        assert len(list(trunk.glob("*.npy"))) == 1


def test_the_second_expert_of_a_structure_compiles_nothing_to_train(together):
    """What is compiled before the third starts was needed to measure the first."""
    first, second, third = together.at_start
    assert first == 0 < second
    between = third - second
    assert between == 0


def test_experts_on_one_text_come_best_first(together):
    assert [expert.data for expert in together.experts] == [
        tuple(together.data[expert.folder]) for expert in together.experts
    ]
    first, second, third = together.experts
    assert {first.folder, second.folder} == set(together.folders[:2])
    assert third.folder == together.folders[2]
    assert first.heldout.bits_per_token <= second.heldout.bits_per_token


def test_an_expert_is_what_training_it_alone_makes(
    loaded, together, trained_folder, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(trunk_cache, "_WORTH_CACHING", 0)
    folder = write_folder(trained_folder, tmp_path / "third", "third")
    train_expert(loaded, folder, [texts[1]], CFG)
    found, alone = (load_expert(loaded, path) for path in (together.folders[2], folder))
    for x, y in zip(
        *(jax.tree.leaves((expert.body, expert.scout)) for expert in (found, alone)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    assert contribution.read_texts([texts[1]], "third")[1] == read_documents(
        [folder / ".work" / "heldout.jsonl"]
    )


def test_two_experts_of_one_name_are_refused(loaded, trained_folder, texts, tmp_path):
    folders = [write_folder(trained_folder, tmp_path / part, "same") for part in ("a", "b")]
    with pytest.raises(TrainingError, match="another expert that is trained with it has the name"):
        train_experts(loaded, {f: [texts[0]] for f in folders}, dict.fromkeys(folders, CFG))
