"""Start-up of many hosts, the device mesh, and which dimension is split over which mesh axis."""

from composable.parallel.batch import split_batch, sum_over_batch
from composable.parallel.mesh import make_mesh, parse_mesh
from composable.parallel.processes import (
    current_process,
    exchange,
    is_first_process,
    leave_group,
    start_processes,
    wait_for_all,
)
from composable.parallel.sharding import (
    BATCH_SPEC,
    count_batch_shards,
    fetch_tree,
    gather_weights,
    keep_batch_split,
    place_batch,
    place_shapes,
    shard_tree,
    shardings_of,
    spec_of,
    sum_shards,
)

__all__ = [
    "BATCH_SPEC",
    "count_batch_shards",
    "current_process",
    "exchange",
    "fetch_tree",
    "gather_weights",
    "is_first_process",
    "keep_batch_split",
    "leave_group",
    "make_mesh",
    "parse_mesh",
    "place_batch",
    "place_shapes",
    "shard_tree",
    "shardings_of",
    "spec_of",
    "split_batch",
    "start_processes",
    "sum_over_batch",
    "sum_shards",
    "wait_for_all",
]
