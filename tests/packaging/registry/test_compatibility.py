import dataclasses

import pytest

from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
from composable.packaging.registry.compatibility import (
    BUMPS,
    Change,
    bump_between,
    choose_previous,
    compare_manifests,
    is_enough,
    needed_bump,
    next_version,
)
from composable.packaging.registry.release import Release
from composable.packaging.versions.constraint import Constraint, is_within
from composable.packaging.versions.version import Version

OLD = Manifest(
    name="logic",
    version=Version("1.2.0"),
    backbone="tiny",
    interface=InterfaceNeed(
        name="tiny", requires=Constraint(">=1.2, <2"), digest="sha256:" + "a" * 64
    ),
    body=BodySpec(kind="lora", rank=4),
    scout_width=16,
    domains=("logic",),
    provides=("proofs",),
    requires={"german": Constraint("^1.2")},
    extras={"code": {"python-code": Constraint("^1.0")}},
    conflicts={"chaos": Constraint("<2")},
)


def interface(**changes):
    return {"interface": dataclasses.replace(OLD.interface, **changes)}


@pytest.mark.parametrize(
    ("needs", "changes"),
    [
        ("patch", {}),
        ("patch", {"description": "Better said.", "version": Version("9.0.0")}),
        ("patch", {"body": BodySpec(kind="lora", rank=4, dtype="BF16")}),
        ("minor", {"provides": ("proofs", "lemmas")}),
        ("minor", {"domains": ("logic", "sets")}),
        ("minor", {"extras": {**OLD.extras, "news": {"german": Constraint("*")}}}),
        ("minor", {"extras": {"code": {"python-code": Constraint("^1.1")}}}),
        ("minor", {"requires": {**OLD.requires, "set-mm": Constraint("*")}}),
        ("minor", {"conflicts": {}}),
        ("minor", {"conflicts": {"chaos": Constraint("<1")}}),
        ("minor", interface(requires=Constraint(">=1.0, <3"))),
        ("major", interface(requires=Constraint(">=1.3, <2"))),
        ("major", interface(digest="sha256:" + "b" * 64)),
        ("major", interface(name="huge")),
        ("major", {"backbone": "huge"}),
        ("major", {"body": BodySpec(kind="ffn")}),
        ("major", {"body": BodySpec(kind="lora", rank=8)}),
        ("major", {"scout_width": 32}),
        ("major", {"provides": ("lemmas",)}),
        ("major", {"domains": ()}),
        ("major", {"extras": {}}),
        ("major", {"requires": {}}),
        ("major", {"conflicts": {"chaos": Constraint("<3")}}),
        ("major", {"conflicts": {**OLD.conflicts, "order": Constraint("*")}}),
    ],
)
def test_less_is_major_more_is_minor_and_the_rest_a_patch(needs, changes):
    found = compare_manifests(OLD, dataclasses.replace(OLD, **changes))
    assert needed_bump(found) == needs, found


def test_the_largest_of_all_changes_counts():
    changes = [Change("minor", "more"), Change("major", "less"), Change("patch", "else")]
    assert needed_bump(changes) == "major"
    assert needed_bump([]) == "patch"


@pytest.mark.parametrize(
    ("old", "new", "bump"),
    [
        ("1.2.3", "1.2.4", "patch"),
        ("1.2.3", "1.3.0", "minor"),
        ("1.2.3", "1.3.0-rc.1", "minor"),
        ("1.2.3", "2.0.0", "major"),
        ("1.2.3", "1.2.3", None),
        ("1.2.3", "1.2.2", None),
        ("0.2.3", "0.2.4", "minor"),
        ("0.2.3", "0.3.0", "major"),
        ("0.0.3", "0.0.4", "major"),
        ("0.9.0", "1.0.0", "major"),
        ("2.0.0-rc.1", "2.0.0", "major"),
    ],
)
def test_bumps_are_counted_as_cargo_counts(old, new, bump):
    assert bump_between(Version(old), Version(new)) == bump


@pytest.mark.parametrize("old", ["1.2.3", "0.2.3", "0.0.3", "2.0.0-rc.1"])
@pytest.mark.parametrize("needed", BUMPS)
def test_the_next_version_is_enough_and_cargo_takes_it_for_what_it_is(old, needed):
    old = Version(old)
    version = next_version(old, needed)
    assert is_enough(old, version, needed)
    if not old.is_prerelease and old.release[:2] != (0, 0):
        assert Constraint(f"^{old}").contains(version) is (needed != "major")


@pytest.mark.parametrize(
    ("inner", "outer", "holds"),
    [
        ("^1.2", "^1.0", True),
        ("^1.0", "^1.2", False),
        ("^1.0", ">=1.0, <2", True),
        (">=1.0, <2", "^1.0", True),
        (">=1.0, <2.1", "^1.0", False),
        ("=1.2.3", "1.2.*", True),
        ("*", "!=1.2.3", False),
        ("!=1.2.3", "*", True),
        ("<1.2.3", "<=1.2.3", True),
        ("<=1.2.3", "<1.2.3", False),
        (">=1.0.0-rc.1", ">=1.0.0", False),
        ("*", ">=0", True),
    ],
)
def test_one_range_lies_within_another(inner, outer, holds):
    assert is_within(Constraint(inner), Constraint(outer)) is holds


def test_the_older_release_is_the_newest_before_that_was_not_yanked():
    releases = [
        Release(
            name="logic",
            version=Version(text),
            interface=OLD.interface,
            manifest="",
            files=(),
            is_yanked=text == "1.1.0",
        )
        for text in ("1.0.0", "1.1.0", "1.2.0", "1.3.0-rc.1", "2.0.0")
    ]

    def older(version, **options):
        found = choose_previous(releases, Version(version), **options)
        return found and str(found.version)

    assert older("1.2.0") == "1.0.0"
    assert older("1.2.0", or_same=True) == "1.2.0"
    assert older("1.9.0") == "1.2.0"
    assert older("3.0.0") == "2.0.0"
    assert older("1.0.0") is None
