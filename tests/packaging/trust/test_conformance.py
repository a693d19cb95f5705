"""What a TUF client must accept and refuse: every case of the public suite tuf-conformance.

Each test is named after its case there; the suite itself runs with `benchmarks/tuf_client.py`.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Metadata

from tests.support.tuf_repositories import START, Client, Repository

DAY = datetime.timedelta(days=1)
ALL = ("targets", "snapshot", "timestamp")


@pytest.fixture
def repo() -> Repository:
    return Repository()


@pytest.fixture
def client(repo: Repository, tmp_path: Path) -> Client:
    return Client(repo, tmp_path / "state")


def asked(repo: Repository) -> list[str]:
    found = repo.storage.asked
    repo.storage.asked = []
    return found


# Basics.


def test_basic_refresh(repo: Repository, client: Client) -> None:
    assert client.refresh() is None
    assert asked(repo) == [
        "1.root.json",
        "2.root.json",
        "timestamp.json",
        "1.snapshot.json",
        "1.targets.json",
    ]
    assert client.refresh() is None
    assert asked(repo) == ["2.root.json", "timestamp.json"]
    assert [client.version(role) for role in ("root", "timestamp", *ALL[:2])] == [1, 1, 1, 1]


def test_implicit_refresh(repo: Repository, client: Client) -> None:
    assert client.read("nothing") == [None]
    assert client.version("targets") == 1


def test_invalid_initial_root(repo: Repository, client: Client) -> None:
    root = json.loads(repo.storage.files["trust/1.root.json"])
    del root["signed"]["version"]
    repo.storage.files["trust/1.root.json"] = json.dumps(root).encode()
    assert client.refresh() == "wrong-content"
    assert client.kept("root") is client.kept("timestamp") is None


def test_unsigned_initial_root(repo: Repository, client: Client) -> None:
    root = json.loads(repo.storage.files["trust/1.root.json"])
    root["signatures"][0]["sig"] = "00" * 64
    repo.storage.files["trust/1.root.json"] = json.dumps(root).encode()
    assert client.refresh() == "wrong-signer"
    assert client.kept("root") is client.kept("timestamp") is None


@pytest.mark.parametrize("role", ["root", *ALL])
def test_unsigned_metadata(repo: Repository, client: Client, role: str) -> None:
    assert client.refresh() is None
    repo.signers[role] = []
    repo.publish(*(["root"] if role == "root" else []), *ALL)
    assert client.refresh() == "wrong-signer"
    assert client.version(role) == 1


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_url_and_metadata_version_mismatch(repo: Repository, client: Client, role: str) -> None:
    assert client.refresh() is None
    repo[role].version += 1  # the file is named 2 and says 3
    path = repo.path(role, 2)
    repo.publish(role)
    repo.storage.files[path] = repo.storage.files.pop(repo.path(role, 3))
    if role == "targets":
        repo["snapshot"].meta["targets.json"].version = 2
        repo.publish("snapshot")
    elif role == "snapshot":
        repo["timestamp"].snapshot_meta.version = 2
    repo.publish("timestamp")
    assert client.refresh() == "mix-and-match"
    assert client.version(role) == 1


def test_timestamp_content_changes(repo: Repository, client: Client) -> None:
    assert client.refresh() is None
    before = client.kept("timestamp")
    repo["timestamp"].expires += DAY
    repo["timestamp"].version -= 1
    repo.publish("timestamp")
    assert client.refresh() is None
    assert client.kept("timestamp") == before


def test_basic_metadata_hash_support(tmp_path: Path) -> None:
    repo = Repository(has_digests=True)
    assert Client(repo, tmp_path).refresh() is None


@pytest.mark.parametrize("role", ["targets", "snapshot"])
def test_hash_mismatch(tmp_path: Path, role: str) -> None:
    repo = Repository(has_digests=True)
    client = Client(repo, tmp_path)
    assert client.refresh() is None
    repo.publish(role)
    meta = repo["snapshot"].meta["targets.json"] if role == "targets" else None
    meta = meta or repo["timestamp"].snapshot_meta
    meta.hashes["sha256"] = "0" * 64
    repo.publish(*(["snapshot"] if role == "targets" else []), "timestamp")
    assert client.refresh() == "mix-and-match"
    assert client.version(role) == 1


def test_metadata_bytes_match(repo: Repository, client: Client) -> None:
    repo.storage.files["trust/timestamp.json"] += b" \n"
    assert client.refresh() is None
    assert client.kept("timestamp") == repo.storage.files["trust/timestamp.json"]


def test_custom_fields(repo: Repository, client: Client) -> None:
    for role in ("root", *ALL):
        repo[role].unrecognized_fields["extra"] = {"field": ["of", 1]}
    repo.publish("root", *ALL)
    assert client.refresh() is None
    assert client.version("root") == client.version("targets") == 2


def test_deprecated_keyid_hash_algorithms(repo: Repository, client: Client) -> None:
    repo.rotate("snapshot")
    key = repo["root"].keys[repo["root"].roles["snapshot"].keyids[0]]
    key.unrecognized_fields["keyid_hash_algorithms"] = "md5"
    repo.publish("root", *ALL[1:])
    assert client.refresh() is None
    assert client.version("snapshot") == 2


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_missing_metadata(repo: Repository, client: Client, role: str) -> None:
    assert client.refresh() is None
    repo.publish(*ALL)
    del repo.storage.files[repo.path(role, 2)]
    assert client.refresh() == "incomplete"
    assert client.version(role) == 1
    assert client.version("timestamp") == 2


def test_missing_timestamp(repo: Repository, client: Client) -> None:
    assert client.refresh() is None
    repo.forget("timestamp")
    assert client.refresh() == "unsigned"


def test_incorrect_metadata_type(repo: Repository, client: Client) -> None:
    """A snapshot that is signed by the key of the timestamp, where a timestamp belongs."""
    assert client.refresh() is None
    repo.signers["snapshot"] = repo.signers["timestamp"]
    repo["snapshot"].version = 5
    snapshot = repo.sign("snapshot")
    repo.storage.files["trust/timestamp.json"] = snapshot.to_bytes()
    assert client.refresh() == "wrong-content"
    assert client.version("timestamp") == 1


def test_the_clock_is_ours(repo: Repository, client: Client) -> None:
    repo["root"].expires = START + 7 * DAY
    repo.publish("root")
    assert client.refresh() is None
    repo.now = START + 8 * DAY
    assert client.refresh() == "expired"


# Expiry.


def test_root_expired(repo: Repository, client: Client) -> None:
    assert client.refresh() is None
    repo["root"].expires = START - DAY
    repo.publish("root", *ALL)
    assert client.refresh() == "expired"
    assert client.version("root") == 2
    assert client.version("timestamp") == 1


@pytest.mark.parametrize(
    ("role", "kind"), [("timestamp", "freeze"), ("snapshot", "freeze"), ("targets", "expired")]
)
def test_expired(repo: Repository, client: Client, role: str, kind: str) -> None:
    assert client.refresh() is None
    repo[role].expires = START - 5 * DAY
    repo.publish(*ALL)
    assert client.refresh() == kind
    assert client.version(role) == 1


@pytest.mark.parametrize("role", ["root", "timestamp"])
def test_what_is_kept_may_expire(repo: Repository, client: Client, role: str) -> None:
    repo[role].expires = START + 7 * DAY
    repo.publish(role)
    assert client.refresh() is None
    repo[role].expires = START + 21 * DAY
    repo.publish(*(["root"] if role == "root" else []), *ALL)
    repo.now = START + 18 * DAY
    assert client.refresh() is None
    assert client.version("snapshot") == 2


# Documents.


@pytest.mark.parametrize("name", ["file", "path/to/file"])
def test_client_reads_expected_document(repo: Repository, client: Client, name: str) -> None:
    repo.add_target("targets", name, b"content")
    repo.publish(*ALL)
    assert client.read(name) == [b"content"]


def test_repository_substitutes_document(repo: Repository, client: Client) -> None:
    repo.add_target("targets", "file", b"content")
    repo.publish(*ALL)
    for path in repo.storage.files:
        if path.startswith("blobs/"):
            repo.storage.files[path] = b"another"
    assert client.read("file") == ["wrong-content"]


def test_multiple_changes_to_document(repo: Repository, client: Client) -> None:
    for number in range(3):
        repo.add_target("targets", "file", b"content %d" % number)
        repo.publish(*ALL)
        assert client.read("file") == [b"content %d" % number]


@pytest.mark.parametrize("hashes", [["sha256"], ["sha512", "sha256"]])
def test_hash_algorithms(repo: Repository, client: Client, hashes: list[str]) -> None:
    repo.add_target("targets", "file", b"content", hashes)
    repo.publish(*ALL)
    assert client.read("file") == [b"content"]


def test_a_document_needs_a_digest_to_be_stored_by(repo: Repository, client: Client) -> None:
    """The specification demands none; documents of a registry are stored by SHA-256."""
    repo.add_target("targets", "file", b"content", ["sha512"])
    repo.publish(*ALL)
    assert client.read("file") == ["wrong-content"]


def test_unknown_hash_algorithm(repo: Repository, client: Client) -> None:
    repo.add_target("targets", "file", b"content")
    hashes = repo["targets"].targets["file"].hashes
    hashes["unknown"] = hashes.pop("sha256")
    repo.publish(*ALL)
    assert client.read("file") == ["wrong-content"]


# Keys.


def test_snapshot_does_not_meet_threshold(repo: Repository, client: Client) -> None:
    repo.add_key("snapshot")
    repo.add_key("snapshot")
    repo["root"].roles["snapshot"].threshold = 3
    repo.publish("root", *ALL)
    assert client.refresh() is None
    repo.signers["snapshot"].pop()
    repo.publish(*ALL)
    assert client.refresh() == "wrong-signer"
    assert client.version("snapshot") == 2


def test_snapshot_has_too_few_keys(repo: Repository, client: Client) -> None:
    repo["root"].roles["snapshot"].threshold = 6
    repo.publish("root", *ALL)
    assert client.refresh() == "wrong-signer"
    assert client.version("root") == 2


def test_duplicate_signatures_count_once(repo: Repository, client: Client) -> None:
    repo.add_key("snapshot")
    repo["root"].roles["snapshot"].threshold = 2
    repo.signers["snapshot"].pop()
    repo.publish("root", *ALL)
    path = repo.path("snapshot", 2)
    metadata = json.loads(repo.storage.files[path])
    metadata["signatures"] *= 2
    repo.storage.files[path] = json.dumps(metadata).encode()
    assert client.refresh() == "wrong-content"


def test_one_valid_signature_is_enough(repo: Repository, client: Client) -> None:
    other = repo.signers["timestamp"][0]
    repo.add_key("timestamp")
    repo.publish("root", "timestamp")
    metadata = Metadata.from_bytes(repo.storage.files["trust/timestamp.json"])
    for text in ("00" * 64, ""):
        metadata.signatures[other.public_key.keyid].signature = text
        repo.storage.files["trust/timestamp.json"] = metadata.to_bytes()
        assert client.refresh() is None


@pytest.mark.parametrize("role", ["?", "#", "/delegated", "../delegated"])
def test_unusual_role_name(repo: Repository, client: Client, role: str) -> None:
    repo.delegate("targets", DelegatedRole(role, [], 1, False, ["*"]))
    repo.publish(role, *ALL)
    assert client.read("missing") == [None]
    assert repo.path(role, 1).removeprefix("trust/") in asked(repo)
    assert client.version(role) == 1
    assert all(path.parent == client.state for path in client.state.rglob("*.json"))


# Rollback.


def test_timestamp_rollback(repo: Repository, client: Client) -> None:
    repo.publish("timestamp")
    assert client.refresh() is None
    repo["timestamp"].version = 0
    repo.publish("timestamp")
    assert client.refresh() == "rollback"
    assert client.version("timestamp") == 2


@pytest.mark.parametrize("role", ["snapshot", "targets"])
@pytest.mark.parametrize("has_digests", [False, True])
def test_rollback(tmp_path: Path, role: str, has_digests: bool) -> None:
    repo = Repository(has_digests=has_digests)
    client = Client(repo, tmp_path)
    repo.publish(*ALL)
    assert client.refresh() is None
    repo[role].version = 0
    repo.publish(role)
    repo.publish(*(["snapshot"] if role == "targets" else []), "timestamp")
    assert client.refresh() == "rollback"
    assert client.version(role) == 2


def test_role_removal(repo: Repository, client: Client) -> None:
    repo.delegate("targets", DelegatedRole("delegated", [], 1, False, ["path/*"]))
    repo.publish("delegated", *ALL)
    assert client.refresh() is None
    del repo["snapshot"].meta["delegated.json"]
    repo.publish(*ALL[1:])
    assert client.refresh() == "rollback"
    assert client.version("snapshot") == 2


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_fast_forward_recovery(repo: Repository, client: Client, role: str) -> None:
    """After versions were used up, new keys of what lists them let them start again."""
    repo[role].version = 99
    repo.publish(role)
    repo.publish(*ALL[1:] if role == "targets" else ["timestamp"] if role == "snapshot" else [])
    assert client.refresh() is None
    assert client.version(role) == 100
    for listing in {"targets": ["snapshot"], "snapshot": ["snapshot", "timestamp"]}.get(
        role, ["timestamp"]
    ):
        repo.rotate(listing)
    repo[role].version = 0
    repo.publish("root", *ALL)
    assert client.refresh() is None
    assert client.version(role) == 1


# Delegations.

GRAPHS: dict[str, tuple[list[tuple[str, str, bool, str]], list[str]]] = {
    "one": ([("targets", "A", False, "*")], ["A"]),
    "two": ([("targets", "A", False, "*"), ("targets", "B", False, "*")], ["A", "B"]),
    "two levels": (
        [("targets", "A", False, "*"), ("targets", "B", False, "*"), ("B", "C", False, "*")],
        ["A", "B", "C"],
    ),
    "depth first": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("A", "C", False, "*"),
            ("A", "D", False, "*"),
        ],
        ["A", "C", "D", "B"],
    ),
    "depth first, three levels": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("A", "C", False, "*"),
            ("C", "D", False, "*"),
        ],
        ["A", "C", "D", "B"],
    ),
    "terminating, two levels": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("A", "C", True, "*"),
            ("A", "D", False, "*"),
        ],
        ["A", "C"],
    ),
    "terminating, three levels": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("A", "C", True, "*"),
            ("C", "D", False, "*"),
        ],
        ["A", "C", "D"],
    ),
    "paths, two levels": (
        [("targets", "A", False, "*.py"), ("targets", "B", False, "*"), ("A", "C", False, "*")],
        ["B"],
    ),
    "paths, three levels": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("A", "C", False, "*.py"),
            ("C", "D", False, "*"),
        ],
        ["A", "B"],
    ),
    "cycle": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("B", "C", False, "*"),
            ("C", "D", False, "*"),
            ("D", "B", False, "*"),
        ],
        ["A", "B", "C", "D"],
    ),
    "diamond": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("B", "C", False, "*"),
            ("A", "C", False, "*"),
        ],
        ["A", "C", "B"],
    ),
    "diamond, other paths": (
        [
            ("targets", "A", False, "*"),
            ("targets", "B", False, "*"),
            ("B", "C", False, "*"),
            ("A", "C", False, "*.py"),
        ],
        ["A", "B", "C"],
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_traversal(repo: Repository, client: Client, graph: str) -> None:
    delegations, order = GRAPHS[graph]
    for delegator, role, is_final, pattern in delegations:
        repo.delegate(delegator, DelegatedRole(role, [], 1, is_final, [pattern]))
    names = dict.fromkeys(role for _, role, _, _ in delegations)
    repo.publish(*names, *ALL)
    assert client.read("missing") == [None]
    assert asked(repo)[5:] == [f"1.{role}.json" for role in order]


SEARCHES = {
    "file": (True, []),
    "README.md": (True, ["A"]),
    "releases/x/x_v1": (True, ["B", "C"]),
    "releases/y/y_v1.zip": (True, ["B", "D"]),
    "releases/z/z_v1.zip": (False, ["B"]),
    "releases/README.md": (False, []),
    "foo-1.tgz": (True, ["A"]),
    "foo-alpha.tgz": (False, []),
    "README.MD": (False, []),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_document_search(repo: Repository, client: Client, name: str) -> None:
    paths = {
        "A": ("targets", ["*.doc", "*.md", "foo-?.tgz"]),
        "B": ("targets", ["releases/*/*"]),
        "C": ("B", ["releases/x/*"]),
        "D": ("B", ["releases/y/*.zip"]),
    }
    for role, (delegator, patterns) in paths.items():
        repo.delegate(delegator, DelegatedRole(role, [], 1, False, patterns))
    for role, listed in (
        ("targets", "file"),
        ("A", "README.md"),
        ("A", "releases/README.md"),
        ("A", "foo-1.tgz"),
        ("A", "foo-alpha.tgz"),
        ("C", "releases/x/x_v1"),
        ("D", "releases/y/y_v1.zip"),
        ("D", "releases/z/z_v1.zip"),
    ):
        repo.add_target(role, listed, f"{listed} by {role}".encode())
    repo.publish(*paths, *ALL)
    found, order = SEARCHES[name]
    (data,) = client.read(name)
    assert (data is not None) == found
    visited = [path for path in asked(repo)[5:] if not path.startswith("blobs/")]
    assert visited == [f"1.{role}.json" for role in order]


def test_cached_role_is_verified_against_current_delegator(
    repo: Repository, client: Client
) -> None:
    for team in ("a", "b"):
        repo.delegate("targets", DelegatedRole(f"parent-{team}", [], 1, False, [f"{team}/*"]))
        role = DelegatedRole("release", [], 1, False, [f"{team}/*"])
        repo.delegate(f"parent-{team}", role)
    repo.signers["release"].pop()  # the key that the second parent knows
    for team in ("a", "b"):
        repo.add_target("release", f"{team}/file", team.encode())
    repo.publish("release", "parent-a", "parent-b", *ALL)
    assert client.read("a/file", "b/file") == [b"a", "wrong-signer"]


def test_delegation_not_in_snapshot(repo: Repository, client: Client) -> None:
    repo.delegate("targets", DelegatedRole("delegated", [], 1, False, ["path/*"]))
    repo.add_target("delegated", "path/file", b"content")
    repo.publish("delegated", "targets")
    del repo["snapshot"].meta["delegated.json"]
    repo.publish("snapshot", "timestamp")
    assert client.read("path/file") == ["incomplete"]


# Changes of keys: the keys, the threshold and the signatures of each version, and whether it holds.

Version = tuple[list[int], int, list[int]]
ROOTS: dict[str, tuple[list[Version], bool]] = {
    "one key, signed by both": ([([1], 1, [1]), ([2], 1, [2, 1]), ([2], 1, [2])], True),
    "unused signatures": ([([1], 1, [3, 1, 4]), ([2], 1, [3, 2, 1, 4]), ([2], 1, [3, 2, 4])], True),
    "3 of 5, other combinations": (
        [([0, 1, 2, 3, 4], 3, sigs) for sigs in ([0, 2, 4], [0, 4, 1], [0, 1, 3], [0, 1, 3])],
        True,
    ),
    "3 of 5, one key": ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 1])], True),
    "3 of 5, one key in steps": (
        [
            ([0, 1, 2, 3, 4], 3, [0, 2, 4]),
            ([0, 1, 3, 4, 5], 3, [0, 2, 4, 5]),
            ([0, 1, 3, 4, 5], 3, [0, 4, 5]),
        ],
        True,
    ),
    "3 of 5, all keys in steps": (
        [
            ([0, 1, 2, 3, 4], 3, [0, 2, 4]),
            ([5, 6, 7, 8, 9], 3, [0, 2, 4, 5, 6, 7]),
            ([5, 6, 7, 8, 9], 3, [5, 6, 7]),
        ],
        True,
    ),
    "1 of 3 to 2 of 3": ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [1, 2])], True),
    "2 of 3 to 1 of 3": (
        [([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1, 2]), ([1, 2, 3], 1, [1])],
        True,
    ),
    "1 of 1 to 2 of 2": ([([1], 1, [1]), ([1, 2], 2, [1, 2])], True),
    "not signed with the old key": ([([1], 1, [1]), ([2], 1, [2, 3, 4])], False),
    "not signed with the new key": ([([1], 1, [1]), ([2], 1, [1, 3, 4])], False),
    "too few new keys": (
        [([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 2, 4])],
        False,
    ),
    "too few old keys": (
        [([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 5])],
        False,
    ),
    "new threshold not reached": ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [2])], False),
    "old threshold not reached": ([([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1])], False),
}
SIGNERS = [CryptoSigner.generate_ed25519() for _ in range(10)]


def pick(numbers: list[int]) -> list[CryptoSigner]:
    return [SIGNERS[number] for number in numbers]


@pytest.mark.parametrize("case", ROOTS)
def test_root_rotation(repo: Repository, client: Client, case: str) -> None:
    versions, holds = ROOTS[case]
    repo.forget("root")
    repo["root"].version = 0
    for keys, threshold, sigs in versions:
        repo.set_keys("root", pick(keys), threshold, pick(sigs))
        repo.publish("root")
    repo.publish(*ALL)
    assert (client.refresh() is None) == holds
    newest = len(versions) if holds else len(versions) - 1
    assert client.kept("root") == repo.storage.files[f"trust/{newest}.root.json"]


OTHERS: dict[str, tuple[Version, bool]] = {
    "one key": (([2], 1, [2]), True),
    "unused signatures": (([1], 1, [3, 1, 4]), True),
    "not signed with the new key": (([2], 1, [1, 3, 4]), False),
    "one wrong signature": (([0, 1, 3, 4, 5], 3, [0, 2, 4]), False),
    "one signature is missing": (([0, 1, 3, 4, 5], 3, [0, 4]), False),
    **{
        f"3 of 5: {sigs}": (([0, 1, 2, 3, 4], 3, sigs), True)
        for sigs in ([0, 2, 4], [0, 4, 1], [0, 1, 3], [1, 2, 3], [2, 3, 4])
    },
}


@pytest.mark.parametrize("role", ALL)
@pytest.mark.parametrize("case", OTHERS)
def test_other_rotations(repo: Repository, client: Client, case: str, role: str) -> None:
    assert client.refresh() is None
    (keys, threshold, sigs), holds = OTHERS[case]
    repo.set_keys(role, pick(keys), threshold, pick(sigs))
    repo.publish("root", *ALL)
    assert client.refresh() == (None if holds else "wrong-signer")
    assert client.version(role) == (2 if holds else 1)
