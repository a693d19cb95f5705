"""An inventory as an SPDX 2.3 document, in JSON.

SPDX 2.3 has no words for models and data sets: these are in the comments of packages. Each file is
a package too, since the checksum of a file would have to be SHA-1.

References: SPDX 2.3, ISO/IEC 5962; https://spdx.github.io/spdx-spec/v2.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from composable.packaging.bom.inventory import Inventory, Part
from composable.packaging.manifests.licenses import list_alternatives

# A document must have a time; this one stands for none.
NO_TIME: Final = "1970-01-01T00:00:00Z"
_DOCUMENT: Final = "SPDXRef-DOCUMENT"
_ROOT: Final = "SPDXRef-composed-model"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def format_spdx(inventory: Inventory, tool: str, time: str | None = None) -> str:
    """Return an inventory as SPDX JSON.

    Args:
        inventory: The inventory.
        tool: Version of composable.
        time: Time of creation, as RFC 3339 in UTC; None for 1970, since a time is required.
    """
    root = _format_package(_ROOT, "composed-model", "NOASSERTION", purpose="APPLICATION")
    packages, relations = [root], [(_DOCUMENT, "DESCRIBES", _ROOT)]
    roots = (inventory.backbone.name, *inventory.required)
    relations += [(_ROOT, "DEPENDS_ON", _ref_of(name)) for name in roots]
    for part in inventory.parts:
        packages.append(_format_part(part))
        relations += [(_ref_of(part.name), "DEPENDS_ON", _ref_of(name)) for name in part.needs]
        for number, file in enumerate(part.files, 1):
            ref = f"{_ref_of(part.name)}-file-{number}"
            fields = _format_package(ref, f"{part.name}/{file.name}", "NOASSERTION", purpose="FILE")
            packages.append({**fields, "checksums": _format_checksum(file.digest)})
            relations.append((_ref_of(part.name), "CONTAINS", ref))
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": _DOCUMENT,
        "name": "composed-model",
        "documentNamespace": f"https://spdx.org/spdxdocs/composable-{inventory.id}",
        "creationInfo": {"created": time or NO_TIME, "creators": [f"Tool: composable-{tool}"]},
        "packages": packages,
        "relationships": [
            {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}
            for one, kind, other in relations
        ],
        "hasExtractedLicensingInfos": [
            {
                "licenseId": license_,
                "name": license_.removeprefix("LicenseRef-"),
                "extractedText": "The text of this licence is not part of the package.",
            }
            for license_ in sorted({*_list_own_licenses(inventory)})
        ],
    }
    return json.dumps({k: v for k, v in document.items() if v}, indent=2) + "\n"


def _format_part(part: Part) -> dict[str, Any]:
    declared = part.expression or ("NOASSERTION" if part.license else "NONE")
    comments = [f"{data.name}: {data.description or data.digest}" for data in part.data]
    comments += [f"made from: {name}" for name in part.ancestors]
    comments += [f"{metric.name}, {metric.slice}: {metric.value}" for metric in part.metrics]
    comments += [f"{name}: {value}" for name, value in sorted(part.facts.items())]
    fields: dict[str, Any] = {
        **_format_package(_ref_of(part.name), part.name, declared, purpose="OTHER"),
        "versionInfo": part.version,
        "summary": part.kind,
        "description": part.description,
        "attributionTexts": [f"Author: {author}" for author in part.authors],
        "checksums": _format_checksum(part.manifest) if part.manifest else [],
        "comment": "\n".join(_CONTROL.sub(" ", line) for line in comments),
        "externalRefs": [
            {
                "referenceCategory": "PACKAGE-MANAGER",
                "referenceType": "purl",
                "referenceLocator": part.purl,
            }
        ],
    }
    if part.license and part.expression is None:
        fields["licenseComments"] = f"The manifest states {part.license!r}."
    return {name: value for name, value in fields.items() if value or name == "filesAnalyzed"}


def _format_package(ref: str, name: str, declared: str, *, purpose: str) -> dict[str, Any]:
    return {
        "SPDXID": ref,
        "name": name,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": declared,
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": purpose,
    }


def _format_checksum(digest: str) -> list[dict[str, str]]:
    return [{"algorithm": "SHA256", "checksumValue": digest.removeprefix("sha256:")}]


def _list_own_licenses(inventory: Inventory) -> Iterator[str]:
    """Yield the licences that SPDX does not list, which a document has to define."""
    for part in inventory.parts:
        for licenses in list_alternatives(part.expression) if part.expression else ():
            for license_ in licenses:
                name = license_.partition(" WITH ")[0]
                if name.startswith("LicenseRef-"):
                    yield name


def _ref_of(name: str) -> str:
    return f"SPDXRef-Package-{name}"
