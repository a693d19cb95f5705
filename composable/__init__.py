"""composable: experts that never met, plugged together.

    import composable as cx
    model = cx.load("tiny-bytes", experts=["python-code>=1.0", "set-mm"])
    logits_BTV = model(tokens_BT)
    weights_BTE = model.route(tokens_BT)
    text = cx.generate(model, "def main(")

Names are imported when they are first used, so that `composable.packaging` and the command line
start without jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composable.assembly.load import expert, load
    from composable.errors import ComposableError
    from composable.interface import RouterInterface
    from composable.model.model import Model, generate

__version__ = "0.2.0"
__all__ = ["ComposableError", "Model", "RouterInterface", "expert", "generate", "load"]

_HOME_OF = {
    "ComposableError": "errors",
    "Model": "model.model",
    "RouterInterface": "interface",
    "expert": "assembly.load",
    "generate": "model.model",
    "load": "assembly.load",
}


def __getattr__(name: str) -> object:
    """Import the file that holds a public name."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
