"""The trunk's outputs for windows of text, each computed once.

No expert has parameters below the tap, so these outputs serve every set of installed experts. They
are the bits that a whole pass of the model computes: the model keeps its trunk apart from what
follows.

Deliberately not here: files; `workflows/trunk_cache.py` keeps outputs on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal

import jax
import numpy as np

from composable.model.backbone import Backbone

# What can be asked for: the residual stream at the tap, or the scouts' input.
Output = Literal["tap", "features"]
# Outputs kept in memory: those of public text and of one expert's own.
_KEPT: Final = 16


class Trunk:
    """A backbone's trunk, which remembers its last outputs.

    Args:
        backbone: The frozen model.

    Attributes:
        n_passes: How often the trunk ran.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.n_passes = 0
        self._outputs: OrderedDict[tuple[Output, bytes], jax.Array] = OrderedDict()

    def tap(self, tokens_BT: np.ndarray) -> jax.Array:
        """Return the residual stream at the tap, shape BTD.

        Args:
            tokens_BT: Tokens of one window.
        """
        return self._remember("tap", tokens_BT)

    def features(self, tokens_BT: np.ndarray) -> jax.Array:
        """Return the scouts' input, shape BTD float32.

        Args:
            tokens_BT: Tokens of one window.
        """
        return self._remember("features", tokens_BT)

    def compute(self, output: Output, tokens_BT: np.ndarray) -> jax.Array:
        """Run the trunk."""
        self.n_passes += 1
        return _PROGRAMS[output](self.backbone, tokens_BT)

    def _remember(self, output: Output, tokens_BT: np.ndarray) -> jax.Array:
        key = (output, tokens_BT.tobytes())
        if key not in self._outputs:
            self._outputs[key] = self.compute(output, tokens_BT)
            while len(self._outputs) > _KEPT:
                self._outputs.popitem(last=False)
        self._outputs.move_to_end(key)
        return self._outputs[key]


@jax.jit
def _tap(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return x_BTD


# Not from the residual stream of `_tap`: as an argument of the program it would round differently.
@jax.jit
def _features(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return backbone.features(x_BTD)


_PROGRAMS: Final[dict[Output, Callable[[Backbone, np.ndarray], jax.Array]]] = {
    "tap": _tap,
    "features": _features,
}
