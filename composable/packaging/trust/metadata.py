"""The TUF metadata of a signed registry: its roles, its files, and who may publish what.

    trust/<n>.root.json               the keys of all roles here; signed by 2 of 3 offline keys
    trust/<n>.targets.json            who may publish what; signed by 2 of the same keys
    trust/<n>.bin-<xx>.json           the same for one part of the names, beyond 2,000 publishers
    trust/<n>.publisher-<name>.json   the index of each package of a publisher; signed by its key
    trust/<n>.registry.json           the catalogue; signed by the online key
    trust/<n>.advisories.json         the feed of advisories; signed by one of the offline keys
    trust/<n>.snapshot.json           the current version of all of these; signed by the online key
    trust/timestamp.json              the current snapshot, and until when; signed by the online key
    trust-pending/<n>.<role>.json     a change that still lacks signatures of offline keys

A target is a document by its name: `german` is the index of that package, and `catalog.jsonl` and
`advisories.jsonl` are themselves. Their bytes are stored as blobs, so that a client never mixes two
states. The formats are those of the TUF specification 1.0, with consistent snapshots.
"""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Targets
from tuf.api.serialization.json import JSONSerializer

from composable.errors import ManifestError
from composable.interface.digest import digest_bytes
from composable.packaging.trust.identities import Sigstore, accept_identities
from composable.packaging.versions.names import check_package_name

FOLDER: Final = "trust"
ROOT_KEYS: Final = 3
ROOT_THRESHOLD: Final = 2
CATALOG: Final = "catalog.jsonl"
ADVISORIES: Final = "advisories.jsonl"
REGISTRY_ROLE: Final = "registry"
ADVISORIES_ROLE: Final = "advisories"
PUBLISHER: Final = "publisher-"
BIN: Final = "bin-"
# Beyond this, one file with all publishers takes too long to read for each refresh.
MAX_PUBLISHERS: Final = 2000
N_BINS: Final = 256
# How long signatures hold. Freshness is what the online ones prove; those of publishers only say
# who signed, and are listed by the online ones.
OFFLINE_DAYS: Final = 365
ONLINE_DAYS: Final = 30
PUBLISHER_DAYS: Final = 3650
# When the timestamp was signed: a clock that is before it is wrong.
ISSUED: Final = "issued"
# In the list of publishers: the sigstore that proves the identities among them.
SIGSTORE: Final = "sigstore"
_SERIALIZER: Final = JSONSerializer(compact=True)


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one publisher may publish, and with which keys.

    Args:
        publisher: Its name.
        keys: Its keys or identities, of which each is enough; none if they were revoked.
        names: Package names, or the start of names followed by `*`.
    """

    publisher: str
    keys: tuple[Key, ...]
    names: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Return whether it contains a package name."""
        return any(matches(pattern, name) for pattern in self.names)


def metadata_path(role: str, version: int | None = None, folder: str = FOLDER) -> str:
    """Return the path of a role's metadata in the registry.

    Example:
        >>> metadata_path("root", 1), metadata_path("timestamp")
        ('trust/1.root.json', 'trust/timestamp.json')
    """
    return f"{folder}/{role if version is None else f'{version}.{role}'}.json"


def check_pattern(text: str) -> str:
    """Return a package name, or the start of names followed by `*`.

    Raises:
        ManifestError: For any other text.

    Example:
        >>> check_pattern("alice-*")
        'alice-*'
    """
    if text.endswith("*"):
        start = text.removesuffix("*")
        check_package_name(f"{start}x" if start.endswith("-") or not start else start)
        if start and not start.endswith("-"):
            raise ManifestError(
                f"{text!r} would contain names that only look alike",
                hint=f"expected a hyphen before the asterisk: {start}-*",
            )
        return text
    return check_package_name(text)


def matches(pattern: str, target: str) -> bool:
    """Return whether a path pattern of TUF contains a target.

    Example:
        >>> matches("alice-*", "alice-german"), matches("alice-*", "german")
        (True, False)
    """
    if not any(letter in pattern for letter in "*?["):
        return pattern == target
    parts, wanted = target.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def hash_prefix(target: str) -> str:
    """Return the SHA-256 of a target's name, by which bins are chosen."""
    return digest_bytes(target.encode()).removeprefix("sha256:")


def roles_for(delegations: Delegations, target: str) -> Iterator[tuple[str, bool]]:
    """Yield the delegated roles whose names contain a target, in order, and whether each is final.

    The rules are those of `Delegations.get_roles_for_target`; names without wildcards are compared
    as they are, which takes milliseconds for 10,000 of them and not a second.
    """
    if delegations.roles is None:
        yield from delegations.get_roles_for_target(target)
        return
    digest = hash_prefix(target)
    for role in delegations.roles.values():
        if role.paths is not None:
            is_match = any(matches(pattern, target) for pattern in role.paths)
        else:
            is_match = any(digest.startswith(prefix) for prefix in role.path_hash_prefixes or ())
        if is_match:
            yield role.name, role.terminating


def keys_of(delegations: Delegations, role: str) -> tuple[Key, ...]:
    """Return the keys of a delegated role."""
    keyids = delegations.roles[role].keyids if delegations.roles is not None else []
    return tuple(delegations.keys[keyid] for keyid in keyids)


def read_sigstore(targets: Targets) -> Sigstore | None:
    """Return the sigstore that the list of publishers accepts; None if it accepts none."""
    fields = targets.unrecognized_fields.get(SIGSTORE)
    return None if fields is None else Sigstore(fields)


def accept_identities_of(delegator: Targets, sigstore: Sigstore | None) -> None:
    """Let the identities of the publishers in a list be proven by a sigstore."""
    if delegator.delegations is not None:
        accept_identities(delegator.delegations.keys.values(), sigstore)


def read_grants(parts: Iterable[Targets]) -> dict[str, Grant]:
    """Return who may publish what, from the targets role or from all bins."""
    grants: dict[str, Grant] = {}
    for targets in parts:
        for role in _roles(targets):
            if role.name.startswith(PUBLISHER):
                publisher = role.name.removeprefix(PUBLISHER)
                before = grants[publisher].names if publisher in grants else ()
                assert targets.delegations is not None
                grants[publisher] = Grant(
                    publisher=publisher,
                    keys=keys_of(targets.delegations, role.name),
                    names=tuple(sorted({*before, *(role.paths or ())})),
                )
    return grants


def has_bins(targets: Targets) -> bool:
    """Return whether the publishers are in bins, not in the targets role itself."""
    return any(role.name.startswith(BIN) for role in _roles(targets))


def bin_names() -> list[str]:
    """Return the names of all bins."""
    return [f"{BIN}{number:02x}" for number in range(N_BINS)]


def delegate(
    grants: Mapping[str, Grant], operators: Mapping[str, tuple[Key, ...]]
) -> tuple[Delegations, dict[str, Delegations]]:
    """Return the delegations of the targets role and of the bins, if there are that many grants.

    Args:
        grants: Who may publish what.
        operators: The keys of the roles `registry` and `advisories`, and of the bins as `root`.
    """
    own = [
        (DelegatedRole(REGISTRY_ROLE, _ids(operators[REGISTRY_ROLE]), 1, True, [CATALOG])),
        (DelegatedRole(ADVISORIES_ROLE, _ids(operators[ADVISORIES_ROLE]), 1, True, [ADVISORIES])),
    ]
    keys = [key for role in (REGISTRY_ROLE, ADVISORIES_ROLE) for key in operators[role]]
    publishers = sorted(grants.values(), key=lambda grant: grant.publisher)
    if len(publishers) <= MAX_PUBLISHERS:
        own += [_to_role(grant, grant.names) for grant in publishers]
        keys += [key for grant in publishers for key in grant.keys]
        return _make_delegations(keys, own), {}
    binned: dict[str, list[tuple[Grant, tuple[str, ...]]]] = {name: [] for name in bin_names()}
    for grant in publishers:
        wide = tuple(name for name in grant.names if name.endswith("*"))
        exact: dict[str, list[str]] = {}
        for name in grant.names:
            if not name.endswith("*"):
                exact.setdefault(f"{BIN}{hash_prefix(name)[:2]}", []).append(name)
        for bin_ in binned if wide else exact:
            binned[bin_].append((grant, (*exact.get(bin_, ()), *wide)))
    offline = operators["root"]
    own += [
        DelegatedRole(name, _ids(offline), ROOT_THRESHOLD, True, None, [name.removeprefix(BIN)])
        for name in binned
    ]
    bins = {
        name: _make_delegations(
            [key for grant, _ in each for key in grant.keys],
            [_to_role(grant, names) for grant, names in each],
        )
        for name, each in binned.items()
    }
    return _make_delegations([*keys, *offline], own), bins


def to_bytes(metadata: Metadata[Any]) -> bytes:
    """Return metadata as it is stored."""
    return metadata.to_bytes(_SERIALIZER)


def expiry(now: datetime.datetime, days: float) -> datetime.datetime:
    """Return the time from which metadata no longer holds, in whole seconds as TUF stores it."""
    return (now + datetime.timedelta(days=days)).replace(microsecond=0)


def _roles(targets: Targets) -> list[DelegatedRole]:
    if targets.delegations is None or targets.delegations.roles is None:
        return []
    return list(targets.delegations.roles.values())


def _to_role(grant: Grant, names: tuple[str, ...]) -> DelegatedRole:
    name = f"{PUBLISHER}{grant.publisher}"
    # Of a role without keys, nothing is ever valid: its names stay taken.
    return DelegatedRole(name, _ids(grant.keys), 1, True, sorted(names))


def _make_delegations(keys: Iterable[Key], roles: Iterable[DelegatedRole]) -> Delegations:
    return Delegations({key.keyid: key for key in keys}, {role.name: role for role in roles})


def _ids(keys: Iterable[Key]) -> list[str]:
    return [key.keyid for key in keys]
