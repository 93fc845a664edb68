"""The GPUs that this process should have, those that TensorFlow can use, and why not more."""

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
"""Comes with the driver of the host; a container has it if it was given a GPU."""

# What TensorFlow 2.21, built for CUDA 12.5 and cuDNN 9, opens at start-up.
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
    """How many GPUs this process should have, by which part of its environment."""

    count: int
    source: str


def expected_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> ExpectedGpus:
    """Find out how many GPUs the machine or scheduler gives to this process.

    ``CUDA_VISIBLE_DEVICES`` speaks for the process and so comes first, then Slurm's count for the
    node, then the device nodes. ``NVIDIA_VISIBLE_DEVICES`` is no sign: CUDA images set it to
    "all" even without a GPU.

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
        expected: What the environment gives.
        visible: GPUs that TensorFlow sees.
        required: What ``--require-gpus`` asks for.

    Raises:
        GpuMissingError: If fewer are visible.
    """
    if visible < required:
        raise GpuMissingError(
            f"--require-gpus expected {plural(required, 'GPU')}, TensorFlow sees {visible}"
            f"{_why()}; give the job its GPUs, or lower --require-gpus, which an image sets by "
            f"JOB_REQUIRE_GPUS (0 permits the CPU)"
        )
    if visible < expected.count:
        raise GpuMissingError(
            f"{expected.source} promises {plural(expected.count, 'GPU')}, TensorFlow sees "
            f"{visible}{_why()}; run '{program()} doctor' there, or ask for --devices "
            f"cpu:1 to train without a GPU"
        )


def _why() -> str:
    missing = [name for name, path in cuda_libraries().items() if path is None]
    if DRIVER_LIBRARY in missing:
        # Without the driver the others tell nothing.
        return (
            f" (cannot find {DRIVER_LIBRARY}: this machine has no NVIDIA driver, or the container "
            f"was started without --gpus or an nvidia.com/gpu limit)"
        )
    return f" (cannot find {', '.join(missing)})" if missing else ""


def cuda_libraries() -> dict[str, str | None]:
    """Look for the libraries that this build of TensorFlow needs for GPUs.

    They come from the driver and the system, or from the ``nvidia-*`` wheels, which TensorFlow
    finds beside itself without the system's loader knowing them.

    Returns:
        For each its path, its name where the system's loader finds it, or None.
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
    """Look for what XLA compiles with: the assembler ptxas and the bitcode library libdevice.

    As XLA does: in the folder of ``--xla_gpu_cuda_data_dir``, then in /usr/local/cuda and in the
    wheel beside TensorFlow, and for ptxas on the PATH before these two. None where one is missing.
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
    """What the kernel has of the NVIDIA driver's version; None where it has nothing."""
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
    """A visible GPU's whole memory as the driver tells it; None where it does not."""
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
