"""Make the releases, lock, interfaces and logits that `test_golden.py` holds later versions to.

Run once, by the version whose files are to stay readable: `python -m tests.golden.make`. What lies
in `tests/golden/0.1.0` was made by 0.1.0; a later version adds a folder of its own.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from flax import nnx

from composable.assembly.backbones import load_backbone, save_backbone
from composable.corpora.documents import Document, write_documents
from composable.interface import RouterInterface
from composable.model.tokenizer import ByteTokenizer
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project, Wanted
from composable.packaging.project.sync import sync_project
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.training.config import TrainConfig
from composable.training.data import batches, token_stream
from composable.training.loop import fit
from composable.training.objectives import backbone_objective
from composable.workflows.publish import publish_expert
from composable.workflows.references import find_previous
from composable.workflows.train import train_expert
from composable.workflows.vet import check_expert
from tests.golden.logits import save_logits
from tests.support.tiny import INTERFACE_FIELDS, PRIVATE_WORDS, PUBLIC_WORDS, Tiny, router_of

OUT = Path(__file__).parent / "0.1.0"
SWITCHING = {
    "mix_power": 0.35,
    "mix_prior": 0.2,
    "mix_switch_rate": 0.02,
    "mix_share": 0.1,
    "mix_margin": 0.01,
    "mix_floor": 0.1,
    "mix_top_k": 3,
}
SCOUTS = {"scout_prior": 0.05, "scout_rate": 0.01, "scout_power": 0.6}
# Every way to route that 0.1.0 knows.
VARIANTS = {
    "record": {},
    "record-scouts": SCOUTS,
    "switching": SWITCHING,
    "switching-scouts": SWITCHING | SCOUTS,
    "undiscounted": {"discount": 1, "switch_rate": 0, "top_k": 1},
    "bare-switching": {"mix_power": 1, "mix_switch_rate": 0.1},
}
MANIFEST = """
[expert]
name = "{name}"
version = "{version}"
description = "Holds later versions to what this one wrote."
license = "Apache-2.0"
backbone = "tiny"
domains = ["logic"]

[interface]
name = "tiny"
requires = "^1.0"

[body]
{body}
dtype = "{dtype}"

[scout]
width = 8
{more}
"""


def main() -> None:
    """Write everything into an empty folder."""
    if OUT.exists():
        sys.exit(f"{OUT} exists: what was made once stays as it is")
    OUT.mkdir(parents=True)
    tiny = Tiny()
    backbone = make_backbone(tiny)
    with tempfile.TemporaryDirectory() as scratch:
        make_registry(tiny, backbone, Path(scratch))
        os.environ["COMPOSABLE_STORE"] = f"{scratch}/store"
        make_project(backbone)
        make_interfaces()
        save_logits(OUT, OUT / "logits")


def flat_interface(settings):
    """Return the tiny interface in schema 1, with these settings."""
    return RouterInterface.from_dict({**INTERFACE_FIELDS, **settings, "schema": 1})


def make_backbone(tiny):
    """Write a backbone that has read some text, and whose interface has every field."""
    train, anchor = (
        [Document(f"public/{i}", tiny.text(PUBLIC_WORDS, seed=i)) for i in numbers]
        for numbers in (range(30), range(30, 32))
    )
    graph, params, rest = nnx.split(tiny.backbone, nnx.Param, ...)
    cfg = TrainConfig(steps=60, batch_size=8, window=32, learning_rate=1e-2)
    data = batches(token_stream(train, ByteTokenizer()), window=32, batch_size=8, seed=0)
    fitted = fit(backbone_objective(graph), params, rest, data, cfg)
    interface = flat_interface(SWITCHING | SCOUTS)
    save_backbone(
        OUT / "backbone",
        nnx.merge(graph, fitted.trained, rest),
        name="tiny",
        version="1.0.0",
        anchor=anchor,
        router=router_of(interface),
        output_bounds=interface.output_bounds,
        texts={"README.md": "A tiny backbone.\n"},
        description="For tests.",
        license_="Apache-2.0",
    )
    return load_backbone(str(OUT / "backbone"))


def make_registry(tiny, backbone, scratch):
    """Train, check and publish three releases, and yank one."""
    registry = open_for_publishing(OUT / "registry")
    ffn, lora = 'kind = "ffn"', 'kind = "lora"\nrank = 2'
    releases = (
        ("logic", "1.0.0", lora, "F32", "", PRIVATE_WORDS),
        ("logic", "1.1.0", lora, "F32", '[extras.more]\nsums = "^1"', PRIVATE_WORDS),
        ("sums", "1.0.0", ffn, "BF16", '[requires]\nlogic = "^1"', "1+1=2 2·2=4 √9=3 x²≥0"),
    )
    for name, version, body, dtype, more, words in releases:
        folder = scratch / f"{name}-{version}"
        folder.mkdir()
        manifest = MANIFEST.format(name=name, version=version, body=body, dtype=dtype, more=more)
        (folder / "expert.toml").write_text(manifest)
        (folder / "README.md").write_text("An expert.\n")
        texts = scratch / f"{name}.jsonl"
        documents = [
            Document(f"private/{i}", tiny.text(words, seed=i, length=200)) for i in range(30)
        ]
        write_documents(texts, documents)
        steps = TrainConfig(steps=60, batch_size=8, window=32, learning_rate=1e-2)
        train_expert(backbone, folder, [texts], steps)
        previous = None
        if version != "1.0.0":
            previous = find_previous(
                backbone, folder, f"{name}@1.0.0", registry=str(OUT / "registry")
            )
        check_expert(backbone, folder, previous=previous)
        publish_expert(folder, backbone.interface, registry)
        record = OUT / "training" / f"{name}-{version}.json"
        record.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / ".work" / "training.json", record)
    registry.yank("logic", Version("1.0.0"))


def make_project(backbone):
    """Write a project, its lock and the digests of what it installs."""
    folder = OUT / "project"
    project = Project.create(folder, "../backbone", {"local": "../registry"})
    project = project.change(
        {"sums": Wanted(constraint=Constraint("^1")), "logic": Wanted(extras=("more",))}
    )
    lock = lock_project(project, backbone.interface)
    sync_project(project, lock, interface=backbone.interface)
    shutil.rmtree(folder / ".composable")


def make_interfaces():
    """Write every kind of interface, and the digest of each."""
    folder = OUT / "interfaces"
    folder.mkdir()
    digests = {}
    for name, changes in VARIANTS.items():
        interface = flat_interface(changes)
        (folder / f"{name}.json").write_text(interface.to_json())
        digests[name] = interface.digest
    (folder / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
