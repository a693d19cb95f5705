"""The harness runs its tasks on a composed model, from files on disk."""

import builtins
import importlib
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from composable.errors import InteropError


@pytest.fixture(scope="module")
def adapter():
    return importlib.import_module("composable.interop.lm_eval")


@pytest.fixture(scope="module")
def model(loaded, tiny):
    from composable.model.model import Pluggable

    expert = tiny.expert("logic", noise=0.2)
    return loaded.plug([Pluggable(name="logic", body=expert.body, scout=expert.scout, key=7)])


def ask(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.mark.parity
def test_a_continuation_is_as_likely_as_the_model_says(adapter, model):
    lm = adapter.ComposableLM(model)
    requests = [
        ask("the of and", " to in"),
        ask("", "is that for it"),
        ask("the of ", "and"),
        ask("as it was " * 30, "with"),  # longer than the context
        ask("x", "y" * 127),
    ]
    answers = lm.loglikelihood(requests)
    whole_T = model.encode("the of and to in")
    log_prob_TV = np.asarray(jax.nn.log_softmax(model(whole_T[None, :-1])))[0]
    expected = sum(
        log_prob_TV[t, whole_T[t + 1]] for t in range(len(whole_T) - 7, len(whole_T) - 1)
    )
    assert answers[0][0] == pytest.approx(expected, abs=1e-3)
    assert all(np.isfinite(nats) and nats < 0 for nats, _ in answers)
    # The space goes with the word, wherever it was written.
    # Alone it is padded to another length, which rounds otherwise.
    (again,) = lm.loglikelihood([ask("the of", " and")])
    assert answers[2] == (pytest.approx(again[0], abs=1e-4), again[1])


@pytest.mark.parity
def test_the_likeliest_continuation_is_known_as_such(adapter, model):
    lm = adapter.ComposableLM(model)
    (made,) = lm.generate_until([ask("the of and", {"until": [], "max_gen_toks": 8})])
    (answer,) = lm.loglikelihood([ask("the of and", made)])
    assert answer[1]
    assert not lm.loglikelihood([ask("the of and", made[:-1] + "Q")])[0][1]


@pytest.mark.parity
def test_texts_are_as_likely_as_cards_say(adapter, model):
    from composable.vetting.evaluation import mix_scorer, safe_scorer, score_documents

    text = "the of and to in is that for it " * 8
    for mode, scorer in (("mix", mix_scorer), ("safe", safe_scorer)):
        lm = adapter.ComposableLM(model, mode=mode)
        score = score_documents(scorer(model), [text.encode()], context=model.context)
        assert lm.loglikelihood_rolling([ask(text)]) == [pytest.approx(-score.nats_B[0])]


@pytest.mark.parity
def test_generation_stops_where_it_is_told(adapter, model):
    lm = adapter.ComposableLM(model)
    settings = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (whole,) = lm.generate_until([ask("the of and", {**settings, "until": []})])
    stop = whole[4:6]
    (cut,) = lm.generate_until([ask("the of and", {**settings, "until": stop})])
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(InteropError, match="5 is not implemented") as caught:
        lm.generate_until([ask("the", {"until": ["."], "num_beams": 5})])
    assert caught.value.where == "generation_kwargs.num_beams"
    (made,) = lm.generate_until([ask("the of and " * 40, {"until": [], "max_gen_toks": 4})])
    assert made


@pytest.mark.parity
def test_generation_takes_the_sampling_settings_of_transformers(adapter, model):
    lm = adapter.ComposableLM(model)
    settings = {"until": [], "max_gen_toks": 12}
    (greedy,) = lm.generate_until([ask("the of and", settings)])
    for more in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": None, "min_p": None, "top_p": 1e-6}):
        sampled = {**settings, "do_sample": True, "temperature": 1.0, **more}
        assert lm.generate_until([ask("the of and", sampled)]) == [greedy]
    penalized = {**settings, "repetition_penalty": 5.0}
    assert lm.generate_until([ask("the of and", penalized)]) != [greedy]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # other people's
def test_the_harness_runs_local_tasks(adapter, model, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [
        {"text": "the of and", "choices": ["to in is", "%%@@~~"], "gold": 0},
        {"text": "that for it", "choices": ["##[[]]", "as was with"], "gold": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    tasks = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML.
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    outcome = lm_eval.simple_evaluate(
        model=adapter.ComposableLM(model),
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
    )
    figures = outcome["results"]
    assert figures["choose"]["acc,none"] == 1.0
    assert 0 < figures["read"]["bits_per_byte,none"] < 8
    assert 0 <= figures["write"]["exact_match,none"] <= 1


def test_a_missing_harness_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "composable.interop.lm_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InteropError, match="needs the `lm_eval` library") as caught:
        importlib.import_module("composable.interop.lm_eval")
    assert "composable[lm-eval]" in caught.value.hint


@pytest.mark.parity
def test_a_token_that_spans_context_and_continuation(adapter, loaded, tiny, monkeypatch):
    """The continuation is encoded alone: it is never certain for nothing."""

    class Pairs:
        """Two letters a token, from the start: `ab|c` and `ab|cd` differ in their last token."""

        begin = 0

        def encode(self, text):
            pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
            return np.array([0, *(sum(piece.encode()) % 200 + 1 for piece in pieces)], np.int32)

    lm = adapter.ComposableLM(loaded.plug([]))
    monkeypatch.setattr(lm.model, "tokenizer", Pairs())
    tokens_T, n_scored = lm._encode_pair("abc", "d")
    assert n_scored == 1
    expected = [0, sum(b"ab") % 200 + 1, sum(b"c") % 200 + 1, sum(b"d") % 200 + 1]
    assert tokens_T.tolist() == expected
    nats, _ = lm.loglikelihood([ask("abc", "d")])[0]
    assert nats < 0


@pytest.mark.parity
def test_continuations_without_an_answer_are_refused(adapter, model):
    lm = adapter.ComposableLM(model)
    with pytest.raises(InteropError, match="the continuation is empty"):
        lm.loglikelihood([ask("the of", "")])
    with pytest.raises(InteropError, match="expected at most 128"):
        lm.loglikelihood([ask("the of", "y" * 129)])
    assert np.isfinite(lm.loglikelihood([ask("the of", "y" * 128)])[0][0])
    assert lm.loglikelihood_rolling([ask("")]) == [0.0]


@pytest.mark.parity
@pytest.mark.parametrize("limit", [128, 129, 32768])
def test_a_prompt_is_never_dropped_whole(adapter, model, limit):
    lm = adapter.ComposableLM(model)
    with pytest.raises(InteropError, match="leave no room for the prompt") as caught:
        lm.generate_until([ask("the of", {"until": ["@"], "max_gen_toks": limit})])
    assert caught.value.where == "generation_kwargs.max_gen_toks"
    with pytest.raises(InteropError, match="leave no room"):
        adapter.ComposableLM(model, max_tokens=limit).generate_until([ask("the of", {})])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("until", 3),
        ("until", ["a", None]),
        ("until", {"a": 1}),
        ("max_gen_toks", "many"),
        ("max_gen_toks", 0),
        ("max_gen_toks", True),
        ("temperature", "hot"),
        ("do_sample", "no"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(adapter, model, name, value):
    lm = adapter.ComposableLM(model)
    with pytest.raises(InteropError, match="expected") as caught:
        lm.generate_until([ask("the", {"max_gen_toks": 2, name: value})])
    assert caught.value.where == f"generation_kwargs.{name}"


@pytest.mark.parity
def test_settings_mean_what_they_mean_in_the_harness(adapter, model):
    lm = adapter.ComposableLM(model)
    greedy = {"max_gen_toks": 6, "do_sample": False}
    (whole,) = lm.generate_until([ask("the of", {**greedy, "until": None})])
    assert lm.generate_until([ask("the of", {**greedy, "until": []})]) == [whole]
    assert lm.generate_until([ask("the of", {**greedy, "until": [""]})]) == [whole]
    assert lm.generate_until([ask("the of", {"max_new_tokens": 6, "temperature": 0.0})]) == [whole]
    with pytest.raises(InteropError, match="sampling at temperature 0"):
        lm.generate_until([ask("the", {"do_sample": True})])
