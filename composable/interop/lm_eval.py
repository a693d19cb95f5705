"""A composed model as a model of lm-evaluation-harness, so that its tasks run unchanged.

    import composable as cx
    import lm_eval
    from composable.interop.lm_eval import ComposableLM

    lm_eval.simple_evaluate(ComposableLM(cx.load(experts=["legal"])), tasks=["my_task"])

Importing this file needs the `lm_eval` library; nothing else of composable does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import InteropError
from composable.files.text import check_text
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.composed import Parts
from composable.model.decoding import Mode, continue_tokens
from composable.model.model import Model
from composable.model.sampling import Sampling
from composable.model.text import stop_before, to_pieces
from composable.vetting.evaluation import mix_scorer, safe_scorer, score_documents

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise InteropError(
        "running the tasks of lm-evaluation-harness needs the `lm_eval` library",
        hint="pip install 'composable[lm-eval]'",
    ) from error

# Requests scored at once, and the shortest length that they are padded to: every length of text
# runs one of few compiled programs.
_BATCH: Final = 4
_MIN_LENGTH: Final = 64
_MAX_TOKENS: Final = 256
# What tasks call the greatest number of tokens; the first one given counts, as in the harness.
_MAX_TOKENS_NAMES: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_EXPECTED: Final = {
    "until": "a string, a list of strings or null",
    "max_gen_toks": "a whole number of at least 1",
    "temperature": "a number",
    "top_k": "a whole number",
    "top_p": "a number",
    "min_p": "a number",
    "repetition_penalty": "a number",
    "do_sample": "true or false",
}
_NUMBERS: Final[dict[str, Any]] = {
    "temperature": int | float,
    "top_k": int,
    "top_p": int | float,
    "min_p": int | float,
    "repetition_penalty": int | float,
}


class ComposableLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """A model with the interface of the harness.

    It behaves as the harness's own model of transformers. Every text begins with the model's begin
    token. A text that does not fit the context is cut at its start, with the begin token.
    Continuations take the settings `until`, `max_gen_toks`, `do_sample` and those of `Sampling`
    except the seed; without a `temperature` they are greedy.

    Args:
        model: The model.
        mode: "mix" or "safe".
        max_tokens: Length of a continuation in tokens, where a task does not set it.
    """

    def __init__(self, model: Model, *, mode: Mode = "mix", max_tokens: int = _MAX_TOKENS) -> None:
        super().__init__()
        if mode not in _MODES:
            raise InteropError(f"{mode!r} is not one of {', '.join(_MODES)}", where="mode")
        self.model, self.mode, self.max_tokens = model, mode, max_tokens

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of every continuation after its context, in nats.

        Returns:
            Log-probability, and whether every token of it was the likeliest.

        Raises:
            InteropError: For a continuation that is empty or longer than the context.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            for i, answer in zip(chosen, self._score([pairs[i] for i in chosen]), strict=True):
                answers[i] = answer
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-probabilities of whole texts, in nats, measured in windows as in cards.

        An empty text has log-probability 0.
        """
        scorer = (safe_scorer if self.mode == "safe" else mix_scorer)(self.model)
        texts = [request.args[0] for request in requests]
        scored = [check_text(text).encode() for text in texts if text]
        if not scored:
            return [0.0] * len(texts)
        nats = iter(score_documents(scorer, scored, context=self.model.context).nats_B)
        return [-float(next(nats)) if text else 0.0 for text in texts]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return continuations up to a stop string.

        Raises:
            InteropError: For a setting that is not implemented, of another type, or that leaves no
                room for the prompt; `where` names it.
        """
        return ["".join(self._continue(*request.args)) for request in requests]

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Return tokens_T of both together and how many of them are the continuation's.

        Spaces between the two belong to the continuation: tokens begin with them. As in the
        harness, its tokens are those of both together without as many as the context has. If none
        are left, since a token spans both, it is encoded alone.
        """
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        if not continuation:
            raise InteropError("the continuation is empty", where="request")
        context_T, whole_T = self._encode(context), self._encode(context + continuation)
        continuation_T = whole_T[len(context_T) :]
        if not len(continuation_T):
            continuation_T = self._encode(continuation)[1:]
        n_scored = len(continuation_T)
        if n_scored > self.model.context:
            raise InteropError(
                f"a continuation of {n_scored} tokens, expected at most {self.model.context}, the "
                "context of the model",
                where="request",
            )
        tokens_T = np.concatenate([context_T, continuation_T])
        return tokens_T[-(self.model.context + 1) :], n_scored

    def _encode(self, text: str) -> np.ndarray:
        """Return tokens_T of a text, which may be empty, the begin token first."""
        if not text:
            return np.array([self.model.tokenizer.begin], np.int32)
        return self.model.encode(text)

    def _score(self, pairs: Sequence[tuple[np.ndarray, int]]) -> Iterator[tuple[float, bool]]:
        longest = max(len(tokens_T) for tokens_T, _ in pairs) - 1
        length = min(self.model.context, max(_MIN_LENGTH, 1 << (longest - 1).bit_length()))
        tokens_BT = np.zeros((_BATCH, length + 1), np.int32)
        for i, (tokens_T, _) in enumerate(pairs):
            tokens_BT[i, : len(tokens_T)] = tokens_T
        said_BT, is_likeliest_BT = map(
            np.asarray,
            _score(self.model.parts, tokens_BT[:, :-1], tokens_BT[:, 1:], mode=self.mode),
        )
        for i, (tokens_T, n_scored) in enumerate(pairs):
            end = len(tokens_T) - 1
            here = slice(end - n_scored, end)
            yield (
                float(said_BT[i, here].sum(dtype=np.float64)),
                bool(is_likeliest_BT[i, here].all()),
            )

    def _continue(self, context: str, settings: dict[str, Any]) -> Iterator[str]:
        max_tokens, stops, sampling = _read_settings(settings, self.max_tokens)
        room = self.model.context - max_tokens
        if room <= 0:
            raise InteropError(
                f"{max_tokens} tokens leave no room for the prompt in the context of "
                f"{self.model.context}",
                where="generation_kwargs.max_gen_toks",
                hint=f"set it below {self.model.context} in the task's generation_kwargs",
            )
        tokens_T = self._encode(context)[-room:]
        drawn = continue_tokens(
            self.model.parts,
            self.model.tokenizer,
            tokens_T,
            max_tokens,
            sampling=sampling,
            mode=self.mode,
        )
        for piece in stop_before(to_pieces(drawn, self.model.tokenizer, tokens_T), stops):
            yield piece.text


def _read_settings(settings: Mapping[str, Any], max_tokens: int) -> tuple[int, list[str], Sampling]:
    """Return the greatest number of tokens, the stop strings and how tokens are drawn.

    Args:
        settings: The task's `generation_kwargs`.
        max_tokens: The number of tokens where they have none.

    Raises:
        InteropError: For a setting that is not implemented or of another type.
    """
    left = dict(settings)
    until = left.pop("until", None)
    limits = [left.pop(name, None) for name in _MAX_TOKENS_NAMES]
    max_tokens = next((limit for limit in limits if limit is not None), max_tokens)
    numbers = {name: left.pop(name, None) for name in _NUMBERS}
    is_sampled = left.pop("do_sample", None)
    for name, value in left.items():
        raise InteropError(f"{value!r} is not implemented", where=f"generation_kwargs.{name}")
    stops = [until] if isinstance(until, str) else [] if until is None else until
    checks = {
        "until": (
            isinstance(stops, list | tuple) and all(isinstance(s, str) for s in stops),
            until,
        ),
        "max_gen_toks": (_is_number(max_tokens, int) and max_tokens > 0, max_tokens),
        **{
            name: (value is None or _is_number(value, _NUMBERS[name]), value)
            for name, value in numbers.items()
        },
        "do_sample": (is_sampled in (None, True, False), is_sampled),
    }
    for name, (is_right, value) in checks.items():
        if not is_right:
            raise InteropError(
                f"{value!r}, expected {_EXPECTED[name]}", where=f"generation_kwargs.{name}"
            )
    given = {name: value for name, value in numbers.items() if value is not None}
    if is_sampled is False:
        given["temperature"] = 0.0
    if is_sampled and not given.get("temperature"):
        raise InteropError(
            "sampling at temperature 0",
            where="generation_kwargs.temperature",
            hint="set temperature above 0, or do_sample to false",
        )
    return max_tokens, [stop for stop in stops if stop], Sampling(**given)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_MODES: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "mix": (mix_mode.mix, mix_mode.mix_state),
    "safe": (safe_mode.safe, safe_mode.safe_state),
}


@partial(jax.jit, static_argnames="mode")
def _score(
    parts: Parts, tokens_BT: jax.Array, targets_BT: jax.Array, *, mode: Mode
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of every target, and whether it was the likeliest token."""
    run, state = _MODES[mode]
    scores_BTV, _ = run(parts, tokens_BT, state(parts, tokens_BT.shape[0]))
    log_prob_BTV = jax.nn.log_softmax(scores_BTV)
    said_BT = jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return said_BT, log_prob_BTV.argmax(axis=-1) == targets_BT
