"""Scenarios of packse as universes, and suggestions as changes of a universe."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from composable.packaging import Constraint, Requirement, Universe, Version
from composable.packaging.resolution.universe import Candidate
from composable.packaging.versions.constraint import parse_target

PACKSE = Path(__file__).parents[2] / "packaging" / "data" / "packse"


def read_packse(path: Path) -> tuple[dict[str, Any], Universe]:
    """Read a packse scenario; its PEP 440 specifiers mean the same here."""
    data = tomllib.loads(path.read_text())
    packages = {
        name: [
            Candidate(
                version=Version(version),
                requires=merge(fields.get("requires", [])),
                is_yanked=fields.get("yanked", False),
            )
            for version, fields in package["versions"].items()
        ]
        for name, package in data.get("packages", {}).items()
    }
    requires = [Requirement.parse(text) for text in data["root"]["requires"]]
    return data["expected"], Universe(packages=packages, requires=requires)


def merge(texts: list[str]) -> dict[str, Constraint]:
    """Join several requirements on one package, as packse allows within one candidate."""
    ranges: dict[str, Constraint] = {}
    for requirement in map(Requirement.parse, texts):
        name, range_ = requirement.name, requirement.constraint
        ranges[name] = Constraint(f"{ranges[name]}, {range_}") if name in ranges else range_
    return ranges


def suggestions_in(explanation: str) -> list[str]:
    """Return what an explanation ends with."""
    return [
        line.removeprefix("  - ") for line in explanation.splitlines() if line.startswith("  - ")
    ]


def apply_suggestion(universe: Universe, suggestion: str) -> list[Universe]:
    """Do what a suggestion says, in every way that it may be taken."""
    requires = list(universe.requires)

    def instead(old: Requirement, *new: Requirement) -> list[Universe]:
        at = requires.index(old)
        return [dataclasses.replace(universe, requires=[*requires[:at], *new, *requires[at + 1 :]])]

    if match := re.fullmatch(r"leave out (.+)", suggestion):
        targets = re.split(r", | and ", match[1])
        assert set(targets) <= {r.target for r in requires}, suggestion
        left = [r for r in requires if r.target not in targets]
        return [dataclasses.replace(universe, requires=left)]
    if match := re.fullmatch(r"require (\S+) without its extra (\S+)", suggestion):
        name, extras = parse_target(match[1])
        old = next(r for r in requires if r.name == name and {*r.extras} == {*extras, match[2]})
        return instead(old, dataclasses.replace(old, extras=extras))
    if match := re.fullmatch(r"require (\S+) (\S+) instead of (.+)", suggestion):
        old = next(r for r in requires if (r.target, str(r.constraint)) == (match[1], match[3]))
        return instead(old, dataclasses.replace(old, constraint=Constraint(f"={match[2]}")))
    if match := re.fullmatch(r"require the prerelease (\S+)==(\S+)", suggestion):
        old = next(r for r in requires if r.target == match[1])
        return instead(old, dataclasses.replace(old, constraint=Constraint(f"={match[2]}")))
    if match := re.fullmatch(r"require (.+) exactly to accept the yanked versions?", suggestion):
        pins = map(Requirement.parse, re.split(r", | and ", match[1]))
        return [dataclasses.replace(universe, requires=[*requires, *pins])]
    match = re.fullmatch(r"use a backbone whose router interface is (\S+) (.+), for .+", suggestion)
    assert match is not None, suggestion
    name, range_ = match[1], Constraint(match[2])
    numbers = [f"{major}.{minor}.0" for major in range(4) for minor in range(8)]
    versions = [version for version in map(Version, numbers) if range_.contains(version)]
    assert versions, suggestion
    return [dataclasses.replace(universe, interface={name: version}) for version in versions]
