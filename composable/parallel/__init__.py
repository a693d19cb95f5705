"""Start-up of many hosts, the device mesh, and which dimension is split over which mesh axis."""

from composable.parallel.batch import split_batch, sum_over_batch
from composable.parallel.mesh import make_mesh, start_processes
from composable.parallel.sharding import BATCH_SPEC, place_batch, shard_tree, shardings_of, spec_of

__all__ = [
    "BATCH_SPEC",
    "make_mesh",
    "place_batch",
    "shard_tree",
    "shardings_of",
    "spec_of",
    "split_batch",
    "start_processes",
    "sum_over_batch",
]
