"""The fixtures of node-semver, and which of them mean something else here, on purpose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NODE_SEMVER: dict[str, list[Any]] = json.loads(
    (Path(__file__).parents[1] / "packaging" / "data" / "node-semver.json").read_text()
)


def why_npm_only(range_: str, version: object) -> str | None:
    """Return which of npm's forms this is; docs/concepts/packaging.md says why it is refused."""
    if "||" in range_:
        return "`1 || 2`: alternatives"
    if " - " in range_:
        return "`1 - 2`: hyphen ranges"
    if range_ == "":
        return "an empty range"
    if range_[1:] in ("x",) or range_ == ">=*":
        return "an operator before a bare wildcard"
    if "~>" in range_:
        return "`~>1`: Ruby's tilde"
    if "v" in range_ or str(version).startswith("v"):
        return "a leading `v`"
    if re.search(r"[0-9x]\s+\S", range_) is not None:
        return "`>=1 <2`: blanks instead of commas"
    if "3alpha" in range_ or "0beta" in str(version):
        return "loose mode"
    if not isinstance(version, str) or version in ("glorp", "not a version"):
        return "what is no version"
    return None


def why_another_meaning(range_: str, options: object) -> str | None:
    """Return why npm and we mean different things by a range that both take."""
    if isinstance(options, dict) and "includePrerelease" in options:
        return "`includePrerelease`: here a range must name a prerelease"
    if range_ in ("1.0.0", "2.3"):
        return "a bare version is `^` here, as Cargo reads it, and `=` there"
    return None
