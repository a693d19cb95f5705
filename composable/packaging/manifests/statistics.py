"""The file of statistics that an expert may publish: what binds it to the expert's tensors.

The tensors are described in `composable.interface.signature.statistics_signature`. The header
records the digests of the files that they were computed from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import StatisticsError, TensorFileError
from composable.files.blobs import digest_file
from composable.files.records import parse_record
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, STATISTICS_FILE

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

# Key of the record in the header's metadata.
RECORD_KEY: Final = "composable"


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    """What statistics were computed from.

    Args:
        body: Digest of the body's file.
        scout: Digest of the scout's file.
        documents: Documents of text, none of which the expert was trained on.
        tokens: Tokens of it that were read.
        body_nats: Mean loss of the body on it, always on, in nats per token.
        scout_nats: Mean loss of the scout on it, in nats per token.
    """

    body: str
    scout: str
    documents: int
    tokens: int
    body_nats: float
    scout_nats: float


def read_statistics_record(folder: Path) -> StatisticsRecord:
    """Return the record of an expert's statistics, checked against the expert's tensors.

    Args:
        folder: The expert, with statistics.

    Raises:
        StatisticsError: If they are damaged, or were computed from other tensors.
    """
    from composable.files.safetensors import read_metadata  # which loads NumPy

    path = folder / STATISTICS_FILE
    try:
        metadata = read_metadata(path)
    except TensorFileError as error:
        raise _damaged(path, error.message) from error
    if RECORD_KEY not in metadata:
        raise _damaged(path, f"the header has no {RECORD_KEY!r}")
    record = parse_record(StatisticsRecord, metadata[RECORD_KEY], str(path), StatisticsError)
    losses = record.body_nats, record.scout_nats
    if not all(math.isfinite(loss) and loss > 0 for loss in losses) or record.tokens < 1:
        raise _damaged(path, f"losses of {losses} nats on {record.tokens} tokens are impossible")
    for file, expected in ((BODY_FILE, record.body), (SCOUT_FILE, record.scout)):
        if digest_file(folder / file) != expected:
            raise StatisticsError(
                f"the statistics do not fit the tensors: they were computed from a {file} "
                f"with digest {expected[:80]}",
                where=str(path),
                hint=f"run `composable check {folder} --statistics` again, or delete the file",
            )
    return record


def check_statistics(folder: Path, width: int, interface: RouterInterface | None = None) -> None:
    """Check the statistics of an expert, against its interface if one is given.

    Args:
        folder: The expert, with statistics.
        width: Hidden width of its scout.
        interface: The router interface that it fits.

    Raises:
        StatisticsError: If they are damaged, or do not fit the expert's tensors.
    """
    from composable.files.safetensors import check_tensors, read_header
    from composable.interface.contract import TensorSpec
    from composable.interface.signature import statistics_signature

    read_statistics_record(folder)
    path = folder / STATISTICS_FILE
    try:
        specs = {
            name: TensorSpec(shape=info.shape, dtypes=("BF16",))
            for name, info in read_header(path).items()
        }
        check_tensors(path, statistics_signature(interface, width) if interface else specs)
    except TensorFileError as error:
        raise _damaged(path, error.message) from error


def _damaged(path: Path, problem: str) -> StatisticsError:
    return StatisticsError(
        f"damaged statistics: {problem}",
        where=str(path),
        hint="get the file again, have its author compute it again with "
        "`composable check DIR --statistics`, or delete it",
    )
