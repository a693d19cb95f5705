"""An inventory as a CycloneDX 1.6 bill of materials for machine learning, in JSON.

References: CycloneDX, ECMA-424; https://cyclonedx.org/docs/1.6/json.
"""

from __future__ import annotations

import json
from typing import Any, Final

from composable.packaging.bom.inventory import DataSet, Inventory, Part
from composable.packaging.manifests.manifest import PackageFile

_MODEL: Final = "machine-learning-model"
_ROOT: Final = "composed-model"


def format_cyclonedx(inventory: Inventory, tool: str, time: str | None = None) -> str:
    """Return an inventory as CycloneDX JSON.

    Args:
        inventory: The inventory.
        tool: Version of composable.
        time: Time of creation, as RFC 3339 in UTC; None leaves it out.
    """
    refs = {part.name: part.purl for part in inventory.parts}
    model = {"type": "application", "bom-ref": _ROOT, "name": _ROOT}
    tools = {"components": [{"type": "application", "name": "composable", "version": tool}]}
    needs: dict[str, list[str]] = {
        _ROOT: [inventory.backbone.purl, *(refs[name] for name in inventory.required)],
        **{part.purl: [refs[name] for name in part.needs] for part in inventory.parts},
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{inventory.id}",
        "version": 1,
        "metadata": {
            **({"timestamp": time} if time else {}),
            "tools": tools,
            "component": model,
        },
        "components": [_format_part(part) for part in inventory.parts],
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(others)} for ref, others in sorted(needs.items())
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _format_part(part: Part) -> dict[str, Any]:
    """Return the component of a package; its files are components inside it."""
    fields: dict[str, Any] = {
        "type": _MODEL,
        "bom-ref": part.purl,
        "authors": [{"name": author} for author in part.authors],
        "name": part.name,
        "version": part.version,
        "description": part.description,
        "hashes": _format_hash(part.manifest) if part.manifest else [],
        "licenses": _format_license(part),
        "purl": part.purl,
        "pedigree": {"ancestors": [_format_ancestor(name) for name in part.ancestors]}
        if part.ancestors
        else None,
        "components": [_format_file(part, file) for file in part.files],
        "modelCard": _format_card(part),
        "properties": [
            {"name": f"composable:{name}", "value": value}
            for name, value in sorted(part.facts.items())
        ],
    }
    return {name: value for name, value in fields.items() if value}


def _format_license(part: Part) -> list[dict[str, Any]]:
    if part.expression is not None:
        return [{"expression": part.expression, "acknowledgement": "declared"}]
    if part.license:  # what is not an SPDX expression is a name
        return [{"license": {"name": part.license, "acknowledgement": "declared"}}]
    return []


def _format_ancestor(name: str) -> dict[str, str]:
    name, _, version = name.partition("@")
    return {"type": _MODEL, "name": name, **({"version": version} if version else {})}


def _format_file(part: Part, file: PackageFile) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"{part.purl}#{file.name}",
        "name": file.name,
        "hashes": _format_hash(file.digest),
        "properties": [{"name": "composable:bytes", "value": str(file.size)}],
    }


def _format_hash(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]


def _format_card(part: Part) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "approach": {"type": "self-supervised"},
        "task": "text-generation",
        "architectureFamily": "transformer",
        "modelArchitecture": part.kind,
    }
    if part.data:
        parameters["datasets"] = [_format_data(data) for data in part.data]
    card: dict[str, Any] = {"modelParameters": parameters}
    if part.metrics:
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {
                    "type": metric.name,
                    "value": str(metric.value),
                    **({"slice": metric.slice} if metric.slice else {}),
                }
                for metric in part.metrics
            ]
        }
    return card


def _format_data(data: DataSet) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": "dataset", "name": data.name}
    if data.description:
        fields["description"] = data.description
    if data.digest:
        properties = [{"name": "composable:digest", "value": data.digest}]
        fields["contents"] = {"properties": properties}
    return fields
