"""A contributor's path through the commands, and the gate at its end."""

import dataclasses
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest

from composable.cli.bars import format_figures
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.manifests.template import find_template
from composable.packaging.registry.locations import open_for_publishing


def test_new_fills_in_the_template(works):
    works("new", "my-expert")
    manifest = Manifest.read(Path("my-expert"))
    assert (manifest.name, manifest.backbone) == ("my-expert", "tiny-bytes")
    assert Path("my-expert/README.md").read_text().startswith("# my-expert\n")


def test_new_refuses_a_name_that_is_taken(cli, works):
    works("new", "my-expert")
    Path("my-expert/README.md").write_text("mine")
    outcome = cli("new", "my-expert")
    assert outcome.code == 1
    assert "already exists" in outcome.err
    assert Path("my-expert/README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["My_Expert", "../elsewhere", "con"])
def test_new_refuses_what_no_package_may_be_called(cli, tmp_path, name):
    assert cli("new", name).code == 1
    assert list(tmp_path.iterdir()) == []


def test_train_asks_for_text(cli, works):
    works("new", "my-expert")
    outcome = cli("train", "my-expert")
    assert outcome.code == 2
    assert "--data" in outcome.err


def test_bad_manifest_is_named_by_dotted_path(cli, works):
    works("new", "my-expert")
    path = Path("my-expert/expert.toml")
    path.write_text(path.read_text().replace('kind = "ffn"', 'kind = "fnn"'))
    outcome = cli("check", "my-expert")
    assert outcome.code == 1
    assert outcome.err.startswith("error: expert.toml: body.kind: 'fnn'")
    assert "did you mean 'ffn'?" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beside", "all", "--results", "results", "--shard", "3/2"), "'3/2': expected I/N"),
        (("--beside", "all", "--results", "results", "--shard", "half"), "'half': expected I/N"),
        (("--beside", "all", "--shard", "1/2"), "needs --results"),
        (("--results", "results", "--shard", "1/2"), "needs --beside"),
    ],
)
def test_check_refuses_a_part_that_is_none(cli, works, options, message):
    works("new", "my-expert")
    outcome = cli("check", "my-expert", *options)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")


def test_publish_refuses_what_was_not_vetted(cli, fakes):
    folder = fakes.write("german")
    (folder / "card.json").unlink()
    outcome = cli("publish", folder, "--registry", "registry")
    assert outcome.code == 1
    assert "was not vetted" in outcome.err
    assert "composable check" in outcome.err
    assert not Path("registry").exists()


def test_publish_refuses_what_failed(cli, fakes):
    folder = fakes.write("german")
    fakes.vet(folder, passed=False)
    assert "a check failed" in cli("publish", folder, "--registry", "registry").err


def test_publish_refuses_what_changed_since_it_was_vetted(cli, fakes):
    folder = fakes.write("german")
    card = (folder / "card.json").read_bytes()
    fakes.write("german", seed=1)
    (folder / "card.json").write_bytes(card)
    assert "changed since" in cli("publish", folder, "--registry", "registry").err


def test_publish_again_changes_nothing_and_other_content_is_refused(cli, works, fakes):
    folder = fakes.write("german")
    works("publish", folder, "--registry", "registry")
    works("publish", folder, "--registry", "registry")
    fakes.write("german", seed=1)
    outcome = cli("publish", folder, "--registry", "registry")
    assert outcome.code == 1
    assert "already published with other content" in outcome.err
    assert "increase the version" in outcome.err


def test_publish_refuses_weights_that_nobody_compared(cli, works, fakes):
    works("publish", fakes.write("german", "1.0.0"), "--registry", "registry")
    folder = fakes.write("german", "1.1.0", seed=1)
    outcome = cli("publish", folder, "--registry", "registry")
    assert outcome.code == 1
    assert "1.1.0 is too small a step from german 1.0.0, for this is a major change" in outcome.err
    assert "its weights were not compared with those of 1.0.0" in outcome.err
    assert f"composable check {folder} --against german@1.0.0" in outcome.err
    fakes.compare(folder)
    works("publish", folder, "--registry", "registry")
    works("publish", fakes.write("german", "2.0.0", seed=2), "--registry", "registry")


def test_publish_refuses_what_got_worse_under_a_smaller_bump(cli, works, fakes):
    works("publish", fakes.write("german", "1.0.0"), "--registry", "registry")
    folder = fakes.write("german", "1.0.1", seed=1)
    fakes.compare(folder, ["2.00 to 2.40 bits per byte on its own text"])
    outcome = cli("publish", folder, "--registry", "registry", "--json")
    assert outcome.code == 1
    error = outcome.json["error"]
    assert error["kind"] == "VettingError"
    assert "2.00 to 2.40 bits per byte" in error["message"]
    assert error["where"].endswith("expert.toml: expert.version")
    assert error["hint"] == 'write version = "2.0.0"'
    assert [str(r.version) for r in open_for_publishing("registry").versions("german")] == ["1.0.0"]


def test_publish_refuses_less_or_more_under_a_smaller_bump(cli, works, fakes):
    """The weights are the same; what the manifest promises is not."""
    works("publish", fakes.write("german", "1.0.0"), "--registry", "registry")
    folder = fakes.write("german", "1.0.1")
    manifest = folder / "expert.toml"
    text = manifest.read_text()
    manifest.write_text(text.replace('domains = ["nothing"]', 'domains = ["nothing", "less"]'))
    outcome = cli("publish", folder, "--registry", "registry")
    assert outcome.code == 1
    assert "a minor change: domains: 'less' is new" in outcome.err
    assert 'write version = "1.1.0"' in outcome.err
    manifest.write_text(text.replace('domains = ["nothing"]', "domains = []"))
    assert 'write version = "2.0.0"' in cli("publish", folder, "--registry", "registry").err
    manifest.write_text(text)
    works("publish", folder, "--registry", "registry")


@pytest.mark.parametrize(
    "field", ["expert.description", "expert.license", "training.data"], ids=lambda field: field
)
def test_publish_refuses_the_texts_of_the_template(cli, works, fakes, field):
    template = Manifest.read(find_template())
    folder = fakes.write("german")
    own = Manifest.read(folder)
    changes = {
        "expert.description": {"description": template.description},
        "expert.license": {"license": template.license},
        "training.data": {"training": template.training},
    }
    changed = dataclasses.replace(own, **changes[field])
    (folder / "expert.toml").write_text(changed.to_toml())
    outcome = cli("publish", folder, "--registry", "registry", "--json")
    assert outcome.code == 1
    error = outcome.json["error"]
    assert error["kind"] == "ManifestError"
    assert "is the placeholder of the template" in error["message"]
    assert error["where"] == f"{folder}/expert.toml: {field}"
    assert error["hint"].startswith(f"edit {field} in {folder}/expert.toml")
    assert not Path("registry").exists()
    (folder / "expert.toml").write_text(own.to_toml())
    works("publish", folder, "--registry", "registry")


def test_figures_of_training_say_that_they_are_of_training_text():
    figures = {"loss": 2.0, "scout_bits": 3.0, "tokens_per_second": 1500.0}
    expected = "training text 2.885 bits per token, scout 3.000, 1,500 tokens/s"
    assert format_figures(figures) == expected
    assert format_figures({}) == ""


def test_publish_refuses_a_licence_that_is_no_expression(cli, works, fakes):
    folder = fakes.write("german")
    manifest = folder / "expert.toml"
    own = manifest.read_text()
    manifest.write_text(own.replace("[expert]", '[expert]\nlicense = "Apache 2"', 1))
    outcome = cli("publish", folder, "--registry", "registry", "--json")
    assert (outcome.code, outcome.json["error"]["kind"]) == (1, "ManifestError")
    assert "'Apache 2' is not an SPDX licence expression" in outcome.json["error"]["message"]
    assert outcome.json["error"]["where"] == f"{folder}/expert.toml: expert.license"
    manifest.write_text(own.replace("[expert]", '[expert]\nlicense = "apache-2.0"', 1))
    works("publish", folder, "--registry", "registry")


def test_publish_refuses_a_truncated_file(cli, fakes):
    folder = fakes.write("german")
    body = folder / "body.safetensors"
    body.write_bytes(body.read_bytes()[:-1])
    fakes.vet(folder)
    outcome = cli("publish", folder, "--registry", "registry", "--json")
    assert outcome.code == 1
    assert outcome.json["error"]["kind"] == "TensorFileError"
    assert "body.safetensors" in outcome.json["error"]["where"]


def test_publish_refuses_nan_weights(cli, fakes):
    folder = fakes.write("german")
    scout = folder / "scout.safetensors"
    scout.write_bytes(scout.read_bytes()[:-4] + struct.pack("<f", math.nan))
    fakes.vet(folder)
    outcome = cli("publish", folder, "--registry", "registry", "--json")
    assert outcome.code == 1
    assert "not finite" in outcome.json["error"]["message"]


def test_publish_refuses_another_interface(cli, fakes):
    folder = fakes.write("german", needs="^9.0")
    outcome = cli("publish", folder, "--registry", "registry")
    assert outcome.code == 1
    assert "expert.toml: interface.requires" in outcome.err


def test_registry_can_come_from_the_environment(works, fakes, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPOSABLE_REGISTRY", str(tmp_path / "registry"))
    works("publish", fakes.write("german"))
    assert [
        str(r.version) for r in open_for_publishing(tmp_path / "registry").versions("german")
    ] == ["1.0.0"]
    works("yank", "german@1.0.0")
    assert open_for_publishing(tmp_path / "registry").versions("german")[0].is_yanked


def test_yanked_is_not_chosen_but_stays_locked(cli, works, project):
    works("install", "german<2")
    works("yank", "german@1.2.0", "--registry", "registry")
    assert works("sync").out == "nothing to change: 1 expert\n"
    assert works("upgrade").out == "~ german 1.2.0 -> 1.0.0\n"
    works("unyank", "german@1.2.0", "--registry", "registry")
    assert works("upgrade").out == "~ german 1.0.0 -> 1.2.0\n"


def test_yank_of_a_release_that_is_not_there(cli, project):
    outcome = cli("yank", "german@7.0.0", "--registry", "registry")
    assert outcome.code == 1
    assert "available: 1.0.0, 1.2.0, 2.0.0" in outcome.err


@pytest.mark.slow
@pytest.mark.usefixtures("one_scout_pass")
def test_from_new_to_published(cli, works, tiny_backbone, monkeypatch):
    """The whole path on a backbone of noise: whatever vetting says, publishing obeys."""
    # Training changes it for its process, which is that of all tests here.
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    from composable.workflows.workspace import WORK

    backbone = ("--backbone", tiny_backbone)
    works("new", "my-expert", *backbone)
    assert Manifest.read(Path("my-expert")).backbone == "tiny"
    outcome = cli("check", "my-expert", *backbone)
    assert outcome.code == 1
    assert "was not trained yet" in outcome.err

    Path("texts").mkdir()
    for index in range(12):
        Path(f"texts/{index}.txt").write_text(f"{index} and {index} is {2 * index}. " * 10)
    Path("empty.txt").touch()
    outcome = cli("train", "my-expert", "--data", "empty.txt", *backbone)
    assert outcome.code == 1
    assert "empty.txt" in outcome.err

    manifest = Path("my-expert/expert.toml")
    text = manifest.read_text()
    manifest.write_text(text.replace("width = 16", "width = 64"))
    outcome = cli("train", "my-expert", "--data", "texts", *backbone)
    assert outcome.code == 1
    assert "scout.width: 64 is not a width between 1 and 16" in outcome.err
    manifest.write_text(text.replace("# derives-from", "derives-from"))
    for more, reason in (((), "no registry"), (("--registry", "registry"), "is not a registry")):
        outcome = cli("train", "my-expert", "--data", "texts", *more, *backbone)
        assert outcome.code == 1
        assert reason in outcome.err
    manifest.write_text(text)

    texts = sorted(Path("texts").iterdir())
    record = works("train", "my-expert", "--data", *texts, "--steps", 3, "--json", *backbone).json
    heldout = Path("my-expert", WORK, "heldout.jsonl").read_text().splitlines()
    assert record["documents"] + len(heldout) == 12
    told = works("train", "my-expert", "--data", *texts, "--steps", 3, *backbone).out
    assert f" s on 12 documents, {len(heldout)} of them held out: " in told
    again = works("train", "my-expert", "--data", *texts, "--steps", 3, "--json", *backbone).json
    assert again["last"] == {}  # all steps were done before

    outcome = cli("train", "my-expert", "--data", *texts, "--steps", 4, *backbone)
    assert outcome.code == 1
    assert "written with another steps" in outcome.err
    outcome = cli("train", "my-expert", "--data", *texts, "--sweep", "width=3", *backbone)
    assert outcome.code == 1
    assert "--sweep: 'width=3' is not a setting and its values" in outcome.err
    swept = ("train", "my-expert", "--data", *texts, "--steps", 3, "--sweep", "seed=0,1", *backbone)
    found = works(*swept, "--json").json
    assert sorted(row["name"] for row in found["variants"]) == ["seed=0", "seed=1"]
    assert found["kept"] == found["variants"][0]["name"]
    assert works(*swept).out.splitlines()[-1] == f"kept {found['kept']} as my-expert"

    for name in ("left", "right"):
        works("new", name, *backbone)
    both = ("train", "left", "right", "--steps", 3, *backbone)
    outcome = cli(*both, "--data", "left=texts")
    assert outcome.code == 2
    assert "no training text given for right" in outcome.err
    assert cli(*both, "--data", "texts", "--sweep", "seed=0,1").code == 2
    found = works(*both, "--data", "texts", "--json").json["experts"]
    assert {row["folder"] for row in found} == {"left", "right"}
    assert found[0]["bits_per_token"] <= found[1]["bits_per_token"]
    assert found[0]["training"]["documents"] == found[1]["training"]["documents"]
    assert works(*both, "--data", "texts").out.splitlines()[0].split()[:2] == ["expert", "text"]

    outcome = cli("check", "my-expert", "--json", *backbone)
    assert outcome.code in (0, 1), outcome.err
    card = json.loads(Path("my-expert/card.json").read_text())
    assert outcome.code == (0 if card["passed"] else 1)
    assert outcome.json["checks"] == card["checks"]
    bits = card["measured"]["class_bits_per_byte"]
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: the scout")]
    assert [warning.removeprefix("warning: ") for warning in warnings] == outcome.json["warnings"]
    assert len(warnings) == int(bits["scout"] < bits["body"])
    shutil.copytree("my-expert", "older")
    again = cli("check", "my-expert", "--against", "./older", "--json", *backbone)
    assert again.code == outcome.code
    step = again.json["against"]
    assert (step["release"], step["needs"]) == ("my-expert@0.1.0", "patch")
    assert (step["enough"], step["write"], step["changes"]) == (True, None, [])
    assert "'my-expert' cannot be its own peer" in (
        cli("check", "my-expert", "--beside", "./older", *backbone).err
    )
    copied = Path("older/expert.toml")
    copied.write_text(copied.read_text().replace('name = "my-expert"', 'name = "older"'))
    outcome_beside = cli("check", "my-expert", "--beside", "./older", "--json", *backbone)
    checks = {check["name"]: check for check in outcome_beside.json["checks"]}
    assert outcome_beside.code == 1
    assert not checks["copied"]["passed"]
    assert "1.00 with that of older@0.1.0" in checks["copied"]["found"]
    card_beside = Path("my-expert/card.json").read_bytes()
    shard = ("check", "my-expert", "--beside", "./older", "--results", "results", "--shard")
    for part, units in (("1/2", 4), ("2/2", 0)):  # both experts have one scout
        found = works(*shard, part, "--json", *backbone).json
        assert (found["shard"], found["units"], found["done"]) == (part, units, units)
    assert "shard 1/2: 4 of 4 results are in" in works(*shard, "1/2", *backbone).out
    records = sorted(path.stat().st_mtime_ns for path in Path("results/records").rglob("*"))
    assert cli(*shard[:-1], "--jobs", 1, *backbone).code == 1
    assert Path("my-expert/card.json").read_bytes() == card_beside
    assert sorted(path.stat().st_mtime_ns for path in Path("results/records").rglob("*")) == records
    shutil.copy(Path("my-expert/expert.toml"), copied)
    cli("check", "my-expert", *backbone)
    manifest.write_text(text.replace("languages = []", 'languages = ["en"]'))
    told = cli("check", "my-expert", "--against", "./older", *backbone)
    assert told.code == 1
    assert "0.1.0 to 0.1.0: a minor change (languages: 'en' is new); write" in told.out
    manifest.write_text(text)
    if card["passed"]:
        refused = cli("publish", "my-expert", "--registry", "registry", *backbone)
        assert "are placeholders of the template" in refused.err, "all of them at once"
    template = Manifest.read(find_template())
    for placeholder in (template.description, template.training.data):
        text = text.replace(placeholder, "Chosen.")
    text = text.replace(template.license, "Apache-2.0")
    manifest.write_text(text)
    published = cli("publish", "my-expert", "--registry", "registry", *backbone)
    assert published.code == outcome.code
    if card["passed"]:
        (release,) = open_for_publishing("registry").versions("my-expert")
        assert WORK in {path.name for path in Path("my-expert").iterdir()}
        assert sorted(file.name for file in release.files) == [
            "README.md",
            "body.safetensors",
            "card.json",
            "scout.safetensors",
        ]
