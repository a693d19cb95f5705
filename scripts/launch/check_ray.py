"""Vet an expert beside all published ones on a Ray cluster, then write its card. Not run on a pod.

    pip install '.[ray]'
    python scripts/launch/check_ray.py --workers 16 --work /mnt/work [OPTION...]

The folder of --work holds the expert, the registry and the results, and all nodes see it. OPTIONs
are added to the command that writes the card. A worker that dies loses the unit that it was at, and
another takes its place. --address names a cluster; without it one is started on this machine.
Written for Ray 2.60.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

# A node that is busy takes longer to start than Ray waits for.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")

import ray

from composable.assembly.backbones import load_backbone
from composable.cli.bars import show_counts
from composable.packaging.manifests.manifest import Manifest
from composable.workflows.peer_units import PeerWorker, make_job
from composable.workflows.ray_workers import compute_on_ray
from composable.workflows.references import list_peers


def main():
    """Compute all units on Ray, and let the command write the card from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="workers of one core each")
    parser.add_argument("--work", default="work", help="folder that all nodes see")
    parser.add_argument("--address", help="a Ray cluster; by default one on this machine")
    parser.add_argument("--backbone", help="by default the one that the expert names")
    arguments, options = parser.parse_known_args()
    work = Path(arguments.work).absolute()
    folder, registry, results = work / "expert", str(work / "registry"), work / "results"
    manifest = Manifest.read(folder)
    backbone = arguments.backbone or manifest.backbone
    loaded = load_backbone(backbone)
    peers = list_peers(
        loaded,
        manifest.name,
        ["all"],
        {},
        derives_from=manifest.derives_from,
        registry=registry,
    )
    worker = PeerWorker(make_job(loaded, folder, peers, registry=registry, results=results), loaded)
    n_cores = None if arguments.address else arguments.workers
    ray.init(address=arguments.address or "local", num_cpus=n_cores, include_dashboard=False)
    with show_counts("check", is_quiet=False) as progress:
        compute_on_ray(worker, arguments.workers, progress)
    ray.shutdown()
    command = ["composable", "check", folder, "--beside", "all", "--registry", registry]
    command += ["--results", results, "--backbone", backbone, *options]
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main()
