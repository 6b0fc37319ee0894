"""Chips that need not be here: what their compilers are asked for."""

from __future__ import annotations

import importlib.util
import os

import jax
from jax.experimental import topologies

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What the CUDA compiler asks of a device, in its own text form; figures of NVIDIA's data sheet."""


def alone() -> None:
    """Has JAX stay on the CPU, and compilers not ask the machine about its chips; before JAX starts them."""
    for name, value in {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # What is read from there writes no dumps.
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # CUPTI 13.5 cannot tell its version where there is no driver.
    }.items():
        os.environ.setdefault(name, value)


def devices_of(topology: str) -> list[jax.Device]:
    """The chips of a topology, without having them."""
    try:
        if topology == "h100":
            return list(topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices)
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # The plugin's errors have no common class.
        reason = (str(error).splitlines() or [""])[0][:200]
        said = f"chips like 'v5e:16x16', got {topology!r}"
        if topology == "h100":
            said = "the CUDA compiler (pip install 'jax[cuda13]', JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=-1), got"
        elif "not installed" in reason or importlib.util.find_spec("libtpu") is None:
            said = "the TPU compiler (pip install 'jax[tpu]'), got"
        raise ValueError(f"topology: expected {said}: {reason}") from None
