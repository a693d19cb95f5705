"""The backbone: a causal transformer cut at the tap into a trunk and an upper part.

The caller supplies the feed-forward function of the upper layers: the backbone's own block, an
expert's body, or a mixture. The same code therefore serves training, single paths and composition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from composable.kernels import Matrix, multiply_transposed, take_rows
from composable.model.config import DTYPE_NAMES, BackboneConfig
from composable.model.layers import (
    CACHE_BLOCK,
    Attention,
    FeedForward,
    KVCache,
    Positions,
    normal,
    ones,
    place_tokens,
    rms_norm,
)
from composable.model.scout import Scout

# (layer index, input BTD) -> output BTD.
FeedForwardFn = Callable[[int, jax.Array], jax.Array]


class Layer(nnx.Module):
    """One transformer layer: attention and feed-forward, with a norm before or after each."""

    def __init__(self, cfg: BackboneConfig, *, rngs: nnx.Rngs | None) -> None:
        self.attention_norm = ones("D", (cfg.d_model,), cfg)
        self.attention = Attention(cfg, rngs=rngs)
        self.ffn_norm = ones("D", (cfg.d_model,), cfg)
        self.ffn = FeedForward(cfg, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self,
        x_BTD: jax.Array,
        feed_forward: Callable[[jax.Array], jax.Array],
        positions: Positions,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run the layer with the given feed-forward.

        Args:
            x_BTD: Residual stream.
            feed_forward: Function that runs in the place of the layer's own.
            positions: Those of the tokens.
            cache: Keys and values so far, when decoding.

        Returns:
            The residual stream, and the cache with these positions written.
        """
        h_BTD = self._norm(x_BTD, self.attention_norm, "before")
        h_BTD, cache = self.attention(h_BTD, positions, cache)
        x_BTD = x_BTD + self._norm(h_BTD, self.attention_norm, "after")
        h_BTD = feed_forward(self._norm(x_BTD, self.ffn_norm, "before"))
        return x_BTD + self._norm(h_BTD, self.ffn_norm, "after"), cache

    def _norm(self, x_BTD: jax.Array, scale_D: nnx.Param[jax.Array], placement: str) -> jax.Array:
        """Normalise where the config says so."""
        if placement != self.cfg.norm_placement:
            return x_BTD
        return rms_norm(x_BTD, scale_D[...], self.cfg.norm_eps)


class Backbone(nnx.Module):
    """A frozen model with the parts that its router interface names: trunk, tap, class map, scout.

    Args:
        cfg: Architecture.
        class_map_V: Class of every token; the identity where there are as many classes as tokens.
        n_classes: Number of classes C.
        rngs: Source of the initial weights; None where only shapes are needed.
    """

    def __init__(
        self,
        cfg: BackboneConfig,
        class_map_V: jax.typing.ArrayLike,
        n_classes: int,
        *,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.cfg = cfg
        shape, scale = (cfg.vocab_size, cfg.d_model), cfg.d_model**-0.5
        self.embed = normal(rngs, "VD", "D", shape, scale, cfg)
        self.layers = nnx.List([Layer(cfg, rngs=rngs) for _ in range(cfg.n_layers)])
        self.norm = ones("D", (cfg.d_model,), cfg)
        if not cfg.is_tied:
            self.unembed = normal(rngs, "VD", "D", shape, scale, cfg)
        self.scout = Scout(cfg.d_model, cfg.scout_width, n_classes, rngs=rngs)
        self.class_map = nnx.Variable(jnp.asarray(class_map_V, jnp.int32))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the backbone's own logits, shape BTV, float32."""
        x_BTD, _ = self.trunk(tokens_BT)
        logits_BTV, _ = self.upper(x_BTD, self.own_feed_forward)
        return logits_BTV

    def own_feed_forward(self, layer: int, x_BTD: jax.Array) -> jax.Array:
        """Run the backbone's own feed-forward block of a layer."""
        return self.layers[layer].ffn(x_BTD)

    def trunk(
        self,
        tokens_BT: jax.Array,
        position: jax.Array | int = 0,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[jax.Array, list[KVCache]]:
        """Run the layers below the tap; their result does not depend on what is installed.

        Args:
            tokens_BT: Token ids.
            position: Position of the first of them.
            caches: One cache per trunk layer, when decoding.

        Returns:
            The residual stream at the tap, shape BTD, and the new caches.
        """
        x_BTD = take_rows(self.embed[...], tokens_BT)
        layers = range(self.cfg.tap)
        x_BTD, caches = self.run_layers(layers, x_BTD, self.own_feed_forward, position, caches)
        # The barrier keeps the compiler from fusing the trunk with its consumers, so that its bits
        # do not depend on what is installed above.
        return jax.lax.optimization_barrier(x_BTD), caches

    def features(self, x_BTD: jax.Array) -> jax.Array:
        """Return the scouts' input, shape BTD float32: the tap's residual stream, normalised."""
        ones_D = jnp.ones(self.cfg.d_model, jnp.float32)
        feature_BTD = rms_norm(x_BTD.astype(jnp.float32), ones_D, self.cfg.norm_eps)
        isolated_BTD: jax.Array = jax.lax.optimization_barrier(feature_BTD)
        return isolated_BTD

    def upper(
        self,
        x_BTD: jax.Array,
        feed_forward: FeedForwardFn,
        position: jax.Array | int = 0,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[jax.Array, list[KVCache]]:
        """Run the layers from the tap on with the given feed-forward, and predict.

        Args:
            x_BTD: Residual stream at the tap.
            feed_forward: Function that runs in every slot.
            position: Position of the first token.
            caches: One cache per upper layer, when decoding.

        Returns:
            Logits, shape BTV float32, and the new caches.
        """
        x_BTD, caches = self.run_layers(self.cfg.slots, x_BTD, feed_forward, position, caches)
        return self.predict(x_BTD), caches

    def predict(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits, shape BTV float32, from the residual stream after the last layer."""
        x_BTD = rms_norm(x_BTD, self.norm[...], self.cfg.norm_eps)
        return multiply_transposed(x_BTD, self.unembedding()).astype(jnp.float32)

    def unembedding(self) -> Matrix:
        """Return the matrix of shape VD that turns the last norm's output into logits."""
        w_VD = self.embed if self.cfg.is_tied else self.unembed
        return w_VD[...]

    def run_layers(
        self,
        layers: Sequence[int],
        x_BTD: jax.Array,
        feed_forward: FeedForwardFn,
        position: jax.Array | int = 0,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[jax.Array, list[KVCache]]:
        """Run some layers with the given feed-forward.

        Args:
            layers: Their indices.
            x_BTD: Residual stream.
            feed_forward: Function that runs in each of them.
            position: Position of the first token.
            caches: One cache per layer, when decoding.

        Returns:
            The residual stream, shape BTD, and the new caches.
        """
        written = []
        positions = place_tokens(self.cfg, x_BTD.shape[1], position)
        for i, index in enumerate(layers):
            cache = None if caches is None else caches[i]
            run = partial(feed_forward, index)
            x_BTD, cache = self.layers[index](x_BTD, run, positions, cache)
            if cache is not None:
                written.append(cache)
        return x_BTD, written

    def empty_caches(self, batch: int, length: int, layers: Sequence[int]) -> list[KVCache]:
        """Return zeroed caches for the given layers, of at least `length` positions."""
        if length > CACHE_BLOCK:
            length = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        shape = (batch, self.cfg.n_kv_heads, length, self.cfg.d_head)
        dtype = DTYPE_NAMES[self.cfg.dtype]
        return [KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in layers]
