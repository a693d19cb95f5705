"""Commands that look: what they print, and that JSON says the same."""

import json
from pathlib import Path

import pytest

UNIVERSE = {
    "interface": {"tiny": "1.0.0"},
    "packages": {
        "german": {"1.0.0": {"interface": "^1.0"}, "2.0.0": {"interface": "^2.0"}},
        "physics": {"1.0.0": {"requires": {"german": "*"}, "interface": "^1.0"}},
    },
    "requires": {"physics": "*"},
}


@pytest.fixture
def installed(works, project):
    works("install", "german>=1.0,<2", "physics")


def test_tree(works, installed):
    assert works("tree").out.splitlines() == [
        "├── german 1.2.0 (>=1.0, <2)",
        "└── physics 1.0.0",
        "    └── german 1.2.0 (^1.0)",
    ]
    german, physics = works("tree", "--json").json
    assert (german["name"], german["range"]) == ("german", ">=1.0, <2")
    assert [need["name"] for need in physics["needs"]] == ["german"]


def test_why_names_everyone_who_asks(works, installed):
    assert works("why", "german").out.splitlines() == [
        "german 1.2.0",
        "  composable.toml requires german >=1.0, <2",
        "  composable.toml requires physics, physics 1.0.0 requires german ^1.0",
    ]
    assert len(works("why", "german", "--json").json["reasons"]) == 2


def test_why_of_what_is_not_there(cli, installed):
    assert "did you mean 'german'?" in cli("why", "germn").err


def test_list(works, installed):
    assert [row.split()[:2] for row in works("list").out.splitlines()] == [
        ["NAME", "VERSION"],
        ["german", "1.2.0"],
        ["physics", "1.0.0"],
    ]
    assert [row["name"] for row in works("list", "--json").json] == ["german", "physics"]


def test_outdated_tells_allowed_from_newest(works, installed, fakes):
    fakes.publish("german", "1.3.0", seed=5)
    assert works("outdated", "--json").json == [
        {"name": "german", "locked": "1.2.0", "allowed": "1.3.0", "newest": "2.0.0"}
    ]


def test_outdated_looks_past_yanked_releases_and_prereleases(works, project, fakes):
    fakes.publish("german", "3.0.0-rc.1", seed=5)
    works("yank", "german@2.0.0", "--registry", "registry")
    works("install", "german")
    assert works("outdated").out == "everything is up to date\n"


def test_search_reads_names_descriptions_and_tags(works, project):
    for word, found in {"GERM": ["german"], "nothing": ["german", "physics"], "rust": []}.items():
        assert [row["name"] for row in works("search", word, "--json").json] == found
    assert works("search", "rust").out == "nothing found for 'rust'\n"


def test_info_shows_manifest_and_card(works, project):
    facts = works("info", "physics").out
    assert "german ^1.0" in facts
    assert "2.000 to 1.000 bits per byte on its own held-out text, 1.250 in mix mode" in facts
    data = works("info", "german@1.0.0", "--json").json
    assert (data["version"], data["versions"]) == ("1.0.0", ["1.0.0", "1.2.0", "2.0.0"])
    assert data["card"]["expert"] == "german@1.0.0"


def test_info_of_a_release_that_is_not_there(cli, project):
    assert "available: 1.0.0, 1.2.0, 2.0.0" in cli("info", "german@7.0.0").err


def test_info_and_search_work_without_a_project(works, fakes):
    fakes.publish("german")
    assert works("info", "german", "--registry", "registry", "--json").json["name"] == "german"
    assert "german" in works("search", "german", "--registry", "registry").out


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_resolve_prints_packages(works, tmp_path, flags):
    Path("universe.json").write_text(json.dumps(UNIVERSE))
    outcome = works("resolve", "--universe", "universe.json", *flags)
    assert outcome.json == {"packages": {"german": "1.0.0", "physics": "1.0.0"}}


def test_resolve_explains(cli, tmp_path):
    Path("universe.json").write_text(json.dumps({**UNIVERSE, "requires": {"german": "^2.0"}}))
    outcome = cli("resolve", "--universe", "universe.json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "router interface tiny" in outcome.err
    outcome = cli("resolve", "--universe", "universe.json", "--json")
    assert outcome.json["error"]["kind"] == "ResolutionError"


@pytest.mark.parametrize("text", ["{", '{"packages": {"german": {"one": {}}}}'])
def test_resolve_refuses_a_bad_universe(cli, tmp_path, text):
    Path("universe.json").write_text(text)
    assert "error: universe.json" in cli("resolve", "--universe", "universe.json").err


@pytest.mark.parametrize(
    "measured",
    [
        None, 3, [], "text", {"bits_per_byte": []}, {"bits_per_byte": {}, "anchor_loss": 0.0},
        {"bits_per_byte": {"own_backbone": "6", "own_expert": 2.0}, "anchor_loss": 0.0},
        {"bits_per_byte": {"own_backbone": 6.0, "own_expert": True}, "anchor_loss": 0.0},
        {"bits_per_byte": {"own_backbone": 6.0, "own_expert": 10**400}, "anchor_loss": 0.0},
        {"bits_per_byte": {"own_backbone": 6.0, "own_expert": 2.0}, "anchor_loss": float("nan")},
    ],
)  # fmt: skip
def test_figures_of_another_type_are_not_shown(measured):
    from composable.cli.look import format_measured

    assert format_measured({"measured": measured}) == ""


def test_bom_prints_or_writes_one(cli, works, installed, monkeypatch):
    printed = works("bom").out
    document = json.loads(printed)
    assert [part["name"] for part in document["components"]] == ["tiny-bytes", "german", "physics"]
    assert "timestamp" not in document["metadata"]
    assert works("bom", "--output", "bom.json").out == "wrote bom.json: 3 packages\n"
    assert Path("bom.json").read_text() == printed
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    spdx = json.loads(works("bom", "--format", "spdx").out)
    assert spdx["creationInfo"]["created"] == "2023-11-14T22:13:20Z"
    assert cli("bom", "--format", "xml").code == 2
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "now")
    assert cli("bom", "--json").json["error"]["where"] == "SOURCE_DATE_EPOCH"


def test_audit_says_what_is_affected_and_what_fixes_it(cli, works, installed):
    clean = cli("audit")
    assert (clean.code, clean.err) == (0, "note: registry 'default' has no advisories\n")
    assert clean.out == "2 locked experts, 0 advisories: none is affected\n"
    text = "It has a back door.\x1b[2J"
    advise = ("advise", "--registry", "registry", "--kind", "poisoned", "--text", text)
    assert works(*advise, "german<2", "--fixed", "2.0.0", "--id", "g-1").out == (
        "published advisory g-1\n"
    )
    found = cli("audit")
    assert found.code == 1
    assert found.out.splitlines() == [
        "RELEASE       KIND      ADVISORY  FIXED IN",
        "german 1.2.0  poisoned  g-1       2.0.0",
        "g-1: It has a back door.\\x1b[2J",
        "german: 2.0.0 is out of range; see `composable why german`",
    ]
    (finding,) = cli("audit", "--json").json["affected"]
    assert (finding["version"], finding["fix"], finding["fix_allowed"]) == ("1.2.0", "2.0.0", False)
    assert finding["advisory"]["text"] == text
    assert works("advise", "german", "--withdraw", "g-1", "--registry", "registry").out == (
        "withdrew advisory g-1\n"
    )
    assert works("audit").out == "2 locked experts, 1 advisory: none is affected\n"


def test_audit_names_the_upgrade(cli, works, installed, fakes):
    fakes.publish("german", "1.3.0", seed=5)
    advise = ("advise", "--registry", "registry", "--text", "Wrong.")
    works(*advise, "german<1.3", "--fixed", "1.3.0")
    assert cli("audit").out.splitlines()[-1] == "german: run `composable upgrade german`"
    works("upgrade", "german")
    works("audit")
    works(*advise, "physics")
    last = cli("audit").out.splitlines()[-1]
    assert (
        last == "physics: no release fixes it; run `composable remove physics && composable sync`"
    )


def test_what_cannot_be_advised(cli, project):
    common = ("--registry", "registry", "--text", "Wrong.")
    assert cli("advise", "german", "--registry", "registry").code == 2
    assert cli("advise", "german[code]", *common).code == 2
    assert "is not a kind of advisory" in cli("advise", "german", "--kind", "bad", *common).err
    assert "did you mean 'german'?" in cli("advise", "germn", *common).err
    assert "no advisory 'g-1'" in cli("advise", "german", "--withdraw", "g-1", *common).err


def test_audit_of_a_damaged_feed(cli, installed):
    Path("registry/advisories.jsonl").write_text('{"id": "g-1"}\n')
    outcome = cli("audit", "--json")
    assert (outcome.code, outcome.json["error"]["kind"]) == (1, "RegistryError")
    assert "advisories.jsonl" in outcome.json["error"]["where"]
