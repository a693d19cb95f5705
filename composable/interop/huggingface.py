"""Hugging Face folders: `config.json`, safetensors in one file or many, `tokenizer.json`.

Pickled checkpoints are never opened. Tensor files go through the same checks as those of packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from composable.errors import InteropError, TensorFileError
from composable.files.reading import read_bytes
from composable.files.safetensors import ANY_CASE_NAME, TensorFile, read_header
from composable.interface import TensorSpec
from composable.interop.source import (
    CheckpointSource,
    SourceTokenizer,
    StoredTensor,
    choose_special_tokens,
)
from composable.interop.tables import convert, read_json, require_agreement
from composable.model.subwords import load_definition

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_TOKENIZER_FILE: Final = "tokenizer.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SPECIAL_TOKENS: Final = "special_tokens_map.json"  # of older versions
_GENERATION: Final = "generation_config.json"
_TOKEN = str | dict[str, Any] | None
_IDS = int | list[int] | None
# What a token of the tokenizer's config states again, which decides how markup is encoded.
_FLAGS: Final = ("content", "special", "lstrip", "rstrip", "single_word")
_SAVE_AGAIN: Final = (
    "load the folder with transformers.AutoTokenizer and save it again with save_pretrained"
)


def open_folder(folder: Path) -> CheckpointSource:
    """Read config, headers and tokenizer of a folder.

    Raises:
        InteropError: If a file is missing or malformed.
        TensorFileError: If a tensor file must not be read.
    """
    config = read_json(folder / "config.json")
    files = _find_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file, names in files.items():
        for name, stored in open_tensors(file):
            if names is not None and name not in names:
                raise InteropError(
                    f"tensor {name!r} does not belong in this file according to {_INDEX}",
                    where=str(file),
                )
            tensors[name] = stored
        for name in (names or set()) - tensors.keys():
            raise InteropError(f"tensor {name!r} is missing, listed in {_INDEX}", where=str(file))
    return CheckpointSource(
        name=str(folder),
        files=tuple(files),
        is_gguf=False,
        config=config,
        tensors=tensors,
        tokenizer=_read_tokenizer(folder, config),
        license="",
    )


def _find_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the tensor files, each with the names that the index lists for it."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InteropError("no table of files", where=f"{folder / _INDEX}: weight_map")
        if (folder / _WEIGHTS).is_file() and set(weight_map.values()) != {_WEIGHTS}:
            raise InteropError(
                f"the weights are there twice: {_WEIGHTS}, which transformers reads, and the files "
                f"of {_INDEX}",
                where=str(folder),
                hint=f"delete {_INDEX} and its files if {_WEIGHTS} is right, or else {_WEIGHTS}",
            )
        files: dict[Path, set[str] | None] = {}
        for name, file in sorted(weight_map.items(), key=lambda item: str(item[1])):
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise InteropError(
                    f"{file!r} is not a file name", where=f"{folder / _INDEX}: {name}"
                )
            names = files.setdefault(folder / file, set())
            assert names is not None
            names.add(name)
        return files
    if (folder / _WEIGHTS).is_file():
        return {folder / _WEIGHTS: None}
    pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
    raise InteropError(
        f"neither {_WEIGHTS} nor {_INDEX} exists",
        where=str(folder),
        hint=f"{pickles[0]} may run code when it is loaded; convert it to safetensors first"
        if pickles
        else None,
    )


def open_tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a file by name, none of them read.

    Raises:
        InteropError: If the file is malformed, or a tensor is not of floating-point numbers.
    """
    try:
        header = read_header(file, ANY_CASE_NAME)
        specs = {
            name: TensorSpec(shape=info.shape, dtypes=(info.dtype,))
            for name, info in header.items()
        }
        arrays = TensorFile(file, specs, ANY_CASE_NAME)
    except TensorFileError as error:
        raise InteropError(error.message, where=error.where) from error
    for name, info in header.items():
        if info.dtype not in ("F32", "BF16", "F16"):
            raise InteropError(
                f"tensor {name!r} has dtype {info.dtype}, expected F32, BF16 or F16",
                where=str(file),
            )
        read = partial(arrays.__getitem__, name)
        yield name, StoredTensor(dtype=info.dtype, shape=info.shape, read=read)


def _read_tokenizer(folder: Path, config: dict[str, Any]) -> SourceTokenizer | None:
    """Return the tokenizer of a folder; what its config states again is compared with it."""
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        return None
    definition = _read_text(path)
    tokenizer = load_definition(definition)
    declared = _read_optional(folder / _TOKENIZER_CONFIG)
    _compare_added_tokens(tokenizer, declared, str(folder / _TOKENIZER_CONFIG))
    bos, eos = (_read_token(folder, declared, name, tokenizer) for name in ("bos", "eos"))
    adds_bos = convert(
        declared.get("add_bos_token"), bool | None, f"{folder / _TOKENIZER_CONFIG}: add_bos_token"
    )
    begin = _token_before(tokenizer) or (bos if adds_bos else None)
    names = [tokenizer.id_to_token(index) for index in _end_ids(folder, config)]
    ends = tuple(token for token in (eos, *names) if token is not None)
    begin, all_ends = choose_special_tokens(
        tokenizer.get_vocab(with_added_tokens=True), begin or bos, begin is not None, ends
    )
    if begin is None:
        raise InteropError(
            "no token begins or ends a document",
            where=str(path),
            hint=f"state bos_token or eos_token in {_TOKENIZER_CONFIG}",
        )
    return SourceTokenizer(
        definition=definition,
        begin=begin,
        ends=all_ends,
        bos=bos,
        eos=eos,
        chat_template=_read_chat_template(folder, declared.get("chat_template")),
    )


def _token_before(tokenizer: Any) -> str | None:
    """Return the token that a tokenizer itself puts before every text, if it does."""
    encoded = tokenizer.encode("a", add_special_tokens=True)
    return encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None


def _end_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """Return the ids that end a text: those of the generation config, or else of the config."""
    name = "eos_token_id"
    generation = _read_optional(folder / _GENERATION).get(name)
    stated = {
        f"{folder / _GENERATION}: {name}": generation,
        f"config.{name}": config.get(name),
    }
    ids: list[int] = []
    for where, value in stated.items():
        found = convert(value, _IDS, where)
        ids = ids or ([found] if isinstance(found, int) else found or [])
    return [index for index in ids if 0 <= index < 1 << 32]


def _read_token(folder: Path, declared: dict[str, Any], name: str, tokenizer: Any) -> str | None:
    """Return a special token that is declared, which must be one of the tokenizer."""
    field = f"{name}_token"
    stated = {}
    for file, table in (
        (_TOKENIZER_CONFIG, declared),
        (_SPECIAL_TOKENS, _read_optional(folder / _SPECIAL_TOKENS)),
    ):
        where = f"{folder / file}: {field}"
        token = convert(table.get(field), _TOKEN, where)
        if isinstance(token, dict):
            token = convert(token.get("content"), str, where)
        if token:
            stated[where] = token
    require_agreement(
        stated, hint=f"transformers follows {_TOKENIZER_CONFIG}; delete {_SPECIAL_TOKENS}"
    )
    for where, token in stated.items():
        if tokenizer.token_to_id(token) is None:
            raise InteropError(
                f"{token!r} is not a token of {_TOKENIZER_FILE}", where=where, hint=_SAVE_AGAIN
            )
    return next(iter(stated.values()), None)


def _compare_added_tokens(tokenizer: Any, declared: dict[str, Any], where: str) -> None:
    """Compare the tokens that the tokenizer's config repeats with those of the tokenizer."""
    field = "added_tokens_decoder"
    repeated = convert(declared.get(field) or {}, dict[str, dict[str, Any]], f"{where}: {field}")
    added = tokenizer.get_added_tokens_decoder()
    for index, token in repeated.items():
        own = added.get(int(index)) if index.isdecimal() else None
        for flag in (flag for flag in _FLAGS if flag in token):
            require_agreement(
                {
                    f"{_TOKENIZER_FILE}: added_tokens": getattr(own, flag, None),
                    f"{where}: {field}.{index}.{flag}": token[flag],
                },
                hint=_SAVE_AGAIN,
            )


def _read_chat_template(folder: Path, declared: Any) -> str | None:
    """Return the chat template of a folder: that of its own file, or the declared one.

    Args:
        folder: The folder.
        declared: A template, or a list of named ones, of which `default` counts.

    Raises:
        InteropError: If the file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    if isinstance(declared, list):
        tables = [entry for entry in declared if isinstance(entry, dict)]
        named = {str(table.get("name")): table.get("template") for table in tables}
        declared = named.get("default")
    return declared if isinstance(declared, str) else None


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except (OSError, ValueError) as error:
        raise InteropError(f"cannot be read: {error}", where=str(path)) from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
