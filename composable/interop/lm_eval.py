"""A composed model as a model of lm-evaluation-harness, so that its tasks run unchanged.

    import composable as cx
    import lm_eval
    from composable.interop.lm_eval import ComposableLM

    lm_eval.simple_evaluate(ComposableLM(cx.load(experts=["legal"])), tasks=["my_task"])

Importing this file needs the `lm_eval` library; nothing else of composable does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import InteropError
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.composed import Parts
from composable.model.decoding import Mode, Sampling, continue_tokens
from composable.model.model import Model
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


class ComposableLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """A model with the interface of the harness.

    Every text begins with the model's begin token. A text that does not fit the context is cut at
    its start, as the harness expects; the begin token is kept. Continuations take the settings
    `until`, `max_gen_toks`, `do_sample` and those of `Sampling` except the seed; without a
    `temperature` they are greedy.

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
        """Return the log-probabilities of whole texts, in nats, measured in windows as in cards."""
        scorer = (safe_scorer if self.mode == "safe" else mix_scorer)(self.model)
        texts = [request.args[0].encode() for request in requests]
        score = score_documents(scorer, texts, context=self.model.context)
        return [-float(nats) for nats in score.nats_B]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return continuations up to a stop string.

        Raises:
            InteropError: For a setting that is not implemented; `where` names it.
        """
        return ["".join(self._continue(*request.args)) for request in requests]

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Return tokens_T of both together and how many of them are the continuation's.

        Spaces between the two belong to the continuation: tokens begin with them.
        """
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole_T = self.model.encode(context + continuation)
        n_context = len(self.model.encode(context)) if context else 1
        n_scored = len(whole_T) - n_context
        return self._fit(whole_T, self.model.context + 1), min(n_scored, self.model.context)

    def _fit(self, tokens_T: np.ndarray, length: int) -> np.ndarray:
        """Return the begin token and the last tokens of a text that is too long."""
        if len(tokens_T) <= length:
            return tokens_T
        return np.concatenate([tokens_T[:1], tokens_T[len(tokens_T) - length + 1 :]])

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
        settings = dict(settings)
        until = settings.pop("until", [])
        max_tokens = int(settings.pop("max_gen_toks", self.max_tokens))
        is_sampled = settings.pop("do_sample", True)
        temperature = float(settings.pop("temperature", 0.0) or 0.0)
        sampling = Sampling(
            temperature=temperature if is_sampled else 0.0,
            top_k=int(settings.pop("top_k", 0) or 0),
            top_p=float(settings.pop("top_p", 1.0)),
            min_p=float(settings.pop("min_p", 0.0) or 0.0),
            repetition_penalty=float(settings.pop("repetition_penalty", 1.0)),
        )
        for name, value in settings.items():
            raise InteropError(f"{value!r} is not implemented", where=f"generation_kwargs.{name}")
        max_tokens = min(max_tokens, self.model.context - 1)
        tokens_T = self.model.encode(context) if context else np.array([self.model.tokenizer.begin])
        tokens_T = self._fit(tokens_T, self.model.context - max_tokens)
        drawn = continue_tokens(
            self.model.parts,
            self.model.tokenizer,
            tokens_T,
            max_tokens,
            sampling=sampling,
            mode=self.mode,
        )
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        for piece in stop_before(to_pieces(drawn, self.model.tokenizer, tokens_T), stops):
            yield piece.text


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
