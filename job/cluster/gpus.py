"""The GPUs that this process should have, those that TensorFlow can use, and missing libraries."""

import ctypes
import itertools
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from job.cluster import Device
from job.cluster.scheduler import gpus_on_node
from job.config import GpuMissingError
from job.environment import program
from job.log import plural

DRIVER_LIBRARY = "libcuda.so.1"
"""Part of the host's driver; a container has it if it was started with a GPU."""

# Libraries that TensorFlow 2.21, built for CUDA 12.5 and cuDNN 9, opens at start-up.
CUDA_LIBRARIES = (
    DRIVER_LIBRARY,
    "libcudart.so.12",
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libcufft.so.11",
    "libcusolver.so.11",
    "libcusparse.so.12",
    "libcudnn.so.9",
    "libnccl.so.2",
)
"""File names of the shared libraries that TensorFlow needs for GPUs."""


@dataclass(frozen=True)
class ExpectedGpus:
    """How many GPUs this process should have, and which part of its environment determines that."""

    count: int
    source: str


def expected_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> ExpectedGpus:
    """Determine how many GPUs the machine or scheduler gives to this process.

    ``CUDA_VISIBLE_DEVICES`` applies to the process itself and so comes first, then Slurm's count
    for the node, then the device nodes. ``NVIDIA_VISIBLE_DEVICES`` does not count: CUDA images set
    it to "all" even without a GPU.

    Args:
        environ: Environment variables.
        dev: The folder of device nodes.

    Raises:
        UserError: If Slurm's variable is not a number.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        # CUDA ignores everything from the first invalid entry on.
        entry = re.compile(r"\s*(\d+|GPU-.+|MIG-.+)\s*")
        valid = list(itertools.takewhile(entry.fullmatch, visible.split(",")))
        if valid:
            return ExpectedGpus(len(valid), f"CUDA_VISIBLE_DEVICES={visible}")
    if slurm := gpus_on_node(environ):
        return ExpectedGpus(slurm, f"SLURM_GPUS_ON_NODE={slurm}")
    if visible is not None:
        return ExpectedGpus(0, f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs")
    nodes = [node.name for node in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)]
    return ExpectedGpus(len(nodes), f"{len(nodes)} device nodes {dev}/nvidia*")


def check_expected_gpus(expected: ExpectedGpus, visible: int, required: int) -> None:
    """Refuse to train without the GPUs that are expected or required.

    Args:
        expected: Number of GPUs that the environment gives.
        visible: Number of GPUs that TensorFlow detects.
        required: Value of ``--require-gpus``.

    Raises:
        GpuMissingError: If fewer are visible.
    """
    if visible < required:
        raise GpuMissingError(
            f"--require-gpus expected {plural(required, 'GPU')}, TensorFlow detects {visible}"
            f"{_missing_libraries()}; give the job its GPUs, or lower --require-gpus, which an "
            f"image sets with JOB_REQUIRE_GPUS (0 allows the CPU)"
        )
    if visible < expected.count:
        raise GpuMissingError(
            f"expected {plural(expected.count, 'GPU')} ({expected.source}), TensorFlow detects "
            f"{visible}{_missing_libraries()}; run '{program()} doctor' on that machine, or pass "
            f"--devices cpu:1 to train without a GPU"
        )


def _missing_libraries() -> str:
    missing = [name for name, path in cuda_libraries().items() if path is None]
    if DRIVER_LIBRARY in missing:
        # Without the driver the other libraries do not matter.
        return (
            f" (cannot find {DRIVER_LIBRARY}: this machine has no NVIDIA driver, or the container "
            f"was started without --gpus or an nvidia.com/gpu limit)"
        )
    return f" (cannot find {', '.join(missing)})" if missing else ""


def cuda_libraries() -> dict[str, str | None]:
    """Locate the libraries that this build of TensorFlow needs for GPUs.

    They come from the driver and the system, or from the ``nvidia-*`` wheels, which TensorFlow
    finds next to itself, outside the search path of the system's loader.

    Returns:
        For each library its path, or its name if the system's loader finds it, or None.
    """
    site_packages = Path(tf.__file__).parent.parent
    found: dict[str, str | None] = {}
    for name in CUDA_LIBRARIES:
        wheels = sorted(site_packages.glob(f"nvidia/*/lib/{name}"))
        found[name] = path = str(wheels[0]) if wheels else name
        try:
            ctypes.CDLL(path)
        except OSError:
            found[name] = None
    return found


def xla_tools() -> dict[str, str | None]:
    """Locate what XLA compiles with: the assembler ptxas and the bitcode library libdevice.

    This searches the same places as XLA: the folder of ``--xla_gpu_cuda_data_dir``, then
    /usr/local/cuda and the wheel next to TensorFlow; for ptxas, the PATH before these two.

    Returns:
        For each its path; None if it is missing.
    """
    flag = re.search(r"--xla_gpu_cuda_data_dir=(\S+)", os.environ.get("XLA_FLAGS", ""))
    chosen = [Path(flag[1])] if flag else []
    usual = [Path("/usr/local/cuda"), Path(tf.__file__).parent.parent / "nvidia" / "cuda_nvcc"]
    folders = [str(root / "bin") for root in chosen]
    folders += [os.environ.get("PATH", ""), *(str(root / "bin") for root in usual)]
    search_path = os.pathsep.join(folders)
    bitcode = [root / "nvvm" / "libdevice" / "libdevice.10.bc" for root in (*chosen, *usual)]
    return {
        "ptxas": shutil.which("ptxas", path=search_path),
        "libdevice.10.bc": next((str(path) for path in bitcode if path.exists()), None),
    }


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel's text about the NVIDIA driver's version; None if there is no such driver."""
    try:
        return path.read_text()
    except OSError:
        return None


def visible_gpus() -> list[tf.config.PhysicalDevice]:
    """The GPUs that TensorFlow can use."""
    return list(tf.config.list_physical_devices("GPU"))


def describe_gpu(gpu: tf.config.PhysicalDevice) -> Device:
    """A GPU's name, model, memory and compute capability."""
    details = tf.config.experimental.get_device_details(gpu)
    name = gpu.name.removeprefix("/physical_device:")
    return Device(
        name,
        details.get("device_name", "unknown"),
        _gpu_memory_gib(int(name.rpartition(":")[2])),
        tuple(details.get("compute_capability", ())),
    )


def _gpu_memory_gib(ordinal: int) -> float | None:
    """A visible GPU's total memory as reported by the driver; None if it reports none."""
    device, size = ctypes.c_int(), ctypes.c_size_t()
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return None
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    )
    return None if failed else round(size.value / 2**30, 1)
