"""Commands that sign a registry, and what those of a project say about signatures."""

import datetime
import shutil

import pytest

from composable.packaging.registry import signed as signed_module


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "secret")
    return tmp_path / "keys"


@pytest.fixture
def fakes(works, make_fakes, keys):
    """Make a signed registry with german 1.0.0 of alice, and a project."""
    works("registry", "init", "registry", "--signed")
    key = works("registry", "key", "alice").out.strip()
    works("registry", "grant", "registry", "alice", "german", "--key", key)
    fakes = make_fakes("registry")
    fakes.publish("german")
    works("init", "--registry", "registry")
    return fakes


def pass_time(monkeypatch, days):
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    monkeypatch.setattr(signed_module, "read_clock", lambda: now)


def test_a_lock_records_the_signer(works, fakes, tmp_path):
    told = works("install", "german")
    assert "unsigned" not in told.err
    key = works("registry", "key", "alice").out.strip()
    assert (
        f'signer = {{ publisher = "alice", key = "{key}" }}'
        in (tmp_path / "composable.lock").read_text()
    )
    assert f"german is signed by alice ({key})" in works("verify", "--signatures").out
    found = works("verify", "--signatures", "--json").json["signatures"]["german"]
    assert found["signer"] == {"publisher": "alice", "key": key}


def test_verification_needs_no_registry(works, cli, fakes, tmp_path):
    works("install", "german")
    shutil.rmtree(tmp_path / "registry")
    assert "is signed by alice" in works("verify", "--signatures").out


def test_info_and_search_say_who_signed(works, fakes, make_fakes):
    key = works("registry", "key", "alice").out.strip()
    assert f"alice ({key})" in works("info", "german").out
    assert works("info", "german", "--json").json["signer"] == {"publisher": "alice", "key": key}
    assert "german" in works("search", "german", "--signed").out
    make_fakes("plain").publish("german")
    assert "nothing found" in works("search", "german", "--signed", "--registry", "plain").out
    assert works("info", "german", "--registry", "plain", "--json").json["signer"] is None


def test_an_unsigned_registry_is_named_once(works, make_fakes):
    make_fakes("plain").publish("german")
    works("init", "--registry", "plain")
    assert "registry 'default' is unsigned" in works("install", "german").err
    assert "unsigned" not in works("lock").err
    assert "german is unsigned" in works("verify", "--signatures").out


def test_a_policy_refuses_unsigned_registries(works, cli, make_fakes, tmp_path):
    make_fakes("plain").publish("german")
    works("init", "--registry", "plain")
    works("install", "german")
    file = tmp_path / "composable.toml"
    file.write_text(file.read_text() + "\n[policy]\nsigned = true\n")
    assert "is not signed, as [policy]" in cli("sync", "--frozen").err
    assert "is unsigned, and [policy] in composable.toml refuses that" in cli("lock").err
    outcome = cli("verify")
    assert outcome.code == 1
    assert "german 1.0.0 is not signed" in outcome.out


def test_another_signer_is_named(works, fakes, keys):
    works("install", "german")
    new = works("registry", "key", "alice-2").out.strip()
    works("registry", "rotate", "registry", "alice", "--new", new)
    (keys / "alice.key").unlink()
    works("registry", "sign", "registry", "--vouch", "german")
    fakes.publish("german", "1.1.0", seed=1)
    told = works("upgrade").err
    assert f"german 1.1.0 is signed by alice with another key ({new}); 1.0.0 was" in told


def test_a_registry_that_lost_its_signatures(works, cli, fakes, make_fakes, tmp_path):
    """Also on a machine that has never seen it: the lock knows."""
    works("install", "german")
    shutil.rmtree(tmp_path / "registry")
    make_fakes("plain").publish("german", "1.1.0", seed=1)
    (tmp_path / "plain").rename(tmp_path / "registry")
    assert "was signed when this machine used it before" in cli("lock").err
    assert "was signed when this machine used it before" in cli("registry", "sign", "registry").err
    shutil.rmtree(next((signed_state() / "trust").iterdir()))
    told = cli("lock", "--upgrade").err
    assert "german: signed when it was locked, and its registry is unsigned now" in told
    works("lock", "--upgrade", "--forget", "german")


def signed_state():
    from composable.files.blobs import default_store

    return default_store()


def test_a_rare_mirror(works, cli, fakes, monkeypatch):
    works("install", "german")
    pass_time(monkeypatch, 35)
    assert "nobody has confirmed since" in cli("lock").err
    works("lock", "--max-stale", "6")
    works("registry", "sign", "registry")
    works("lock")


def test_pass_phrases(cli, works, keys, monkeypatch):
    monkeypatch.delenv("COMPOSABLE_PASSPHRASE")
    told = cli("registry", "key", "alice")
    assert told.code == 1
    assert "a new key needs a pass phrase" in told.err
    assert not keys.exists()
    works("registry", "key", "alice", "--no-passphrase")


def test_operators_commands(works, cli, fakes, keys, tmp_path):
    listed = works("registry", "signers", "registry", "--json").json
    assert [row["signer"] for row in listed["signers"]] == ["root"] * 3 + ["online", "alice"]
    root = listed["signers"][0]["key"]
    new = works("registry", "key", "root-4").out.strip()
    works("registry", "rotate", "registry", "root", "--old", root, "--new", new)
    online = works("registry", "key", "online-2").out.strip()
    works("registry", "rotate", "registry", "online", "--new", online)
    listed = works("registry", "signers", "registry", "--json").json
    assert {new, online} <= {row["key"] for row in listed["signers"]}
    assert root not in {row["key"] for row in listed["signers"]}
    away = tmp_path / "away"
    away.mkdir()
    for name in ("root-2", "root-3"):
        (keys / f"{name}.key").rename(away / f"{name}.key")
    (keys / "root-1.key").unlink()
    told = works("registry", "revoke", "registry", "alice")
    assert "1 more root signature needed" in told.err
    assert (
        "waits for a root signature: alice no longer" in works("registry", "sign", "registry").err
    )
    assert "dropped" in works("registry", "sign", "registry", "--discard").out
    assert cli("registry", "rotate", "registry", "root", "--new", new).code == 2
    assert works("lock").code == 0


def test_a_publisher_without_the_online_key(works, fakes, keys, tmp_path):
    (keys / "online.key").rename(tmp_path / "online.key")
    folder = fakes.write("german", "1.1.0", seed=1)
    path = folder / "expert.toml"
    path.write_text(path.read_text().replace("[expert]\n", '[expert]\nlicense = "MIT"\n'))
    fakes.compare(folder)
    told = works("publish", folder, "--registry", "registry").err
    assert "clients see it once the operator has run `composable registry sign registry`" in told
    assert "german 1.0.0" in works("install", "german").out
    (tmp_path / "online.key").rename(keys / "online.key")
    works("registry", "sign", "registry")
    assert "-> 1.1.0" in works("upgrade").out


def test_an_unsigned_registry_can_be_created(works):
    assert "unsigned" in works("registry", "init", "registry").out
    assert works("registry", "signers", "registry").out == "unsigned\n"
