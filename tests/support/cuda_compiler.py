"""Compile for NVIDIA GPUs that are not here.

XLA's CUDA plugin compiles from a description of a GPU, without a driver. It and CUDA's assembler
are two wheels in a folder (`INSTALL`), which must not be on Python's path: jax would look for GPUs
to run on.
"""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies

FOLDER = Path(os.environ.get("CUDA_COMPILER", Path(__file__).parents[2] / ".cuda-compiler"))
INSTALL = (
    "pip install --target .cuda-compiler --no-deps "
    f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12==12.9.86"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a compiler asks about a GPU. Limits are those of the compute capability.

    Attributes:
        name: The name that it reports.
        capability: Compute capability, major and minor.
        cores: Streaming multiprocessors.
        clock_ghz: Of those, at most.
        memory: Bytes.
        bandwidth: Bytes of memory per second.
        cache: Bytes of L2.
        shared_memory: Bytes per core, for all its programs.
        shared_memory_per_program: Bytes that one program may ask for.

    References:
        https://resources.nvidia.com/en-us-tensor-core, H100 data sheet and architecture paper.
        CUDA C++ programming guide, technical specifications per compute capability.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory: int
    bandwidth: int
    cache: int
    shared_memory: int
    shared_memory_per_program: int

    def describe(self) -> str:
        """Return the description that XLA reads, a protocol buffer as text."""
        major, minor = self.capability
        versions = "".join(
            f'{name}_version: "12.9.0" ' for name in ("runtime", "driver", "compile_time_toolkit")
        )
        return f"""
        platform_name: "CUDA"
        device_description_str: "{self.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
          device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth}
          l2_cache_size: {self.cache}
          shared_memory_per_core: {self.shared_memory} shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {self.shared_memory_per_program}
          registers_per_core_limit: {1 << 16} registers_per_block_limit: {1 << 16}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
          {versions} dnn_version: "9.10.0"
        }}
        """


H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    clock_ghz=1.98,
    memory=80 << 30,
    bandwidth=3_350_000_000_000,
    cache=50 << 20,
    shared_memory=228 << 10,
    shared_memory_per_program=227 << 10,
)


def find_missing(folder: Path) -> str | None:
    """Return what a folder lacks, and what to do; None if it holds the compiler."""
    patterns = ("**/xla_cuda_plugin.so", "nvidia/cuda_nvcc/bin/ptxas")
    if all(any(folder.glob(pattern)) for pattern in patterns):
        return None
    return f"{folder} holds no CUDA compiler; run: {INSTALL}"


def gpu_mesh(gpu: Gpu, folder: Path) -> jax.sharding.Mesh:
    """Return a mesh of one GPU to compile for; once in a process, before jax looks for devices."""
    library = next(folder.glob("**/xla_cuda_plugin.so"))
    xla_bridge.register_plugin("cuda", library_path=str(library), options={})
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=gpu.describe()
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("data",))


def compile_options(folder: Path) -> dict[str, str | int]:
    """Return the options to compile with: where CUDA's assembler is, and to time nothing."""
    return {
        "xla_gpu_cuda_data_dir": str(folder / "nvidia/cuda_nvcc"),
        "xla_gpu_autotune_level": 0,
    }
