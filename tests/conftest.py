"""Fixtures of all tests: an empty home for each test, and one tiny model with all its parts.

jax is imported by the fixtures that need it and not by this file, so that the tests of packaging
run without it.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

from tests.support.checkpoints import CHECKPOINT_CONFIGS, checkpoint_shapes, save_checkpoint
from tests.support.tiny import PRIVATE_WORDS, PUBLIC_WORDS, Tiny, router_of

# Programs that one test compiled are read back by the others, by other workers and by later runs.
# An environment that sets its own folder keeps it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Tests compile many small programs and run each a few times, so by default they compile quickly:
# with few optimisations, and on CPUs with XLA's older code generator, which takes a third as long,
# in one piece, which takes a fifth less where all cores have workers.
# With JAX_DISABLE_MOST_OPTIMIZATIONS=0 they compile as users do.
QUICK_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_FLAGS))

# Fixtures that train.
TRAINED = {"loaded", "trained_folder"}
# What tests marked `parity` need: libraries that `make parity` installs apart.
APART = ("torch", "transformers", "peft", "lm_eval", "libtpu")


def pytest_configure(config):
    """Let all workers, and the processes that tests start, use native kernels compiled once.

    They would be compiled in every test's empty home, for ten seconds of two cores.
    """
    if hasattr(config, "workerinput") or "COMPOSABLE_KERNELS" in os.environ:
        return
    find = "from composable.kernels import load_native; print(load_native().library or 'portable')"
    cache = Path(__file__).parents[1] / ".cache"
    done = subprocess.run(
        [sys.executable, "-c", find],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    os.environ["COMPOSABLE_KERNELS"] = done.stdout.strip()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark every test of a trained model as slow, before `-m` chooses; skip those for `parity`."""
    missing = [name for name in APART if importlib.util.find_spec(name) is None]
    for item in items:
        if TRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if missing and item.get_closest_marker("parity"):
            reason = f"needs {', '.join(missing)}; run `make parity`"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Let the garbage collector leave alone what was imported, and look less often.

    It takes a seventh of the time of tests that trace programs, which make many small objects.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


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
    """Return the smallest model that has all parts: config, interface, backbone and experts."""
    return Tiny()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Return a function that makes a folder once in a run, for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make_once(name, make):
        """Return folder `name`, filled by `make(folder)` unless another worker has filled it."""
        folder, done = shared / name, shared / f"{name}.done"
        with filelock.FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_once


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


@pytest.fixture(scope="session")
def loaded(tiny, made_once):
    """Return a tiny backbone trained on some public text, as a package on disk."""
    from composable.assembly.backbones import load_backbone

    folder = made_once("backbones", lambda folder: _train_backbone(tiny, folder / "tiny"))
    return load_backbone(str(folder / "tiny"))


def _train_backbone(tiny, folder):
    """Train the backbone of `tiny` for a few steps and write its package."""
    from flax import nnx

    from composable.assembly.backbones import save_backbone
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
    save_backbone(
        folder,
        nnx.merge(graph, fitted.trained, rest),
        name="tiny",
        version="1.0.0",
        anchor=anchor,
        router=router_of(tiny.interface),
        output_bounds=tiny.interface.output_bounds,
        texts={"README.md": "A tiny backbone.\n"},
        description="For tests.",
        license_="Apache-2.0",
    )


@pytest.fixture(scope="module")
def one_scout_pass():
    """Let scouts read their text once and not twenty times, where no test asks how well they do."""
    from composable.workflows import trunk_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk_cache, "_SCOUT_PASSES", (1, 1))
        yield


@pytest.fixture
def write_checkpoint(tmp_path, subwords):
    """Return a function that writes a checkpoint of a family and returns its folder and tensors."""

    def write(family, *, shards=1, dtype=np.float32, **changes):
        config = {**CHECKPOINT_CONFIGS[family], **changes}
        rng = np.random.default_rng(0)
        tensors = {}
        for name, shape in checkpoint_shapes(config).items():
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
        save_checkpoint(folder, tensors, shards)
        return folder, tensors

    return write


@pytest.fixture(scope="session")
def save():
    """Return the function that writes tensors into a folder."""
    return save_checkpoint


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
def trained_folder(loaded, tiny, made_once):
    """Return the folder of a trained and vetted expert of private text; copy it to change it."""
    return made_once("experts", lambda folder: _train_expert(loaded, tiny, folder)) / "logic"


def _train_expert(loaded, tiny, parent):
    """Train and vet the expert "logic" in a folder of that name."""
    from composable.corpora.documents import Document, write_documents
    from composable.training.config import TrainConfig
    from composable.workflows.train import train_expert
    from composable.workflows.vet import check_expert

    folder = parent / "logic"
    folder.mkdir()
    (folder / "expert.toml").write_text(EXPERT_TOML.format(name="logic"))
    (folder / "README.md").write_text("An expert.\n")
    texts = parent / "logic.jsonl"
    documents = [
        Document(f"private/{i}", tiny.text(PRIVATE_WORDS, seed=i, length=200)) for i in range(30)
    ]
    write_documents(texts, documents)
    cfg = TrainConfig(steps=60, batch_size=8, window=32, learning_rate=1e-2)
    train_expert(loaded, folder, [texts], cfg)
    check_expert(loaded, folder)
