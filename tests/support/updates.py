"""Generations of an expert that are large enough to be published as deltas, and counted reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from composable.files.delta import Factors, add_product
from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import Manifest, Registry, Store, Version, write_tensors
from composable.packaging.install.deltas import PreparedDeltas, prepare_deltas
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.inbox import Inbox
from composable.packaging.registry.storage import Folder
from composable.packaging.trust.proposal import Proposal
from composable.vetting.card import Card, CardInterface, Check, format_card, tensor_digests

# A body of six matrices, 98,304 bytes in all; its scout is too small for a delta.
LARGE = {"d_model": 64, "d_ff": 64, "slots": (1, 2)}
BODY = "body.safetensors"


def make_factors(interface: RouterInterface, rank: int, seed: int) -> Factors:
    """Return the factors of a low-rank update of a body."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        return (0.1 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)

    specs = body_signature(interface, "ffn", None)
    return {
        name: (draw((spec.shape[0], rank)), draw((rank, spec.shape[1])))
        for name, spec in specs.items()
    }


def make_generation(
    home: Path,
    interface: RouterInterface,
    version: str,
    body: Mapping[str, np.ndarray],
    *,
    name: str = "german",
    derives_from: str | None = None,
) -> Path:
    """Write an expert with a full body, and return its folder."""
    folder = home / f"{name}-{version}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    scout = {
        n: rng.normal(size=spec.shape).astype(np.float32)
        for n, spec in scout_signature(interface, 8).items()
    }
    write_tensors(folder / BODY, body)
    write_tensors(folder / "scout.safetensors", scout)
    stated = "" if derives_from is None else f'derives-from = "{derives_from}"\n'
    (folder / "expert.toml").write_text(
        f'[expert]\nname = "{name}"\nversion = "{version}"\nbackbone = "tiny-bytes"\n{stated}'
        '[interface]\nname = "tiny-bytes"\nrequires = "^1"\n'
        '[body]\nkind = "ffn"\n[scout]\nwidth = 8\n'
    )
    return folder


def vet(folder: Path, interface: RouterInterface) -> Path:
    """Add what a server asks for: a licence, and a card that passes."""
    manifest = folder / "expert.toml"
    stated = 'description = "Knows."\nlicense = "MIT"\n[interface]'
    manifest.write_text(manifest.read_text().replace("[interface]", stated))
    known = Manifest.read(folder)
    card = Card(
        expert=f"{known.name}@{known.version}",
        interface=CardInterface(name=interface.name, digest=interface.digest),
        tensors=tensor_digests(folder),
        passed=True,
        checks=(Check(name="gain", passed=True, found="2.0 to 1.0", expected="at least 1% less"),),
        measured={"gain": 0.5, "anchor_loss": 0.001},
    )
    (folder / "card.json").write_text(format_card(card))
    return folder


class Family:
    """Generations of an expert, each a low-rank update of the one before.

    Args:
        home: Where their folders are written.
        interface: What they plug into; `LARGE`.
        n: How many.
        version: Their versions, with `{}` for the number.
        is_derived: Whether each says that it derives from the one before.
    """

    def __init__(
        self,
        home: Path,
        interface: RouterInterface,
        n: int = 3,
        version: str = "1.{}.0",
        *,
        is_derived: bool = False,
    ) -> None:
        self.interface = interface
        rng = np.random.default_rng(7)
        specs = body_signature(interface, "ffn", None)
        body = {k: rng.normal(size=s.shape).astype(np.float32) for k, s in specs.items()}
        self.folders = [make_generation(home, interface, version.format(0), body)]
        self.factors: list[Factors] = [{}]
        for number in range(1, n):
            factors = make_factors(interface, 2, number)
            body = {k: add_product(body[k], *factors[k]) for k in body}
            parent = f"german@{version.format(number - 1)}" if is_derived else None
            version_ = version.format(number)
            self.folders.append(
                make_generation(home, interface, version_, body, derives_from=parent)
            )
            self.factors.append(factors)

    def publish(self, registry: Registry, store: Store, numbers: range | None = None) -> None:
        """Publish generations as deltas."""
        for number in numbers or range(len(self.folders)):
            publish_update(
                registry, self.folders[number], self.interface, store, self.factors[number]
            )


def publish_update(
    registry: Registry,
    folder: Path,
    interface: RouterInterface,
    store: Store,
    factors: Factors | None = None,
) -> tuple[Manifest, PreparedDeltas]:
    """Publish an expert, as deltas where that is possible."""
    packed = pack_expert(folder, interface=interface)
    known = {} if factors is None else {BODY: factors}
    with prepare_deltas(registry, folder, packed, store, factors=known) as prepared:
        return registry.publish(folder, interface=interface, deltas=prepared.deltas), prepared


def propose_update(
    inbox: Inbox, folder: Path, interface: RouterInterface, store: Store, factors: Factors
) -> Proposal:
    """Propose an expert as what changed of the release that it derives from."""
    packed = pack_expert(folder, interface=interface)
    assert packed.derives_from is not None
    name, _, version = packed.derives_from.partition("@")
    with prepare_deltas(
        inbox.registry, folder, packed, store, factors={BODY: factors}, is_proposal=True
    ) as prepared:
        return inbox.propose(
            folder, (name, Version(version)), interface=interface, deltas=prepared.deltas
        )


class CountedFolder(Folder):
    """A folder that counts the bytes of the blobs that are read from it.

    Attributes:
        sent: Bytes, by path.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sent: dict[str, int] = {}

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        for data in super().stream(path, start):
            self.sent[path] = self.sent.get(path, 0) + len(data)
            yield data
