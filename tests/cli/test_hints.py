"""Every hint that is a command is run in the state that printed it, and cures it."""

import ast
import re
import shlex
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import composable
from composable.assembly.experts import load_expert
from composable.errors import ComposableError
from composable.files.blobs import default_store, digest_file
from composable.packaging.install.lock import Lock
from composable.packaging.project.project import Project

CONFLICT = "<<<<<<< HEAD\n{ours}=======\n{theirs}>>>>>>> feature/experts\n"
COMMAND = re.compile(r"`(?:cd (\S+) && )?(composable [^`]+)`")


@pytest.fixture
def fakes(make_fakes):
    return make_fakes("registry")


@pytest.fixture
def project(works, fakes, publish_copies):
    """Make a project that has german 1.0.0 and physics installed."""
    publish_copies(fakes, {"name": "german"}, {"name": "physics", "seed": 1})
    works("init", "--registry", "registry")
    works("install", "german", "physics")
    return fakes


@pytest.fixture
def cure(works, monkeypatch):
    """Return a function that runs the first command of a hint, which must succeed."""

    def run(text):
        hint = text.partition("hint: ")[2]
        found = COMMAND.search(hint)
        assert found is not None, text
        with monkeypatch.context() as patch:
            if found[1]:
                patch.chdir(*shlex.split(found[1]))
            for command in found[2].split(" && "):
                arguments = shlex.split(command)[1:]
                if arguments == ["verify"]:  # finds damage, and says so with its exit status
                    continue
                works(*arguments)
        return hint

    return run


def fails(cli, *arguments):
    outcome = cli(*arguments)
    assert outcome.code == 1
    return outcome.err


def rewrite_lock(tmp_path, edit):
    path = tmp_path / "composable.lock"
    before = path.read_text()
    path.write_bytes(edit(before))
    return before


def in_conflict(lock, ours, theirs):
    """Return a lock in which each side has an entry of its own at the end."""
    return (lock + CONFLICT.format(ours=ours, theirs=theirs)).encode()


def entry_of(lock, name):
    _, *entries = lock.split("[[expert]]")
    return next("[[expert]]" + e for e in entries if f'name = "{name}"' in e).rstrip() + "\n"


DAMAGES = {
    "empty": lambda lock: b"",
    "cut": lambda lock: lock.encode()[: len(lock) // 2],
    "not text": lambda lock: b"\xff\xfe" + lock.encode("utf-16-le"),
    "twice": lambda lock: (lock + "\n" + entry_of(lock, "german")).encode(),
    "a field of its own": lambda lock: (lock + "evil = 1\n").encode(),
    "a digest": lambda lock: lock.replace("sha256:", "sha255:").encode(),
    "conflict in one field": lambda lock: lock.replace(
        'wanted-by = ["composable.toml: *"]\n',
        CONFLICT.format(ours='wanted-by = ["composable.toml: *"]\n', theirs="wanted-by = []\n"),
        1,
    ).encode(),
    "conflict with CRLF": lambda lock: in_conflict(lock, "", "\n").replace(b"\n", b"\r\n"),
    "conflict with its base": lambda lock: in_conflict(lock, "||||||| 1f2e\nbase = 1\n", ""),
}


@pytest.mark.filterwarnings("ignore::composable.errors.ComposableWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["sync", "tree", "outdated", "sync --frozen"])
def test_a_damaged_lock(cli, works, cure, project, tmp_path, damage, command):
    before = rewrite_lock(tmp_path, DAMAGES[damage])
    told = fails(cli, *command.split())
    hint = cure(told)
    works(*command.split())
    assert (tmp_path / "composable.lock").read_text() == before
    if "conflict" in damage:
        assert "conflict markers" in told
        assert "both sides" in hint


@pytest.mark.filterwarnings("ignore::composable.errors.ComposableWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["lock", "upgrade", "install german", "lock --upgrade"])
def test_what_locks_again_cures_a_damaged_lock(works, project, tmp_path, damage, command):
    before = rewrite_lock(tmp_path, DAMAGES[damage])
    works(*command.split())
    assert (tmp_path / "composable.lock").read_text() == before


def test_a_byte_order_mark_damages_no_lock(works, project, tmp_path):
    rewrite_lock(tmp_path, lambda lock: b"\xef\xbb\xbf" + lock.encode())
    works("sync", "--frozen")
    assert works("lock").out.startswith("nothing to change")


def test_a_merge_keeps_what_both_sides_agree_on(works, cli, project, tmp_path):
    """Each side upgraded physics to another version; german is old, and both sides have it."""
    lock = (tmp_path / "composable.lock").read_text()
    for version in ("1.1.0", "1.2.0", "1.3.0"):
        project.publish("physics", version, seed=int(version[2]))
        project.publish("german", version, seed=int(version[2]))
    ours = entry_of(lock, "physics")
    theirs = ours.replace('version = "1.0.0"', 'version = "1.1.0"').replace(
        "manifest = ", 'manifest = "sha256:' + "0" * 64 + '"\n#'
    )
    conflict = lock.replace(ours, CONFLICT.format(ours=ours, theirs=theirs))
    (tmp_path / "composable.lock").write_text(conflict)
    told = works("lock")
    assert "kept the 1 expert that its sides agree on" in told.err
    assert len(told.err.splitlines()) == 1
    versions = Lock.read(tmp_path).versions
    assert str(versions["german"]) == "1.0.0"
    assert str(versions["physics"]) == "1.3.0"


def test_experts_that_each_side_added_are_kept(works, project, tmp_path):
    lock = (tmp_path / "composable.lock").read_text()
    for name in ("german", "physics"):
        project.publish(name, "1.1.0", seed=5)
    head = lock.partition("[[expert]]")[0]
    text = head + CONFLICT.format(ours=entry_of(lock, "german"), theirs=entry_of(lock, "physics"))
    (tmp_path / "composable.lock").write_text(text)
    works("lock")
    assert (tmp_path / "composable.lock").read_text() == lock


def test_a_lock_of_a_newer_version_is_not_replaced(cli, project, tmp_path):
    before = rewrite_lock(tmp_path, lambda lock: lock.replace("schema = 1", "schema = 9").encode())
    for command in ("lock", "sync", "install german"):
        told = fails(cli, *command.split())
        assert "newer version of composable" in told
        assert "`composable lock`" not in told
    assert (tmp_path / "composable.lock").read_text() == before.replace("= 1", "= 9", 1)


@pytest.mark.parametrize("command", ["lock", "sync", "list", "install german", "remove german"])
def test_a_project_file_in_conflict(cli, works, project, tmp_path, command):
    file = tmp_path / "composable.toml"
    before = file.read_text()
    sides = CONFLICT.format(ours='legal = "^1"\n', theirs='legal = "*"\n')
    file.write_text(before + sides)
    line = before.count("\n") + 1
    told = fails(cli, *command.split())
    assert f"conflict markers in line {line}" in told
    assert "keep one side" in told
    file.write_text(before)
    works(*command.split())


def test_a_rule_in_a_text_is_no_conflict(works, project, tmp_path):
    file = tmp_path / "composable.toml"
    file.write_text(file.read_text() + "# <<<<<<< not a marker\n#\n# =======\n")
    works("sync")


def test_no_project(cli, works, cure):
    cure(fails(cli, "list"))
    works("list")


def test_no_lock(cli, works, cure, project, tmp_path):
    (tmp_path / "composable.lock").unlink()
    for command in ("tree", "sync --frozen", "why german"):
        cure(fails(cli, *command.split()))
        works(*command.split())
        (tmp_path / "composable.lock").unlink()


def test_a_lock_out_of_date(cli, works, cure, project, tmp_path):
    works("remove", "german")
    cure(fails(cli, "sync", "--frozen"))
    works("sync", "--frozen")


@pytest.mark.parametrize("damage", ["pointer", "lock", "lock with markers", "manifest"])
def test_a_damaged_environment(cli, works, cure, project, tmp_path, damage):
    environment = Project.read(tmp_path).environment
    folder = environment.current.path
    if damage == "pointer":
        (tmp_path / ".composable/current").write_text("77\n")
    elif damage == "manifest":
        (folder / "experts/german/expert.toml").unlink()
        with pytest.raises(ComposableError) as caught:
            environment.expert_path("german")
        cure(str(caught.value))
        environment.expert_path("german")
        return
    else:
        text = (folder / "composable.lock").read_text()
        ends = {"lock": "x", "lock with markers": CONFLICT.format(ours="a = 1\n", theirs="")}
        (folder / "composable.lock").write_text(text + ends[damage])
    told = fails(cli, "list")
    assert "conflict" not in cure(told)
    assert "german" in works("list").out


def test_nothing_is_installed(cli, works, cure, project, tmp_path):
    shutil.rmtree(tmp_path / ".composable")
    with pytest.raises(ComposableError) as caught:
        Project.read(tmp_path).environment.expert_path("german")
    cure(str(caught.value))
    Project.read(tmp_path).environment.expert_path("german")


def test_a_damaged_file_of_an_installed_expert(
    cli, works, cure, make_fakes, tiny_backbone, tmp_path
):
    """Its size stays: a bit flipped in place, in the environment and in the store."""
    from composable.assembly.backbones import load_backbone

    make_fakes("registry", tiny_backbone).publish("german")
    works("init", "--backbone", tiny_backbone, "--registry", "registry")
    works("install", "german")
    loaded = load_backbone(str(tiny_backbone))
    folder = Project.read(tmp_path).environment.expert_path("german")
    body = folder / "body.safetensors"
    before = digest_file(body)
    body.chmod(0o644)
    data = bytearray(body.read_bytes())
    data[-1] ^= 1
    with body.open("r+b") as file:
        file.write(data)
    with pytest.raises(ComposableError) as caught:
        load_expert(loaded, folder)
    assert "`composable verify && composable sync`" in str(caught.value)
    assert cli("verify").code == 1
    cure(str(caught.value))
    folder = Project.read(tmp_path).environment.expert_path("german")
    load_expert(loaded, folder)
    assert digest_file(folder / "body.safetensors") == before


@pytest.mark.parametrize("damage", ["conflict in one field", "empty", "cut"])
def test_the_lock_of_another_project_when_pruning(
    cli, works, cure, project, tmp_path, monkeypatch, damage
):
    (tmp_path / "an other place").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "an other place")
        works("init", "--registry", "../registry")
        works("install", "german")
    rewrite_lock(tmp_path, DAMAGES[damage])
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "an other place")
        hint = fails(cli, "cache", "prune").partition("hint: ")[2]
        assert str(tmp_path) in hint
    cure(f"hint: {hint}")
    works("cache", "prune")


def test_a_misspelled_name(cli, works, project):
    told = fails(cli, "install", "germn")
    name = re.search(r"did you mean '(.*)'", told)[1]
    works("install", name)
    told = fails(cli, "remove", "germn")
    works("remove", re.search(r"did you mean '(.*)'", told)[1])


def test_a_name_that_another_registry_has(cli, works, cure, make_fakes, tmp_path):
    make_fakes("first").publish("german")
    make_fakes("second").publish("physics")
    works("init", "--registry", "first=first", "--registry", "second=second")
    told = fails(cli, "install", "physics")
    assert "did you mean" not in told
    cure(told)
    works("install", "physics")


def test_a_name_that_the_catalogue_alone_has(cli, project, works, tmp_path):
    shutil.rmtree(tmp_path / "registry/index")
    shutil.rmtree(tmp_path / "registry/records")
    told = fails(cli, "install", "german")
    assert "did you mean" not in told
    assert "catalogue lists that name" in told


def replace_content(fakes, *names):
    """Make the registry anew; the releases of some experts have other content."""
    shutil.rmtree(fakes.registry.location)
    for seed, name in enumerate(("german", "physics")):
        fakes.publish(name, seed=90 if name in names else seed)
    fakes.publish("french", seed=7)


@pytest.mark.parametrize("names", [("german",), ("physics",), ("german", "physics")])
@pytest.mark.parametrize(
    "command", ["lock", "lock --upgrade", "upgrade", "install french", "outdated"]
)
def test_other_content_under_a_locked_version(cli, works, cure, project, tmp_path, command, names):
    replace_content(project, *names)
    told = fails(cli, *command.split())
    assert told.count("sha256:") == 2 * len(names)
    cure(told)
    works(*command.split())
    lock = Lock.read(tmp_path)
    for name in names:
        assert lock[name].manifest == project.registry.versions(name)[0].manifest


def test_other_content_is_reported(works, project):
    replace_content(project, "german")
    told = works("lock", "--forget", "german")
    assert told.out.startswith("~ german 1.0.0, other content: sha256:")
    assert works("sync").out == told.out


def test_a_release_that_its_registry_lost(cli, works, cure, project):
    project.publish("german", "1.1.0", seed=5)
    works("upgrade")
    replace_content(project)
    told = fails(cli, "upgrade")
    assert "german 1.1.0 is locked, but its registry no longer lists it" in told
    cure(told)
    assert works("upgrade").out == "~ german 1.1.0 -> 1.0.0\n"


@pytest.fixture
def url(project, tmp_path):
    """Serve the registry of the project by HTTP; return its address."""
    handler = partial(QuietHandler, directory=tmp_path / "registry")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_offline(cli, works, url, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPOSABLE_STORE", str(tmp_path / "another store"))
    (tmp_path / "web").mkdir()
    monkeypatch.chdir(tmp_path / "web")
    works("init", "--registry", url)
    told = fails(cli, "install", "german", "--offline")
    assert "hint: run this once without --offline" in told
    works("install", "german")
    works("install", "german", "--offline")


def test_what_verify_says(cli, works, project, tmp_path):
    body = Project.read(tmp_path).environment.expert_path("german") / "body.safetensors"
    data = bytearray(body.read_bytes())
    data[-1] ^= 1
    body.chmod(0o644)
    body.write_bytes(data)
    outcome = cli("verify")
    assert outcome.code == 1
    assert "`composable sync`" in outcome.out
    works("sync")
    works("verify")


@pytest.mark.parametrize("place", ["a folder of mine", "plain", "it's"])
def test_a_command_with_a_path_can_be_pasted(cli, project, tmp_path, place):
    folder = tmp_path / place / "expert"
    shutil.copytree(project.write("norse"), folder)
    (folder / "card.json").unlink()
    hint = fails(cli, "publish", folder, "--registry", "registry").partition("hint: ")[2]
    assert shlex.split(COMMAND.search(hint)[2]) == ["composable", "check", str(folder)]
    (folder / "body.safetensors").unlink()
    hint = fails(cli, "check", folder).partition("hint: ")[2]
    command = shlex.split(COMMAND.search(hint)[2])
    assert command == ["composable", "train", str(folder), "--data", "FILES"]


def test_a_step_that_is_too_small(cli, works, project):
    folder = project.write("german", "1.0.1", seed=9)
    hint = fails(cli, "publish", folder, "--registry", "registry").partition("hint: ")[2]
    command = shlex.split(COMMAND.search(hint)[2])
    assert command[1:3] == ["check", str(folder)]
    assert command[3:] == ["--against", "german@1.0.0", "--registry", "registry"]
    version = re.search(r'write version = "(.*)"', hint)[1]
    file = folder / "expert.toml"
    file.write_text(file.read_text().replace('version = "1.0.1"', f'version = "{version}"'))
    project.vet(folder)
    works("publish", folder, "--registry", "registry")


def test_what_audit_says(cli, works, cure, project):
    """Of a release that another one fixes, and of one that none does."""
    project.publish("german", "1.1.0", seed=5)
    advise = ("advise", "--registry", "registry", "--text", "Wrong.")
    works(*advise, "german<1.1", "--fixed", "1.1.0")
    cure("hint: " + cli("audit").out)
    works("audit")
    works(*advise, "physics")
    cure("hint: " + cli("audit").out)
    works("audit")


@pytest.fixture
def signed(works, make_fakes, project, monkeypatch, tmp_path):
    """Make a project that has german 1.0.0 from a registry that alice signs."""
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "secret")
    works("registry", "init", "registry", "--signed")
    key = works("registry", "key", "alice").out.strip()
    works("registry", "grant", "registry", "alice", "german", "physics", "--key", key)
    works("registry", "sign", "registry", "--vouch", "german", "--vouch", "physics")
    works("lock")
    works("sync")
    return make_fakes("registry")


def test_an_unsigned_registry(cli, cure, project, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "secret")
    cure(fails(cli, "registry", "sign", "registry"))
    assert cli("registry", "sign", "registry").code == 0


def test_signatures_that_this_machine_lacks(cli, works, cure, signed, tmp_path, monkeypatch):
    """Another machine has the installed files and not the statements, or not the keys either."""
    works("verify", "--signatures")
    folder = next(path for path in (default_store() / "trust").iterdir())
    shutil.rmtree(folder / "statements")
    cure(cli("verify", "--signatures").out)
    works("verify", "--signatures")
    shutil.rmtree(folder)
    cure(cli("verify", "--signatures").out)
    works("verify", "--signatures")


def test_a_revoked_publisher(cli, works, cure, signed):
    """The statements stay where they are; the keys that signed them no longer count."""
    works("registry", "revoke", "registry", "alice")
    assert "revoked" in fails(cli, "lock")
    hint = cure(cli("verify", "--signatures").out)
    assert "composable remove german" in hint


def test_a_release_that_is_no_longer_signed(cli, works, cure, signed, tmp_path):
    """Its publisher signs other releases of the package, with a new key, and not the locked one."""
    signed.publish("german", "1.1.0", seed=5)
    works("registry", "revoke", "registry", "alice")
    key = works("registry", "key", "alice-2").out.strip()
    works("registry", "grant", "registry", "alice", "--key", key)
    (tmp_path / "keys" / "alice.key").unlink()
    works("registry", "sign", "registry", "--vouch", "german>=1.1", "--vouch", "physics")
    shutil.rmtree(default_store())
    shutil.rmtree(tmp_path / ".composable")
    told = fails(cli, "sync")
    assert "german 1.0.0 is locked, but its publisher no longer signs it" in told
    cure(told)
    works("sync")


# Every hint that is a command: the file that has it, the command, and the test that runs it.
COVERED = {
    ("assembly.experts", "verify"): "test_a_damaged_file_of_an_installed_expert",
    ("assembly.experts", "sync"): "test_a_damaged_file_of_an_installed_expert",
    ("cli.look", "remove"): "test_what_audit_says",
    ("cli.look", "sync"): "test_what_audit_says",
    ("cli.look", "upgrade"): "test_what_audit_says",
    ("cli.storage", "sync"): "test_what_verify_says",
    ("packaging.install.environment", "sync"): "test_a_damaged_environment",
    ("packaging.install.environment", "install"): "test_nothing_is_installed",
    ("packaging.install.lock", "lock"): "test_a_damaged_lock",
    ("packaging.project.edits", "lock"): "test_the_lock_of_another_project_when_pruning",
    ("packaging.project.locking", "lock"): "test_a_lock_out_of_date",
    ("packaging.project.sync", "upgrade"): "test_a_release_that_is_no_longer_signed",
    ("packaging.project.verification", "lock"): "test_signatures_that_this_machine_lacks",
    ("packaging.registry.signed", "lock"): "test_signatures_that_this_machine_lacks",
    ("packaging.registry.signed", "remove"): "test_a_revoked_publisher",
    ("cli.signing", "registry"): "test_an_unsigned_registry",
    ("packaging.project.project", "init"): "test_no_project",
    ("packaging.project.sources", "add"): "test_a_name_that_another_registry_has",
    ("vetting.card", "check"): "test_a_command_with_a_path_can_be_pasted",
    ("workflows.vet", "train"): "test_a_command_with_a_path_can_be_pasted",
}
# Commands that a message names without offering them as the cure of an error.
NAMED = {
    ("cli.look", "why"),  # shows who asks for a release that cannot be replaced
    ("cli.contribute", "publish"),  # what will be done with statistics
    ("cli.project", "export"),  # the page of help that explains `sync --from`
    ("model.text", "generate"),  # what else there is for a model that cannot chat
    # What the publisher of a delta does whose base is gone; see packaging/install/test_deltas.py.
    ("packaging.install.download", "publish"),
    ("packaging.install.mirror", "publish"),
    ("packaging.install.mirror", "registry"),  # what an administrator of a server runs there
    # What the author of an expert does, who has its text; run in tests/cli/test_merge.py.
    ("packaging.manifests.statistics", "check"),
    ("workflows.merge", "check"),
    ("workflows.merge_choice", "check"),
    ("workflows.merge_manifest", "merge"),
    ("workflows.merge_sides", "check"),
    ("workflows.merge_sides", "train"),
    ("workflows.statistics", "check"),
    ("packaging.registry.cache", "export"),
    ("packaging.registry.http", "registry"),  # what else could be published to
    # What an operator or a publisher does on another machine; run in tests/cli/test_signing.py.
    ("cli.contribute", "registry"),
    ("packaging.registry.signed", "registry"),
    ("packaging.trust.client", "registry"),
    ("packaging.trust.keys", "registry"),
    # Run in tests/services/test_sigstore.py, since they need a sigstore.
    ("packaging.trust.identities", "registry"),
    ("packaging.trust.sign_in", "registry"),
    ("packaging.trust.offline", "registry"),
    ("packaging.trust.signing", "registry"),
    ("packaging.trust.statement", "registry"),
    ("packaging.registry.registry", "publish"),  # how an empty folder becomes a registry
    ("packaging.registry.registry", "registry"),
    # What those who propose and those who maintain do next; run in tests/workflows/test_review.py.
    ("cli.review", "registry"),
    ("cli.review", "review"),
    ("workflows.accept", "reject"),
    ("packaging.install.proposals", "propose"),
    ("packaging.registry.inbox", "propose"),
    ("packaging.registry.inbox", "publish"),
    ("packaging.registry.inbox", "registry"),
    ("packaging.registry.inbox", "review"),
    ("packaging.registry.locations", "registry"),
    ("packaging.registry.served", "yank"),  # what a server can do instead
    ("server.proposals", "propose"),
    ("server.publishing", "publish"),  # a server's answer to what no command of ours sends
    ("server.rules", "check"),
    ("server.signatures", "registry"),  # as the lines above: run in tests/server/test_signatures.py
}


def find_commands():
    """Yield the file and the name of each command in backticks in a message of the source."""
    package = Path(composable.__file__).parent
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders) and node.body]
        docs = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if id(node) not in docs and "demo" not in path.parts:
                module = ".".join(path.relative_to(package).with_suffix("").parts)
                for command in re.findall(r"(?:`|&& )composable ([a-z-]+)", node.value):
                    yield module, command


def test_each_hint_that_is_a_command_has_a_test():
    found = {*find_commands()}
    assert found - NAMED == COVERED.keys()
    assert {*COVERED.values()} <= globals().keys()
