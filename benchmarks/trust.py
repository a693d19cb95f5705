"""What do signatures refuse, and what do they cost?

    python -m benchmarks.trust [attacks] [refresh] [publish] [identity] [--publishers 1000]
                               [--json FILE]

`attacks` runs every attack of `tests/support/registry_attacks.py` against clients of a folder, a
web server and a bucket. `refresh` measures a client that has never seen a registry of many
publishers with ten experts each: reading and verifying its metadata, and one index. `publish`
measures how much longer publishing takes in a signed registry, keys with a pass phrase, than in an
unsigned one, in turn. `identity` measures what a sigstore identity costs beyond a key, in turn: a
publication, with a sigstore on loopback, and a client's verification, in a process that has loaded
the library and in a new one. It needs the extra composable[sigstore].
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from composable.packaging import Registry
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.storage import Folder
from composable.packaging.trust.client import SignedDocuments
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key
from composable.packaging.trust.metadata import Grant
from composable.packaging.trust.signing import Signatory
from tests.packaging.conftest import make_interface
from tests.support.registry_attacks import ATTACKS, meet_attack
from tests.support.servers import run_s3
from tests.support.signed_registries import Place, World, build_world, serve_folder

PARTS = ("attacks", "refresh", "publish", "identity")
EXPERTS_EACH = 10
TARGETS_SECONDS = {"refresh": 0.3, "publish": 0.2}
COLD_START = """
    import pathlib, sys, time
    began = time.perf_counter()
    from composable.packaging.registry.storage import Folder
    from composable.packaging.trust.client import SignedDocuments
    loaded = time.perf_counter()
    documents = SignedDocuments(Folder(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
    documents.refresh()
    assert documents.read(sys.argv[3]) is not None
    print(loaded - began, time.perf_counter() - loaded)
"""
VERIFY_COLD = """
    import pathlib, sys, time
    from composable.packaging.registry.registry import Registry
    from composable.packaging.registry.signature_settings import SignatureSettings
    from composable.packaging.registry.storage import Folder
    import composable.packaging.registry.signed
    began, used = time.perf_counter(), time.process_time()
    settings = SignatureSettings(state=pathlib.Path(sys.argv[2]))
    registry = Registry(Folder(pathlib.Path(sys.argv[1])), signatures=settings)
    (*_, release) = registry.versions(sys.argv[3])
    assert registry.verify_release(release) is not None
    print(time.perf_counter() - began, time.process_time() - used, len(sys.modules))
"""


def run_attacks(home: Path) -> dict[str, Any]:
    """Return, for each attack and kind of storage, the rule that the client refused it for."""
    genuine = build_world(home / "genuine", make_interface())
    table: dict[str, dict[str, str]] = {}
    with run_s3() as endpoint:
        os.environ.update(endpoint)
        for number, attack in enumerate(ATTACKS):
            row = table[attack.name] = {}
            for kind in ("folder", "http", "bucket"):
                world = genuine.copy(home / f"{number}-{kind}")
                with serve_folder(world.folder) as url:
                    url = url if kind == "http" else f"s3://experts/{number}"
                    found = meet_attack(world, Place(kind, url), attack)
                row[kind] = "no effect" if found is None else f"refused: {found}"
            is_expected = set(row.values()) == {
                "no effect" if attack.refused_for is None else f"refused: {attack.refused_for}"
            }
            print(f"{attack.name:44}", *(f"{text:24}" for text in row.values()), is_expected)
            row["as expected"] = str(is_expected)
    return table


def fill_registry(home: Path, n_publishers: int) -> World:
    """Return a signed registry in which every publisher has signed ten indexes."""
    world = World(home, make_interface(), now=datetime.datetime.now(datetime.UTC))
    world.create()
    signatures = world.signatures("operator")
    authority = signatures.authority()
    grants = {}
    for number in range(n_publishers):
        key = create_key(home / "keys" / f"p{number}", "key", None)
        names = tuple(f"expert-{number}-{index}" for index in range(EXPERTS_EACH))
        name = f"p{number}"
        grants[name] = Grant(publisher=name, keys=(key.public,), names=names)
    held = authority.load()
    authority._commit(held, authority._change_grants(held, grants))
    # The content does not matter to a refresh; one blob keeps the disk out of it.
    content = b"{}\n"
    for name, grant in grants.items():
        keyring = Keyring(home / "keys" / name)
        signatory = Signatory(Folder(world.folder), signatures.documents, keyring)
        files = dict.fromkeys(grant.names, content)
        signatory.sign_targets(f"publisher-{name}", grant.keys, files, None)
    Signatory(Folder(world.folder), signatures.documents, signatures.keyring).confirm(
        lambda previous, indexes: b""
    )
    return world


def measure_refresh(home: Path, n_publishers: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of a first refresh, in this process and in new ones."""
    began = time.perf_counter()
    world = fill_registry(home / "world", n_publishers)
    print(f"filled {n_publishers} publishers in {time.perf_counter() - began:.0f} s")
    target = f"expert-{n_publishers // 2}-5"
    warm, used, loading, cold = [], [], [], []
    for number in range(repeats):
        began, before = time.perf_counter(), time.process_time()
        documents = SignedDocuments(Folder(world.folder), home / f"state{number}")
        documents.refresh()
        assert documents.read(target) is not None
        warm.append(time.perf_counter() - began)
        used.append(time.process_time() - before)
        command = [sys.executable, "-c", textwrap.dedent(COLD_START), str(world.folder)]
        output = subprocess.check_output([*command, str(home / f"other{number}"), target])
        loading.append(float(output.split()[0]))
        cold.append(float(output.split()[1]))
    read = sum(path.stat().st_size for path in (home / "state0").glob("*.json"))
    return {
        "publishers": n_publishers,
        "experts": n_publishers * EXPERTS_EACH,
        "bytes": read,
        "first refresh": describe(warm),
        "first refresh, processor": describe(used),
        "first refresh, new process": describe(cold),
        "loading the libraries": describe(loading),
        "target": TARGETS_SECONDS["refresh"],
    }


def measure_publish(home: Path, repeats: int) -> dict[str, Any]:
    """Return the seconds of publishing in an unsigned and in a signed registry, and between."""
    os.environ["COMPOSABLE_PASSPHRASE"] = "correct horse"
    world = World(home, make_interface(), now=datetime.datetime.now(datetime.UTC))
    registry = world.open("operator")
    registry.create()
    registry.open_signatures().create("correct horse")
    key = create_key(home / "keys" / "operator", "alice", "correct horse")
    signatures = world.signatures("operator")
    signatures.change(signatures.authority().grant("alice", ["german"], [key.public]))
    kinds = ("unsigned", "signed")
    times: dict[str, list[float]] = {
        f"{kind}{what}": [] for kind in kinds for what in ("", ", processor")
    }
    for number in range(repeats):
        folder = world.make_expert("german", f"1.{number}.0", seed=number)
        settings = SignatureSettings(state=home / "none")
        plain = Registry(Folder(home / "plain"), signatures=settings)
        for kind, target in (("unsigned", plain), ("signed", world.open("operator"))):
            began, used = time.perf_counter(), time.process_time()
            target.publish(folder, interface=world.interface)
            times[kind].append(time.perf_counter() - began)
            times[f"{kind}, processor"].append(time.process_time() - used)
    return {
        **{kind: describe(each) for kind, each in times.items()},
        "cost": describe(subtract(times["signed"], times["unsigned"])),
        "cost, processor": describe(
            subtract(times["signed, processor"], times["unsigned, processor"])
        ),
        "target": TARGETS_SECONDS["publish"],
    }


def measure_identity(home: Path, repeats: int) -> dict[str, Any]:
    """Return the seconds of publishing and verifying with a key and with an identity, in turn."""
    from composable.packaging.trust.identities import Sigstore
    from tests.support.sigstores import run_sigstore

    world = World(home, make_interface(), now=datetime.datetime.now(datetime.UTC))
    world.create()
    names = {"key": "french", "identity": "german"}
    kinds = tuple(names)
    acts = ("publishing", "verifying", "verifying in a new process")
    what = [f"{act}{how}" for act in acts for how in ("", ", processor")]
    times: dict[str, list[float]] = {f"{kind}, {each}": [] for each in what for kind in kinds}
    modules: dict[str, int] = {}
    with run_sigstore() as local:
        config = home / "sigstore.json"
        config.write_text(json.dumps(local.config()))
        account = local.account("alice@example.org")
        os.environ["COMPOSABLE_SIGSTORE"] = str(config)
        os.environ["SIGSTORE_IDENTITY_TOKEN"] = local.make_token(account)
        signatures = world.signatures("operator")
        authority = signatures.authority()
        signatures.change(authority.accept_sigstore(Sigstore(local.trusted_root())))
        signatures.change(authority.grant("alice", ["german"], [account.key]))
        world.grant("bob", "french", key=create_key(home / "keys" / "operator", "bob", None))
        for number in range(repeats + 1):
            for kind, name in names.items():
                folder = world.make_expert(name, f"1.{number}.0", seed=number)
                registry = world.open("operator")
                began, used = time.perf_counter(), time.process_time()
                registry.publish(folder, interface=world.interface)
                if number == 0:
                    continue  # loads the library
                times[f"{kind}, publishing"].append(time.perf_counter() - began)
                times[f"{kind}, publishing, processor"].append(time.process_time() - used)
                client = world.open(f"client{number}-{kind}")
                began, used = time.perf_counter(), time.process_time()
                client.verify_release(client.versions(name)[-1])
                times[f"{kind}, verifying"].append(time.perf_counter() - began)
                times[f"{kind}, verifying, processor"].append(time.process_time() - used)
                state = home / f"cold{number}-{kind}"
                command = [sys.executable, "-c", textwrap.dedent(VERIFY_COLD), str(world.folder)]
                output = subprocess.check_output([*command, str(state), name]).split()
                times[f"{kind}, verifying in a new process"].append(float(output[0]))
                times[f"{kind}, verifying in a new process, processor"].append(float(output[1]))
                modules[kind] = int(output[2])
    statements = {
        kind: (world.folder / f"statements/{name}/1.0.0.json").stat().st_size
        for kind, name in names.items()
    }
    return {
        **{each: describe(seconds) for each, seconds in times.items()},
        **{
            f"cost, {each}": describe(subtract(times[f"identity, {each}"], times[f"key, {each}"]))
            for each in what
        },
        "bytes of a statement": statements,
        "modules loaded": modules,
    }


def subtract(these: list[float], those: list[float]) -> list[float]:
    return [a - b for a, b in zip(these, those, strict=True)]


def describe(seconds: list[float]) -> dict[str, float]:
    """Return the median and the range of durations."""
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "max": round(max(seconds), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--publishers", type=int, default=1000, help="for `refresh`")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is measured")
    parser.add_argument(
        "--folder", type=Path, help="where the registries are; else a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    parts = arguments.parts or PARTS
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }
    print(result["machine"], result["date"])
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        if "attacks" in parts:
            result["attacks"] = run_attacks(home / "attacks")
        if "refresh" in parts:
            found = measure_refresh(home / "refresh", arguments.publishers, arguments.repeats)
            result["refresh"] = found
            print(json.dumps(found, indent=2))
        if "publish" in parts:
            result["publish"] = measure_publish(home / "publish", arguments.repeats)
            print(json.dumps(result["publish"], indent=2))
        if "identity" in parts:
            result["identity"] = measure_identity(home / "identity", arguments.repeats)
            print(json.dumps(result["identity"], indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if any(row["as expected"] != "True" for row in result.get("attacks", {}).values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
