"""The smallest model that has all parts: config, interface, backbone, experts and their words.

jax is imported by the methods that need it and not by this file, so that the tests of packaging
run without it.
"""

import dataclasses

import numpy as np

INTERFACE_FIELDS = {
    "name": "tiny",
    "version": "1.0.0",
    "backbone": "sha256:" + "a" * 64,
    "trunk": "sha256:" + "b" * 64,
    # That of the tokenizer for bytes.
    "tokenizer": "sha256:c58ffe3dd3a75536ffa0e1ebd67098c8c0bafd9cf9c2dd6351beef06cefa0735",
    "class_map": "sha256:" + "d" * 64,
    "anchor": "sha256:" + "e" * 64,
    "vocab_size": 256,
    "n_classes": 256,
    "d_model": 32,
    "d_ff": 64,
    "tap": 1,
    "slots": (1, 2),
    "scout_max_width": 16,
    "lora_max_rank": 8,
    "discount": 0.95,
    "top_k": 2,
    "backbone_prior": 0.5,
    "switch_rate": 0.01,
    "output_bounds": (1e3, 1e3),
}
PUBLIC_WORDS = "the of and to in is that for it as was with be by on not he his but at are this"
PRIVATE_WORDS = "∀x ∃y φ→ψ ⊢A∧B ⊥∨C λz.t Γ,Δ □p ◇q"


def router_of(interface):
    """Return an interface's settings of the router, to publish another backbone with."""
    from composable.interface import RouterSettings

    names = (field.name for field in dataclasses.fields(RouterSettings))
    return RouterSettings(**{name: getattr(interface, name) for name in names})


class Tiny:
    """A byte-level backbone of three layers, and experts that are noisy copies of its bodies.

    Weights come from NumPy, which compiles nothing.
    """

    def __init__(self):
        from composable.interface import RouterInterface
        from composable.model.backbone import Backbone
        from composable.model.config import BackboneConfig

        self.cfg = BackboneConfig(
            vocab_size=256,
            d_model=32,
            n_layers=3,
            n_heads=4,
            n_kv_heads=2,
            d_head=8,
            d_ff=64,
            tap=1,
            context=128,
            scout_width=16,
        )
        self.interface = RouterInterface(**INTERFACE_FIELDS)
        self.backbone: Backbone = self._make_backbone()

    def make_backbone_module(self):
        """Return a freshly initialised backbone, the way training starts."""
        from flax import nnx

        from composable.model.backbone import Backbone

        return Backbone(self.cfg, np.arange(256), 256, rngs=nnx.Rngs(0))

    def _make_backbone(self):
        from composable.model.tensors import from_tensors, shapes_of

        rng = np.random.default_rng(0)
        tensors = {}
        for name, shape in shapes_of(self.make_backbone_module()).items():
            fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
            noise = rng.normal(size=shape).astype(np.float32)
            is_norm = name.endswith("norm")
            tensors[name] = 1 + 0.1 * noise if is_norm else noise * fan_in**-0.5
        tensors["class_map"] = np.arange(256, dtype=np.int32)
        return from_tensors(self.make_backbone_module(), tensors)

    def expert(
        self, name, *, noise=0.3, scout_noise=1.0, kind="ffn", rank=None, width=16, key=None
    ):
        """Return a pluggable expert whose weights depend on its name alone.

        Args:
            name: Its name.
            noise: Size of the change to the backbone's bodies, relative to their own.
            scout_noise: Size of the scout's weights, relative to unit logits.
            kind: Kind of body.
            rank: Rank of a "lora" body.
            width: Hidden width of the scout.
            key: Settles ties; derived from the name by default.
        """
        from flax import nnx

        from composable.model.body import Expert
        from composable.model.model import Pluggable
        from composable.model.tensors import from_tensors, shapes_of, to_tensors

        blank = Expert(self.backbone, kind=kind, rank=rank, scout_width=width, rngs=nnx.Rngs(0))
        seed = int.from_bytes(name.encode(), "big") % 2**32
        rng = np.random.default_rng(seed)
        own = to_tensors(self.backbone)
        tensors = {}
        for tensor, shape in shapes_of(blank).items():
            fan_in = shape[0] if len(shape) > 1 else 1
            change = rng.normal(size=shape).astype(np.float32) * fan_in**-0.5
            if tensor.startswith("scout."):
                tensors[tensor] = scout_noise * change
            elif kind == "ffn":
                _, _, layer, matrix = tensor.split(".")
                tensors[tensor] = own[f"layers.{layer}.ffn.{matrix}"] + noise * change
            else:
                tensors[tensor] = change * noise if tensor.endswith(".b") else change
        expert = from_tensors(blank, tensors)
        return Pluggable(name=name, body=expert.body, scout=expert.scout, key=key or seed or 1)

    def interface_with(self, **changes):
        """Return the interface with some fields changed."""
        return dataclasses.replace(self.interface, **changes)

    def model(self, *experts, capacity=4, **changes):
        """Return a model with these experts, installed in this order."""
        from composable.model.model import Model

        model = Model(self.backbone, self.interface_with(**changes), capacity=capacity)
        for expert in experts:
            model.install(expert)
        return model

    def tokens(self, seed=0, batch=2, length=24):
        """Return random documents, start token first."""
        rng = np.random.default_rng(seed)
        tokens_BT = rng.integers(1, 256, (batch, length), dtype=np.int32)
        tokens_BT[:, 0] = 0
        return tokens_BT

    def text(self, words, seed, length=300):
        """Return `length` characters of random words."""
        rng = np.random.default_rng(seed)
        return " ".join(rng.choice(words.split(), length))[:length]
