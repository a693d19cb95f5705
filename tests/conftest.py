"""What all tests share: nothing of the user's is touched, and one tiny model with all its parts.

jax is imported by the fixtures that need it and not by this file, so that the tests of packaging
run without it.
"""

import dataclasses
import json

import numpy as np
import pytest

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


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory, monkeypatch):
    """Point every place that composable keeps things in at an empty folder."""
    home = tmp_path_factory.mktemp("home")
    for variable in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("COMPOSABLE_STORE", str(home / "store"))
    monkeypatch.delenv("COMPOSABLE_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def tiny():
    """Return the smallest world that has all parts: config, interface, backbone and experts."""
    return Tiny()


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
        for name, shape in shapes_of(self.make_backbone_module).items():
            fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
            noise = rng.normal(size=shape).astype(np.float32)
            is_norm = name.endswith("norm")
            tensors[name] = 1 + 0.1 * noise if is_norm else noise * fan_in**-0.5
        tensors["class_map"] = np.arange(256, dtype=np.int32)
        return from_tensors(self.make_backbone_module, tensors)

    def expert(
        self, name, *, noise=0.3, scout_noise=1.0, kind="ffn", rank=None, width=16, key=None
    ):
        """Return a pluggable expert whose weights hang on its name alone.

        Args:
            name: Its name.
            noise: Size of the change to the backbone's bodies, relative to their own.
            scout_noise: Size of the scout's weights, relative to unit logits.
            kind: Kind of body.
            rank: Rank of a "lora" body.
            width: Hidden width of the scout.
            key: What settles ties; by default taken from the name.
        """
        from flax import nnx

        from composable.model.body import Expert
        from composable.model.model import Pluggable
        from composable.model.tensors import from_tensors, shapes_of, to_tensors

        def make():
            return Expert(self.backbone, kind=kind, rank=rank, scout_width=width, rngs=nnx.Rngs(0))

        seed = int.from_bytes(name.encode(), "big") % 2**32
        rng = np.random.default_rng(seed)
        own = to_tensors(self.backbone)
        tensors = {}
        for tensor, shape in shapes_of(make).items():
            fan_in = shape[0] if len(shape) > 1 else 1
            change = rng.normal(size=shape).astype(np.float32) * fan_in**-0.5
            if tensor.startswith("scout."):
                tensors[tensor] = scout_noise * change
            elif kind == "ffn":
                _, _, layer, matrix = tensor.split(".")
                tensors[tensor] = own[f"layers.{layer}.ffn.{matrix}"] + noise * change
            else:
                tensors[tensor] = change * noise if tensor.endswith(".b") else change
        expert = from_tensors(make, tensors)
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
        """Return random documents, begin token first."""
        rng = np.random.default_rng(seed)
        tokens_BT = rng.integers(1, 256, (batch, length), dtype=np.int32)
        tokens_BT[:, 0] = 0
        return tokens_BT

    def text(self, words, seed, length=300):
        """Return `length` characters of random words."""
        rng = np.random.default_rng(seed)
        return " ".join(rng.choice(words.split(), length))[:length]


@pytest.fixture(scope="session")
def subwords():
    """Return a byte-level BPE tokenizer of 600 tokens, trained on a few words here and now."""
    tokenizers = pytest.importorskip("tokenizers")
    from composable.model.subwords import SubwordTokenizer

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [f"{PUBLIC_WORDS} {PRIVATE_WORDS} quick brown foxes, naïve Füße"] * 3, trainer
    )
    return SubwordTokenizer(bpe.to_str(), begin="<|begin|>", ends=["<|end|>"])


PUBLIC_WORDS = "the of and to in is that for it as was with be by on not he his but at are this"
PRIVATE_WORDS = "∀x ∃y φ→ψ ⊢A∧B ⊥∨C λz.t Γ,Δ □p ◇q"


@pytest.fixture(scope="session")
def loaded(tiny, tmp_path_factory):
    """Return a tiny backbone that has read some public text, as a package on disk."""
    from flax import nnx

    from composable.assembly.backbones import load_backbone, save_backbone
    from composable.corpora.documents import Document
    from composable.model.tokenizer import ByteTokenizer
    from composable.training.config import TrainConfig
    from composable.training.data import batches, token_stream
    from composable.training.loop import fit
    from composable.training.objectives import backbone_objective

    train, anchor = (
        [Document(f"public/{i}", tiny.text(PUBLIC_WORDS, seed=i)) for i in numbers]
        for numbers in (range(30), range(30, 32))
    )
    graph, params, rest = nnx.split(tiny.backbone, nnx.Param, ...)
    cfg = TrainConfig(steps=60, batch_size=8, window=32, learning_rate=1e-2)
    data = batches(token_stream(train, ByteTokenizer()), window=32, batch_size=8, seed=0)
    fitted = fit(backbone_objective(graph), params, rest, data, cfg)
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    save_backbone(
        folder,
        nnx.merge(graph, fitted.trained, rest),
        name="tiny",
        version="1.0.0",
        anchor=anchor,
        router={
            name: INTERFACE_FIELDS[name]
            for name in ("discount", "top_k", "backbone_prior", "switch_rate", "output_bounds")
        }
        | {"scout_max_width": 16, "lora_max_rank": 8},
        texts={"README.md": "A tiny backbone.\n"},
        description="For tests.",
        license_="Apache-2.0",
    )
    return load_backbone(str(folder))


# Small checkpoints as other tools write them. Names and shapes are spelt out here a second time, on
# purpose: the tables under test are not asked.
CONFIG = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "torch_dtype": "float32",
}
CONFIGS = {
    "llama": {**CONFIG, "model_type": "llama", "mlp_bias": False},
    "smollm": {
        **CONFIG,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "is_llama_config": True,
        "rope_interleaved": False,
    },
    "qwen3": {**CONFIG, "model_type": "qwen3", "head_dim": 16, "use_sliding_window": False},
    "olmo2": {**CONFIG, "model_type": "olmo2"},
}


def shapes(config):
    """Return names and shapes of a checkpoint, as transformers lays them out."""
    d, f = config["hidden_size"], config["intermediate_size"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    h = config.get("head_dim", d // n)
    names = {
        "self_attn.q_proj": (n * h, d),
        "self_attn.k_proj": (k * h, d),
        "self_attn.v_proj": (k * h, d),
        "self_attn.o_proj": (d, n * h),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "post_attention_layernorm": (d,),
    }
    if config["model_type"] == "olmo2":
        names |= {
            "post_feedforward_layernorm": (d,),
            "self_attn.q_norm": (n * h,),
            "self_attn.k_norm": (k * h,),
        }
    else:
        names["input_layernorm"] = (d,)
    if config["model_type"] == "qwen3":
        names |= {"self_attn.q_norm": (h,), "self_attn.k_norm": (h,)}
    whole = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        whole["lm_head.weight"] = (config["vocab_size"], d)
    layers = range(config["num_hidden_layers"])
    return whole | {
        f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in names.items()
    }


@pytest.fixture
def write_checkpoint(tmp_path, subwords):
    """Return a function that writes a checkpoint of a family and returns its folder and tensors."""

    def write(family, *, shards=1, dtype=np.float32, **changes):
        config = {**CONFIGS[family], **changes}
        rng = np.random.default_rng(0)
        tensors = {}
        for name, shape in shapes(config).items():
            noise = rng.normal(size=shape)
            is_norm = name.endswith("norm.weight")
            tensors[name] = (1 + 0.1 * noise if is_norm else 0.2 * noise).astype(dtype)
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        definition, _ = subwords.to_files()
        (folder / "tokenizer.json").write_text(definition)
        special = {"bos_token": "<|begin|>", "add_bos_token": True, "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        _save(folder, tensors, shards)
        return folder, tensors

    return write


@pytest.fixture(scope="session")
def save():
    """Return the function that writes tensors into a folder."""
    return _save


def _save(folder, tensors, shards=1):
    """Write tensors in one file, or in several with an index."""
    import safetensors.numpy

    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    files = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, folder / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


EXPERT_TOML = """
[expert]
name = "{name}"
version = "1.0.0"
description = "For tests."
license = "Apache-2.0"
backbone = "tiny"

[interface]
name = "tiny"
requires = "^1.0"

[body]
kind = "ffn"
dtype = "F32"

[scout]
width = 16
"""


@pytest.fixture(scope="session")
def trained_folder(loaded, tiny, tmp_path_factory):
    """Return the folder of a trained and vetted expert of private text; copy it to change it."""
    from composable.corpora.documents import Document, write_documents
    from composable.training.config import TrainConfig
    from composable.workflows.train import train_expert
    from composable.workflows.vet import check_expert

    folder = tmp_path_factory.mktemp("experts") / "logic"
    folder.mkdir()
    (folder / "expert.toml").write_text(EXPERT_TOML.format(name="logic"))
    (folder / "README.md").write_text("An expert.\n")
    texts = folder.parent / "logic.jsonl"
    documents = [
        Document(f"private/{i}", tiny.text(PRIVATE_WORDS, seed=i, length=200)) for i in range(30)
    ]
    write_documents(texts, documents)
    cfg = TrainConfig(steps=60, batch_size=8, window=32, learning_rate=1e-2)
    train_expert(loaded, folder, [texts], cfg)
    check_expert(loaded, folder)
    return folder
