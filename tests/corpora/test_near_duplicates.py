from composable.corpora.documents import Document
from composable.corpora.near_duplicates import find_families

WORDS = [f"word{i}" for i in range(1000)]


def text(start, stop):
    return " ".join(WORDS[start:stop])


def family_names(texts, **options):
    return find_families([Document(name, words) for name, words in texts.items()], **options)


def test_different_texts_are_families_of_their_own():
    assert find_families([Document("b", text(0, 50)), Document("a", text(50, 99))]) == {
        "a": "a",
        "b": "b",
    }


def test_overlap_is_measured_on_the_smaller_text():
    # 20 of the smaller text's 36 shingles are in the larger, whatever else the larger holds.
    texts = {"small": text(0, 40), "large": text(16, 900)}
    assert family_names(texts, max_overlap=0.56) == {"small": "small", "large": "large"}
    assert family_names(texts, max_overlap=0.55) == {"small": "large", "large": "large"}


def test_families_are_joined_by_chains():
    chain = {"a": text(0, 100), "b": text(40, 140), "c": text(80, 180), "d": text(500, 600)}
    assert family_names(chain) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_layout_and_case_do_not_hide_a_copy():
    copy = text(0, 60).upper().replace(" ", ",\n")
    found = find_families([Document("a", text(0, 60)), Document("b", copy)])
    assert found == {"a": "a", "b": "a"}


def test_a_pattern_names_families():
    ids = ["BSD-2", "BSD-3", "bsd", "CC-BY-4.0", "CC0-1.0", "0BSD"]
    found = find_families(
        [Document(name, text(100 * i, 100 * i + 50)) for i, name in enumerate(ids)],
        pattern=r"^[^\d._-]+",
    )
    assert found == {
        "BSD-2": "BSD-2",
        "BSD-3": "BSD-2",
        "bsd": "BSD-2",
        "CC-BY-4.0": "CC-BY-4.0",
        "CC0-1.0": "CC-BY-4.0",
        "0BSD": "0BSD",
    }


def test_the_order_of_documents_does_not_matter():
    documents = [Document(f"{i}", text(30 * i, 30 * i + 70)) for i in range(20)]
    assert find_families(documents) == find_families(documents[::-1])


def test_short_and_wordless_texts_are_families_of_their_own():
    assert len(set(find_families([Document("a", "!?"), Document("b", "!?")]).values())) == 2
    assert len(set(find_families([Document("a", "one"), Document("b", "one")]).values())) == 1
