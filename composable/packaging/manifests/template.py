"""New experts: a folder copied from the template and filled in for a backbone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from composable.errors import PackagingError
from composable.files import atomic
from composable.files.folders import require_empty_folder
from composable.interface.contract import RouterInterface
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.versions.names import check_package_name

_NAME: Final = "my-expert"
_PACKAGE: Final = Path(__file__).parents[2]
# `experts/` is inside the package in an installed wheel, and next to it in a checkout.
_HOMES: Final = (_PACKAGE / "experts", _PACKAGE.parent / "experts")


def find_template() -> Path:
    """Return the folder that new experts are copied from.

    Raises:
        PackagingError: When this installation has no template.
    """
    for home in _HOMES:
        if (home / "_template" / EXPERT_FILE).is_file():
            return home / "_template"
    raise PackagingError("this installation of composable has no template", where=str(_PACKAGE))


def create_expert(folder: Path, name: str, backbone: str, interface: RouterInterface) -> Manifest:
    """Create the folder of a new expert.

    Args:
        folder: The folder, which must be empty or not exist.
        name: Name of the expert.
        backbone: Name of the backbone that it will be trained for.
        interface: The router interface that the backbone publishes.

    Returns:
        The manifest that was written.

    Raises:
        ManifestError: For an invalid package name.
        PackagingError: When the folder already exists and is not empty.
    """
    check_package_name(name, "NAME")
    require_empty_folder(folder)
    values = {
        f'name = "{_NAME}"': f'name = "{name}"',
        'backbone = "tiny-bytes"': f'backbone = "{backbone}"',
        'name = "tiny-bytes"': f'name = "{interface.name}"',
        'requires = "^1.0"': f'requires = "^{interface.version}"',
        "width = 128": f"width = {min(128, interface.scout_max_width)}",
    }
    atomic.make_directory(folder)
    for source in sorted(find_template().glob("[!.]*")):
        text = source.read_text(encoding="utf-8")
        for old, new in values.items():
            text = re.sub(rf"^{re.escape(old)}$", new, text, flags=re.MULTILINE)
        text = re.sub(rf"^# {_NAME}$", f"# {name}", text, flags=re.MULTILINE)
        atomic.write_text(folder / source.name, text)
    return Manifest.read(folder)
