"""Hugging Face folders: `config.json`, safetensors in one file or many, `tokenizer.json`.

Pickled checkpoints are never opened. Tensor files go through the same checks as those of packages.
"""

from __future__ import annotations

import json
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

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


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
        files: dict[Path, set[str] | None] = {}
        for name, file in sorted(weight_map.items(), key=lambda item: str(item[1])):
            if not isinstance(file, str) or Path(file).name != file:
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
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    definition = read_json(path)
    said = _read_optional(folder / "tokenizer_config.json")
    generation = _read_optional(folder / "generation_config.json")
    added = [entry for entry in definition.get("added_tokens", []) if isinstance(entry, dict)]
    tokens = {
        **definition.get("model", {}).get("vocab", {}),
        **{entry["content"]: entry["id"] for entry in added},
    }
    names = {index: token for token, index in tokens.items()}
    bos, eos = _content(said.get("bos_token")), _content(said.get("eos_token"))
    ids = [generation.get("eos_token_id"), config.get("eos_token_id")]
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry])]
    ends = [eos, *(names[i] for i in flat if i in names)]
    begin, all_ends = choose_special_tokens(
        tokens,
        bos,
        bool(said.get("add_bos_token")) or _adds(definition.get("post_processor"), bos),
        tuple(token for token in ends if token is not None),
    )
    if begin is None:
        raise InteropError("no token begins or ends a document", where=str(path))
    return SourceTokenizer(
        definition=read_bytes(path).decode(),
        begin=begin,
        ends=all_ends,
        bos=bos,
        eos=eos,
        chat_template=_read_chat_template(folder, said.get("chat_template")),
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
        try:
            return read_bytes(path).decode()
        except (OSError, ValueError) as error:
            raise InteropError(f"cannot be read: {error}", where=str(path)) from error
    if isinstance(declared, list):
        tables = [entry for entry in declared if isinstance(entry, dict)]
        named = {str(table.get("name")): table.get("template") for table in tables}
        declared = named.get("default")
    return declared if isinstance(declared, str) else None


def _adds(post_processor: Any, token: str | None) -> bool:
    """Return whether a post-processor puts a token before every text."""
    if not isinstance(post_processor, dict) or token is None:
        return False
    parts = [post_processor, *(post_processor.get("processors") or [])]
    single = [piece for part in parts for piece in (part.get("single") or [])]
    return bool(single) and single[0].get("SpecialToken", {}).get("id") == token


def _content(token: Any) -> str | None:
    """Return the text of a token, given as text or as a table."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the table of fields that a JSON file holds.

    Raises:
        InteropError: If it is missing, or holds something else.
    """
    try:
        data = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise InteropError("no such file", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise InteropError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InteropError("expected a table of fields", where=str(path))
    return data
