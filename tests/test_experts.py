import re
from pathlib import Path

import pytest

from composable.corpora.documents import read_documents
from composable.corpora.recipe import check_digests, load_recipe
from composable.packaging.manifests.manifest import Manifest

EXPERTS = Path(__file__).parents[1] / "experts"
FOLDERS = sorted(path for path in EXPERTS.iterdir() if path.is_dir())
MANIFESTS = [path for path in FOLDERS if (path / "expert.toml").is_file()]
RECIPES = [path for path in FOLDERS if (path / "recipe.toml").is_file()]
TEXTS = [path for path in MANIFESTS if (path / "text").is_dir()]


def by_name(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


def test_there_is_something_to_check():
    assert len(TEXTS) >= 3
    assert len(RECIPES) >= 4
    assert EXPERTS / "_template" in MANIFESTS


@by_name(FOLDERS)
def test_every_folder_says_what_it_is(folder):
    assert (folder / "README.md").stat().st_size > 0


@by_name(MANIFESTS)
def test_manifests_are_read_and_bear_their_folders_name(folder):
    manifest = Manifest.read(folder)
    assert manifest.name == ("my-expert" if folder.name == "_template" else folder.name)
    assert manifest.interface.name == manifest.backbone
    assert not manifest.is_packed


@by_name(RECIPES)
def test_recipes_are_pinned_and_copyleft_text_is_not_shipped(folder):
    recipe = load_recipe(folder)
    assert set(recipe.digests) == {"train", "heldout"}
    if re.search(r"GPL|GFDL", recipe.source.license):
        assert [path.name for path in sorted(folder.iterdir())] == ["README.md", "recipe.toml"]


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[i:] for i in range(5)), strict=False))


@by_name(TEXTS)
def test_shipped_text_is_the_recipes_and_heldout_text_is_unseen(folder):
    check_digests(load_recipe(folder), folder / "text")
    train = read_documents([folder / "text" / "train.jsonl"])
    heldout = read_documents([folder / "text" / "heldout.jsonl"])
    assert len(heldout) >= 12
    assert sum(len(document.text.encode()) for document in heldout) >= 100_000
    seen = [shingles(document.text) for document in train]
    for document in heldout:
        own = shingles(document.text)
        assert max(len(own & other) / min(len(own), len(other)) for other in seen) <= 0.5


def test_shipped_text_is_small():
    total = sum(file.stat().st_size for path in TEXTS for file in path.rglob("*.jsonl"))
    assert total <= 3_400_000
