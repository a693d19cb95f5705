"""A command line to call, and experts that fit a backbone and know nothing, made without jax."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from composable.cli.app import app
from composable.files.safetensors import write_tensors
from composable.interface import body_signature, scout_signature
from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
from composable.packaging.manifests.manifest import (
    BackbonePackage,
    BodySpec,
    InterfaceNeed,
    Manifest,
)
from composable.packaging.registry.compatibility import choose_previous
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.training.record import TrainingRecord
from composable.vetting.card import Against, Check, write_card
from composable.workflows.publish import publish_expert
from tests.support.tiny import router_of


class Outcome:
    """What a command did."""

    def __init__(self, result):
        self.code = result.exit_code
        self.out = result.stdout
        self.err = result.stderr

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Return a function that runs `composable` in an empty directory; bugs raise."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result)

    return call


@pytest.fixture
def works(cli):
    """Return a function that runs a command that must succeed, and returns what it printed."""

    def call(*arguments):
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    return call


class Fakes:
    """Writes and publishes experts that are random numbers with a card.

    Args:
        root: Where their folders lie.
        registry: Where they are published.
        backbone: Whose interface they fit.
    """

    def __init__(self, root, registry, backbone="tiny-bytes"):
        self.root = root
        self.registry = open_for_publishing(registry)
        self.home = find_backbone(str(backbone))
        self.interface = read_interface(self.home)

    def write(self, name, version="1.0.0", *, requires=None, needs="^1.0", digest=None, seed=0):
        """Write a low-rank expert, as if it had been trained and vetted."""
        folder = self.root / f"{name}-{version}"
        manifest = Manifest(
            name=name,
            version=Version(version),
            backbone=BackbonePackage.read(self.home).name,
            interface=InterfaceNeed(
                name=self.interface.name, requires=Constraint(needs), digest=digest
            ),
            body=BodySpec(kind="lora", rank=1),
            scout_width=1,
            description=f"Knows nothing of {name}.",
            domains=("nothing",),
            requires={other: Constraint(text) for other, text in (requires or {}).items()},
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "expert.toml").write_text(manifest.to_toml())
        random = np.random.default_rng(seed)
        signatures = {
            "body.safetensors": body_signature(self.interface, "lora", 1),
            "scout.safetensors": scout_signature(self.interface, 1),
        }
        for file, specs in signatures.items():
            tensors = {
                tensor: random.normal(0, 1e-3, spec.shape).astype(np.float32)
                for tensor, spec in specs.items()
            }
            write_tensors(folder / file, tensors)
        self.vet(folder)
        return folder

    def vet(self, folder, *, passed=True, against=None):
        """Write a card for the tensors in a folder."""
        measured = {
            "bits_per_byte": {"own_backbone": 2.0, "own_expert": 1.0, "own_mix": 1.25},
            "anchor_loss": 0.001,
        }
        write_card(
            folder,
            Manifest.read(folder),
            self.interface,
            [Check(name="gain", passed=passed, found="0.1%", expected="at least 1%")],
            measured,
            TrainingRecord(),
            against,
        )

    def compare(self, folder, regressions=()):
        """Write a card as if the expert had been compared with the release before it."""
        manifest = Manifest.read(folder)
        releases = self.registry.versions(manifest.name) if self.registry.exists else ()
        if older := choose_previous(releases, manifest.version):
            tensors = {f.name: f.digest for f in older.files if f.name.endswith(".safetensors")}
            self.vet(folder, against=Against(tensors=tensors, regressions=tuple(regressions)))

    def publish(self, name, version="1.0.0", **arguments):
        """Publish a fake; one for another interface goes around the gate, which would refuse it."""
        folder = self.write(name, version, **arguments)
        if arguments.keys() & {"needs", "digest"}:
            self.registry.publish(folder)
        else:
            self.compare(folder)
            publish_expert(folder, self.interface, self.registry)
        return folder

    def spoil(self, digest):
        """Change one byte of a published file."""
        path = self.registry.storage.root / "blobs" / digest[7:9] / digest[7:]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "experts", tmp_path / "registry")


@pytest.fixture
def make_fakes(tmp_path):
    """Return a function that makes fakes for another registry or backbone."""

    def make(registry, backbone="tiny-bytes"):
        return Fakes(tmp_path / f"experts-for-{registry}", tmp_path / registry, backbone)

    return make


@pytest.fixture(scope="session")
def publish_copies(tmp_path_factory):
    """Return a function that publishes fakes to a new registry: once, and then copies of them."""
    made = {}

    def publish(fakes, *releases):
        """Publish releases, each the arguments of `Fakes.publish`, all of them by name."""
        key = repr(releases)
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("published")
            first = Fakes(folder / "experts", folder / "registry")
            for release in releases:
                first.publish(**release)
        shutil.copytree(made[key] / "experts", fakes.root)
        shutil.copytree(made[key] / "registry", fakes.registry.location)

    return publish


@pytest.fixture
def project(works, fakes, publish_copies, tmp_path):
    """Make the directory a project with a registry of three experts; return its path."""
    publish_copies(
        fakes,
        {"name": "german", "version": "1.0.0"},
        {"name": "german", "version": "1.2.0", "seed": 1},
        {"name": "german", "version": "2.0.0", "seed": 2},
        {"name": "physics", "requires": {"german": "^1.0"}, "seed": 3},
    )
    works("init", "--registry", "registry")
    return tmp_path


@pytest.fixture
def tiny_backbone(tiny, tmp_path):
    """Return the folder of a backbone package that trains and runs in a blink."""
    from composable.assembly.backbones import save_backbone
    from composable.corpora.documents import Document

    folder = tmp_path / "tiny-backbone"
    save_backbone(
        folder,
        tiny.backbone,
        name="tiny",
        version="1.0.0",
        anchor=[Document("one", "It was a dark night. " * 4)],
        router=router_of(tiny.interface),
        output_bounds=tiny.interface.output_bounds,
        texts={},
        description="Nothing but noise.",
        license_="CC0-1.0",
    )
    return folder
