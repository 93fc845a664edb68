"""This process's own devices: made ready for replicas, described, and what they compute in."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tensorflow as tf

from job.gpus import describe_gpu


@dataclass(frozen=True)
class LocalDevices:
    """Devices of this process, one a replica.

    Attributes:
        kind: "cpu" or "gpu".
        names: As TensorFlow calls them in this process.
        descriptions: Of each its name, model and memory in GiB, and on GPUs compute capability.
        computes_bfloat16: Whether all of them do so in hardware.
    """

    kind: Literal["cpu", "gpu"]
    names: tuple[str, ...]
    descriptions: tuple[dict[str, Any], ...]
    computes_bfloat16: bool


def use_gpus(gpus: list[tf.config.PhysicalDevice]) -> LocalDevices:
    """Make GPUs ready, and hide the others; before any computation."""
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    descriptions = tuple(map(describe_gpu, gpus))
    return LocalDevices(
        "gpu",
        tuple(f"GPU:{index}" for index in range(len(gpus))),
        descriptions,
        all(gpu["compute_capability"] >= [8, 0] for gpu in descriptions),
    )


def use_cpu(replicas: int) -> LocalDevices:
    """Split the processor into replicas, and hide all GPUs; before any computation."""
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = tuple(f"CPU:{index}" for index in range(replicas))
    common = {"model": _cpu_model(), "memory_gib": round(memory / 2**30, 1)}
    in_hardware = {"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split())
    descriptions = tuple({"name": name, **common} for name in names)
    return LocalDevices("cpu", names, descriptions, bool(in_hardware))


def _cpu_model() -> str:
    return _cpuinfo("model name") or os.uname().machine


def _cpuinfo(key: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else ""
