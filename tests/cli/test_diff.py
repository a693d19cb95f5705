"""`composable diff`: releases, folders, locks and generations."""

import pytest


@pytest.fixture
def two(fakes):
    """Publish two releases of an expert; return the folders they were published from."""
    return fakes.publish("german", "1.0.0"), fakes.publish("german", "1.1.0", seed=1)


def test_two_releases(works, two):
    works("init", "--registry", "registry")
    found = works("diff", "german@1.0.0", "german@1.1.0").out
    assert "expert.version" in found and "1.1.0" in found
    assert "slots.4" in found and "scout" in found
    table = works("diff", "german@1.0.0", two[1], "--json").json
    assert table["fields"][0] == {"field": "expert.version", "before": "1.0.0", "after": "1.1.0"}
    assert {"name", "shape", "norm", "difference"} <= table["matrices"][0].keys()
    assert "text" not in table


def test_an_expert_and_itself(works, two, tmp_path):
    assert works("diff", two[0], two[0], "--html", "page.html").out == "no difference\n"
    assert "<h2>Tensors</h2>" in (tmp_path / "page.html").read_text()


def test_locks_and_generations(works, two, tmp_path):
    works("init", "--registry", "registry")
    works("install", "german@1.0.0")
    first = (tmp_path / "composable.lock").read_text()
    (tmp_path / "old.lock").write_text(first)
    works("install", "german@1.1.0")
    rows = [
        line.split() for line in works("diff", "old.lock", "composable.lock").out.splitlines()[1:]
    ]
    assert rows == [["german", "1.0.0", "1.1.0"]]
    assert works("diff", "1", "2", "--json").json == {
        "experts": [{"name": "german", "before": "1.0.0", "after": "1.1.0"}],
        "text": {},
    }
    assert works("diff", ".", "composable.lock").out == "the same experts\n"


def test_what_cannot_be_compared(cli, works, two):
    works("init", "--registry", "registry")
    works("install", "german@1.0.0")
    outcome = cli("diff", "composable.lock", "german@1.1.0")
    assert outcome.code == 1 and "is a lock and german@1.1.0 an expert" in outcome.err
    outcome = cli("diff", "7", "1")
    assert outcome.code == 1 and "no generation 7" in outcome.err
    assert "kept generations: 1" in outcome.err
    assert "did you mean 'german'" in cli("diff", "germn@1.0.0", "german@1.1.0").err


def test_locks_on_text(works, make_fakes, tiny_backbone, tmp_path):
    fakes = make_fakes("registry", tiny_backbone)
    fakes.publish("german", "1.0.0")
    fakes.publish("german", "1.1.0", seed=1)
    works("init", "--registry", "registry", "--backbone", tiny_backbone)
    works("install", "german@1.0.0")
    (tmp_path / "old.lock").write_text((tmp_path / "composable.lock").read_text())
    works("install", "german@1.1.0")
    (tmp_path / "some.txt").write_text("the and of")
    command = ("diff", "old.lock", "composable.lock", "--data", "some.txt", "-q")
    assert works(*command, "--html", "page.html").out == ""
    table = works(*command, "--json").json
    (document,) = table["text"]["some.txt"]["documents"]
    assert document["id"] == "some.txt" and len(document["bits"]) == 3
    assert "<circle" in (tmp_path / "page.html").read_text()
