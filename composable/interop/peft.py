"""PEFT adapters: convert a config and a tensor file into a low-rank body, or reject them.

Nothing is trained here. What PEFT computes with an adapter, `W x + s B (A x)` for some modules, is
what a low-rank body computes, `x (W + a b)`, with the scale folded into `b`. An adapter that
does more than that, or changes modules without a slot, is rejected, naming the field or module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from composable.errors import InteropError
from composable.files.blobs import digest_file
from composable.files.safetensors import MAX_TENSORS
from composable.interface.contract import SLOT_DIMS
from composable.interop.families import family_of, rows_of
from composable.interop.huggingface import open_tensors
from composable.interop.limited_process import StoppedError
from composable.interop.patterns import Groups, match_patterns
from composable.interop.source import StoredTensor
from composable.interop.tables import Count, Finite, Index, Schema, read_json
from composable.model.config import BackboneConfig

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

# Fields that must have one of some values, because others change what is computed.
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    **dict.fromkeys(
        (
            "modules_to_save",
            "target_parameters",
            "trainable_token_indices",
            "layer_replication",
            "alora_invocation_tokens",
            "megatron_config",
        ),
        (None, [], {}),
    ),
    **dict.fromkeys(
        (
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "use_bdlora",
            "velora_config",
        ),
        (None, False),
    ),
    # The ways to begin that leave the backbone's weights alone. Others (pissa, olora, corda, loftq,
    # lora_ga) subtract something from them, and the adapter means nothing without that.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
}
_HINTS: Final = {
    "init_lora_weights": "PEFT writes a plain adapter of pissa, olora and corda if "
    "save_pretrained is given path_initial_model_for_weight_conversion",
    "lora_bias": "train the adapter with lora_bias=False: an expert carries no biases",
    "modules_to_save": "train without them: an expert carries no modules but its bodies",
}
# A manifest records the base model with its revision, in 500 characters.
_SHORT = Annotated[str, msgspec.Meta(max_length=99)] | None
_NAMES = str | list[str] | None
# Fields that `read_adapter` follows.
_TYPES: Final[dict[str, Any]] = {
    "r": Count,
    "lora_alpha": Finite,
    # Which biases of the model were trained; whether it has any, the tensors say.
    "bias": Literal["none", "all", "lora_only"] | None,
    "use_rslora": bool | None,
    "rank_pattern": dict[str, Count] | None,
    "alpha_pattern": dict[str, Finite] | None,
    "target_modules": str | list[str],
    "exclude_modules": _NAMES,
    "layers_to_transform": Index | list[Index] | None,
    "layers_pattern": _NAMES,
    "base_model_name_or_path": Annotated[str, msgspec.Meta(max_length=400)] | None,
    "revision": _SHORT,
    "peft_version": _SHORT,
}
# Fields that matter to training, or only together with a field above. `fan_in_fan_out` is about
# layers that store their matrix the other way round; PEFT itself ignores it for those of Llama.
_IGNORED: Final = frozenset(
    {
        *("auto_mapping", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core"),
        *("runtime_config", "qalora_group_size", "ensure_weight_tying", "lora_ga_config"),
        *("loftq_config", "eva_config", "corda_config"),
    }
)
_SCHEMA: Final = Schema(
    types=_TYPES,
    only=_ONLY,
    ignored=_IGNORED,
    # Newer versions write their new fields into every config, switched off.
    is_off=lambda value: value in (None, False, {}, [], ""),
    changes="what the adapter computes",
    hints=_HINTS,
)
_TENSOR: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Parts that a wrapper around a model puts into the names of its tensors.
_WRAPPERS: Final = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "data parallelism",
}
# The name of the adapter, which a model's own `state_dict` has before the last part.
_NAMED: Final = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.weight$)")
_SAVE: Final = "load it with PEFT where it was trained, and save it with save_pretrained"
# Length limit of a regular expression in a config.
_MAX_PATTERN: Final = 500
_ALL_LINEAR: Final = "all-linear"
# Fields that hold regular expressions, each with what PEFT puts around one.
_IN_LAYER: Final = r"(?:^|.*?\.){}\.(?P<index>\d+)\..*"
_WITHIN: Final = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": _IN_LAYER,
    "rank_pattern": r"(.*\.)?({})",
    "alpha_pattern": r"(.*\.)?({})",
}
_LAYER: Final = re.compile(_IN_LAYER.replace("{}", "[^.]*"))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that can be converted into a low-rank body.

    Args:
        base: The name that it gives its base model.
        revision: Revision of the base model, if stated.
        version: Version of PEFT that wrote it, if stated.
        config_digest: Digest of its config.
        weights_digest: Digest of its tensors.
        rank: The largest rank of any of its changes.
        changes: The product `a b` for every (layer, matrix) that it changes; scale in `b`.
    """

    base: str
    revision: str | None
    version: str | None
    config_digest: str
    weights_digest: str
    rank: int
    changes: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]

    def body(self, cfg: BackboneConfig) -> dict[str, np.ndarray]:
        """Return the tensors of a low-rank body of this rank.

        Matrices that the adapter does not change are zero; those of lower rank are padded with
        zeros, which add nothing.
        """
        sizes = {"D": cfg.d_model, "F": cfg.d_ff}
        tensors = {}
        for layer in cfg.slots:
            for matrix, dims in SLOT_DIMS.items():
                rows, columns = list(dims)
                name = f"slots.{layer}.{matrix}"
                a = np.zeros((sizes[rows], self.rank), np.float32)
                b = np.zeros((self.rank, sizes[columns]), np.float32)
                if (layer, matrix) in self.changes:
                    own_a, own_b = self.changes[layer, matrix]
                    a[:, : own_a.shape[1]], b[: own_b.shape[0]] = own_a, own_b
                tensors[f"{name}.a"], tensors[f"{name}.b"] = a, b
        return tensors


def read_adapter(folder: Path, cfg: BackboneConfig) -> Adapter:
    """Read an adapter for a backbone of a known family.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        cfg: The backbone's architecture.

    Raises:
        InteropError: If the body would compute something else than the adapter; `where` names the
            field or the file.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights_path.is_file() and (folder / "adapter_model.bin").is_file():
        raise InteropError(
            f"there is no {WEIGHTS_FILE}, only adapter_model.bin, which may run code when it is "
            "read",
            where=str(folder),
            hint="load it with PEFT where you trust it, and save it as safetensors",
        )
    config = read_json(config_path)
    _check_config(config)
    tensors = dict(open_tensors(weights_path))
    modules = _modules(cfg)
    pairs = _pair(tensors, weights_path)
    _require_slots(pairs, modules, cfg, weights_path)
    patterns = _Patterns(config, sorted(modules))
    _require_what_config_says(pairs, modules, config, patterns, weights_path)
    changes = {}
    for module, (stored_a, stored_b) in sorted(pairs.items()):
        rank, scale = _rank_and_scale(config, module, patterns)
        _, *place = modules[module].split(".")  # layers.{i}.ffn.{matrix}
        layer, matrix = int(place[0]), place[2]
        sizes = {"D": cfg.d_model, "F": cfg.d_ff}
        n_in, n_out = (sizes[letter] for letter in SLOT_DIMS[matrix])
        for stored, part, shape in ((stored_a, "A", (rank, n_in)), (stored_b, "B", (n_out, rank))):
            if stored.shape != shape:
                raise InteropError(
                    f"tensor '{module}.lora_{part}' has shape {list(stored.shape)}, expected "
                    f"{list(shape)}: rank {rank} by the config, the rest by the backbone",
                    where=str(weights_path),
                    hint="the adapter belongs to another model, or the config to another adapter",
                )
        a = np.ascontiguousarray(stored_a.read().astype(np.float32).T)
        b = np.ascontiguousarray((stored_b.read().astype(np.float64) * scale).T.astype(np.float32))
        changes[layer, matrix] = (a, b)
    return Adapter(
        base=str(config.get("base_model_name_or_path") or ""),
        revision=config.get("revision"),
        version=config.get("peft_version"),
        config_digest=digest_file(config_path),
        weights_digest=digest_file(weights_path),
        rank=max(b.shape[0] for _, b in changes.values()),
        changes=changes,
    )


def _check_config(config: Mapping[str, Any]) -> None:
    """Reject fields that are unknown, of another type, or require what a body cannot do."""
    required = {name: config.get(name) for name in ("peft_type", "r", "lora_alpha")}
    _SCHEMA.check({**config, **required}, f"{CONFIG_FILE}: ")


def _modules(cfg: BackboneConfig) -> dict[str, str]:
    """Return every matrix of the model by the name of its module: our name for it."""
    return {
        row.theirs.removesuffix(".weight"): row.ours
        for row in rows_of(family_of(cfg), cfg)
        if "norm" not in row.ours
    }


def _pair(
    tensors: Mapping[str, StoredTensor], path: Path
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Return the two tensors of every module that is adapted."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or set(match["module"].split(".")) & _WRAPPERS.keys():
            raise InteropError(
                f"tensor {name!r} of shape {list(stored.shape)} is none of a plain LoRA, expected "
                "base_model.model.MODULE.lora_A.weight and lora_B.weight",
                where=str(path),
                hint=_explain_name(name),
            )
        if 0 in stored.shape:
            raise InteropError(
                f"tensor {name!r} is empty, of shape {list(stored.shape)}",
                where=str(path),
                hint="DeepSpeed ZeRO-3 leaves this where the weights are in parts: gather them "
                "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py) and save again",
            )
        parts.setdefault(match["module"], {})[match["part"]] = stored
    for module, found in parts.items():
        for part in "AB":
            if part not in found:
                raise InteropError(
                    f"tensor 'base_model.model.{module}.lora_{part}.weight' is missing",
                    where=str(path),
                )
    if not parts:
        raise InteropError(
            "there are no tensors",
            where=str(path),
            hint=f"the adapter was saved without its weights; {_SAVE}",
        )
    return {module: (found["A"], found["B"]) for module, found in parts.items()}


def _explain_name(name: str) -> str | None:
    """Return how to come by a tensor's proper name, if it is known what changed it."""
    parts = name.split(".")
    found = [part for part in parts if part in _WRAPPERS]
    plain = ".".join(part for part in parts if part not in _WRAPPERS)
    if found:
        return (
            f"{found[0]!r} was added by {_WRAPPERS[found[0]]}, and PEFT would ignore such tensors: "
            f"remove it from the names, or save the adapter from the model inside"
        )
    if name.endswith(".bias"):
        return "train the adapter with bias='none' and lora_bias=False: an expert carries no biases"
    plain = _NAMED.sub("", plain)
    if plain != name:
        return (
            "these are names of a state_dict, which PEFT would ignore: rename them like "
            f"{plain!r}, or save the adapter with save_pretrained"
        )
    if ".lora_" in name and not name.startswith("base_model.model."):
        return f"the names have lost their beginning, base_model.model.; {_SAVE}"
    return None


def _require_slots(
    adapted: Collection[str], modules: Mapping[str, str], cfg: BackboneConfig, path: Path
) -> None:
    """Reject an adapter of modules that have no slot."""
    slots = {f"layers.{layer}.ffn.{matrix}" for layer in cfg.slots for matrix in SLOT_DIMS}
    lost = sorted(module for module in adapted if modules.get(module) not in slots)
    if not lost:
        return
    below = [module for module in lost if ".ffn." in modules.get(module, "")]
    why = "all below the tap" if len(below) == len(lost) else "where no body plugs in"
    first, last = cfg.slots[0], cfg.slots[-1]
    mlp = ", ".join(sorted({m.rsplit(".", 1)[1] for m, ours in modules.items() if ".ffn." in ours}))
    raise InteropError(
        f"{len(lost)} of {len(adapted)} adapted modules cannot be carried, {why}: "
        f"{', '.join(lost)}",
        where=str(path),
        hint=f"train the adapter with target_modules [{mlp}] and layers_to_transform {first} to "
        f"{last}: there the feed-forward blocks are slots",
    )


class _Patterns:
    """The regular expressions of a config, matched against all modules.

    Args:
        config: The config, its types checked.
        modules: The names of all modules.

    Raises:
        InteropError: For one that is malformed, too long or too slow; `where` names the field.
    """

    def __init__(self, config: Mapping[str, Any], modules: Sequence[str]) -> None:
        self._found: dict[tuple[str, str], Mapping[str, Groups]] = {}
        for field, within in _WITHIN.items():
            value = config.get(field) or ()
            is_list = isinstance(value, list) and field.endswith("_modules")
            if is_list or value == _ALL_LINEAR:
                continue
            patterns = [value] if isinstance(value, str) else list(value)
            for pattern, found in zip(
                patterns, _match_all(field, patterns, modules, within), strict=True
            ):
                self._found[field, pattern] = found

    def match(self, field: str, pattern: str, module: str) -> Groups | None:
        """Return the groups of a module's match with a pattern of a field; None without one."""
        return self._found[field, pattern].get(module)


def _match_all(
    field: str, patterns: Sequence[str], modules: Sequence[str], within: str
) -> list[dict[str, Groups]]:
    """Return the modules that match each expression of a field."""
    where = f"{CONFIG_FILE}: {field}"
    longest = max(map(len, patterns), default=0)
    if longest > _MAX_PATTERN or len(patterns) > MAX_TENSORS:
        raise InteropError(
            f"{len(patterns):,} patterns of up to {longest:,} characters, expected at most "
            f"{MAX_TENSORS:,} of {_MAX_PATTERN}",
            where=where,
        )
    try:
        return match_patterns(patterns, modules, within)
    except ValueError as error:
        raise InteropError(str(error), where=where) from error
    except StoppedError as error:
        raise InteropError(
            f"matching this regular expression was {error}",
            where=where,
            hint="name the modules instead, or repeat nothing that repeats, as (a+)+ does",
        ) from error


def _require_what_config_says(
    adapted: Collection[str],
    modules: Mapping[str, str],
    config: Mapping[str, Any],
    patterns: _Patterns,
    path: Path,
) -> None:
    """Reject a config and tensors of different modules: PEFT would load something else.

    A module that the config lists and that has no tensors would keep its initial weights; tensors
    of a module that it does not list would be ignored.
    """
    for module in modules:
        if modules[module] == "embed" and module not in adapted:
            continue  # no linear layer; only named on purpose, and then it has tensors of its own
        is_asked = _is_targeted(config, module, patterns)
        if is_asked and module not in adapted:
            raise InteropError(
                f"tensors of {module!r} are missing, which target_modules asks for",
                where=str(path),
            )
        if module in adapted and not is_asked:
            raise InteropError(
                f"tensors of {module!r} are there, which target_modules does not ask for, nor "
                "layers_to_transform",
                where=str(path),
            )


def _is_targeted(config: Mapping[str, Any], module: str, patterns: _Patterns | None = None) -> bool:
    """Return whether PEFT adapts a module."""
    patterns = patterns or _Patterns(config, [module])
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not isinstance(targets, str | list) or not targets:
        raise InteropError(f"{targets!r} names no modules", where=f"{CONFIG_FILE}: target_modules")
    if excluded and _names(excluded, patterns, module, "exclude_modules"):
        return False
    if targets == _ALL_LINEAR:
        return module != "lm_head"
    if isinstance(targets, str) or module in targets:
        return _names(targets, patterns, module, "target_modules")
    if not _names(targets, patterns, module, "target_modules"):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    index = _layer_of(config.get("layers_pattern"), patterns, module)
    return index == layers if isinstance(layers, int) else index in layers


def _names(targets: str | list[str], patterns: _Patterns, module: str, field: str) -> bool:
    """Return whether a module matches a regular expression, or a name or the end of a name."""
    if isinstance(targets, str):
        return patterns.match(field, targets, module) is not None
    return module in targets or any(module.endswith(f".{target}") for target in targets)


def _layer_of(layers: str | list[str] | None, patterns: _Patterns, module: str) -> int | None:
    """Return the number of a module's layer, which follows the name of the list of layers."""
    if not layers:
        found = _LAYER.fullmatch(module)
        return int(found["index"]) if found else None
    for pattern in [layers] if isinstance(layers, str) else layers:
        groups = patterns.match("layers_pattern", pattern, module)
        if groups is not None and groups["index"] is not None:
            return int(groups["index"])
    return None


def _rank_and_scale(
    config: Mapping[str, Any], module: str, patterns: _Patterns | None = None
) -> tuple[int, float]:
    """Return rank and scale of one module's change."""
    patterns = patterns or _Patterns(config, [module])
    rank = _by_pattern(config, patterns, "rank_pattern", module, config["r"])
    alpha = _by_pattern(config, patterns, "alpha_pattern", module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(
    config: Mapping[str, Any], patterns: _Patterns, field: str, module: str, default: Any
) -> Any:
    """Return the value of the first pattern that names a module or the end of its name."""
    for pattern, value in (config.get(field) or {}).items():
        if patterns.match(field, pattern, module) is not None:
            return value
    return default
