"""The card of a repository on the Hugging Face Hub: what the Hub shows and searches.

The front matter has the fields that the Hub knows: licence, base model, library, tags, languages,
and the figures of the experts' own cards as evaluation results.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from composable.errors import ComposableError
from composable.packaging.registry.index import Entry
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release, choose_newest

CARD_FILE: Final = "README.md"
# Each costs a few requests for every change.
MAX_DETAILED: Final = 50
_MARK: Final = "<!-- written by composable; without this line it is left alone -->"
_MAX_VETTING_BYTES: Final = 1 << 20
_MODEL: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}")
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")


def is_written_here(card: bytes) -> bool:
    """Return whether a card was made by `format_card`."""
    return _MARK.encode() in card


def format_card(registry: Registry, repository: str) -> str:
    """Return the card of a registry.

    Args:
        registry: The registry.
        repository: Owner and name of the repository.
    """
    from huggingface_hub import EvalResult, ModelCardData

    entries = registry.entries()
    rows = [
        _describe(registry, entry, number < MAX_DETAILED) for number, entry in enumerate(entries)
    ]
    licenses = sorted({row["license"] for row in rows if row["license"]})
    models = sorted({row["base"] for row in rows if _MODEL.fullmatch(row["base"])})
    tags = sorted({tag for entry in entries for tag in entry.tags})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"held-out text of {row['name']} {row['version']}",
            metric_type=kind,
            metric_name=name,
            metric_value=row["bits"][field],
        )
        for row in rows
        for kind, name, field in (
            ("bits_per_byte", "bits per byte", "own_mix"),
            ("backbone_bits_per_byte", "bits per byte of the backbone alone", "own_backbone"),
        )
        if field in row["bits"]
    ]
    data = ModelCardData(
        language=[tag for tag in tags if _LANGUAGE.fullmatch(tag)] or None,
        license=licenses[0].lower() if len(licenses) == 1 else "other",
        license_name=None if len(licenses) == 1 else "one-for-each-expert",
        library_name="composable",
        tags=["composable", "mixture-of-experts", *tags],
        base_model=models or None,
        model_name=repository.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    lines = ["| " + " | ".join(_format_cell(cell) for cell in _cells(row)) + " |" for row in rows]
    head = "| expert | version | licence | bits per byte, backbone alone | with the expert | for |"
    table = "\n".join([head, "|---|---|---|---|---|---|", *lines]) if rows else "No experts yet."
    first = rows[0]["name"] if rows else "NAME"
    return (
        f"---\n{data.to_yaml()}\n---\n{_MARK}\n\n# Experts for composable\n\n"
        "A registry of experts: packages that plug into a frozen backbone.\n\n"
        f"```console\n$ composable init --registry hf://{repository}\n"
        f"$ composable install {first}\n```\n\n{table}\n"
    )


def _describe(registry: Registry, entry: Entry, has_details: bool) -> dict[str, Any]:
    """Return what the card says of a package."""
    row: dict[str, Any] = {
        "name": entry.name,
        "version": str(entry.version),
        "description": entry.description,
        "license": "",
        "base": "",
        "bits": {},
    }
    if not has_details:
        return row
    newest = choose_newest(registry.versions(entry.name))
    row["license"] = newest.license or ""
    try:
        manifest = registry.read_manifest(newest)
        row["base"] = manifest.origin.base if manifest.origin else ""
        row["bits"] = _read_bits(registry, newest)
    except ComposableError:
        pass  # a card says less; publishing does not fail because of an older release
    return row


def _read_bits(registry: Registry, release: Release) -> dict[str, float]:
    """Return the bits per byte that the card of an expert states."""
    for file in release.files:
        if file.name != "card.json":
            continue
        data = registry.read_blob(file.digest, "card.json", _MAX_VETTING_BYTES)
        try:
            found = json.loads(data)["measured"]["bits_per_byte"]
            return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
    return {}


def _cells(row: dict[str, Any]) -> list[str]:
    bits = [
        f"{row['bits'][field]:.3f}" if field in row["bits"] else ""
        for field in ("own_backbone", "own_mix")
    ]
    return [row["name"], row["version"], row["license"], *bits, row["description"]]


def _format_cell(text: str) -> str:
    """Return text that others wrote so that it is text in Markdown, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
