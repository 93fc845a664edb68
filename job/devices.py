"""Visible devices, and the distribution strategy, precision and compilation that suit them.

The only module that picks a `tf.distribute` strategy.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tensorflow as tf

from job import log
from job.config import DeviceRequest, Precision, Switch, TrainConfig, UserError
from job.gpus import Promise, check_promised_gpus, describe_gpu, promised_gpus, visible_gpus


@dataclass(frozen=True)
class Compilation:
    """What XLA compiles.

    Attributes:
        network: The forward and backward passes. XLA's CPU convolutions take ten times as long as
            oneDNN's, so this is for GPUs.
        elementwise: Augmentation and optimizer update, chains of small ops that become one kernel.
        loops: Whole loops over steps, so that nothing is launched from the host between two of
            them. Only for a single replica: an all-reduce has to stay outside of XLA.
    """

    network: bool
    elementwise: bool
    loops: bool = False


@dataclass(frozen=True)
class Previous:
    """What the attempt before came to, which "auto" keeps where it can.

    Attributes:
        kind: "cpu" or "gpu".
        replicas: Number of replicas.
        precision: "float32" or "bfloat16".
        jit: The setting, not what it came to, since that differs between CPUs and GPUs.
        deterministic: Whether only deterministic ops were used.
        global_batch_size: Has to divide by the replicas.
    """

    kind: str
    replicas: int
    precision: Precision
    jit: Switch
    deterministic: bool
    global_batch_size: int


@dataclass(frozen=True)
class Devices:
    """The replicas of a run and how they compute.

    Attributes:
        strategy: Distributes over them; in sync after each step.
        kind: "cpu" or "gpu".
        descriptions: For each replica its name, model and memory, and on GPUs compute capability.
        precision: "float32" or "bfloat16".
        jit: The setting that says what XLA compiles.
        compilation: What it compiles with this setting on this kind of device.
        deterministic: Whether every op gives the same bits each time, or fails where it cannot.
        threads: Processors that this process may run on; sums are split by them.
    """

    strategy: tf.distribute.Strategy
    kind: Literal["cpu", "gpu"]
    descriptions: tuple[dict[str, Any], ...]
    precision: Literal["float32", "bfloat16"]
    jit: Switch
    compilation: Compilation
    deterministic: bool
    threads: int

    @property
    def replicas(self) -> int:
        """Number of replicas that train in parallel."""
        return int(self.strategy.num_replicas_in_sync)

    def rows_per_replica(self, global_batch_size: int) -> int:
        """Rows of the global batch that each replica takes.

        Raises:
            UserError: If the batch does not divide.
        """
        rows, rest = divmod(global_batch_size, self.replicas)
        if rest:
            raise UserError(
                f"--batch-size received {global_batch_size}, expected a multiple of the "
                f"{self.replicas} replicas; use {(rows + 1) * self.replicas} or another multiple"
            )
        return rows


def open_promised_devices(config: TrainConfig, previous: Previous | None = None) -> Devices:
    """Set up the devices that a configuration asks for, if every promised GPU is there.

    Args:
        config: Says which devices, and how they compute.
        previous: What "auto" keeps where it can, from the attempt that this one goes on from.

    Raises:
        GpuMissingError: If a promised or required GPU cannot be used.
        UserError: If more GPUs are asked for than there are.
    """
    asked_for_cpu = config.devices.kind == "cpu"
    promise = Promise(0, "") if asked_for_cpu else promised_gpus(os.environ)
    check_promised_gpus(promise, len(visible_gpus()), config.require_gpus)
    return open_devices(
        config.devices, config.precision, config.jit, config.deterministic, previous
    )


def open_devices(
    request: DeviceRequest,
    precision: Precision,
    jit: Switch,
    deterministic: Switch = "auto",
    previous: Previous | None = None,
) -> Devices:
    """Set the requested devices up for one run; once in a process, before any computation.

    Args:
        request: Which replicas; "auto" takes every visible GPU, or the CPU where there is none.
        precision: "auto" takes bfloat16 where all of them compute it in hardware.
        jit: "auto" compiles everything on GPUs, and augmentation and optimizer update on CPUs.
        deterministic: "auto" is on for CPUs.
        previous: What "auto" keeps where it can, from the attempt that this one goes on from.

    Raises:
        UserError: If more GPUs are asked for than there are.
    """
    gpus = visible_gpus()
    if request.kind == "gpu" and request.count > len(gpus):
        raise UserError(
            f"--devices received gpu:{request.count}, expected at most the {len(gpus)} visible "
            f"GPUs; ask for fewer, or --devices auto or cpu:N"
        )
    kind: Literal["cpu", "gpu"] = "cpu"
    if request.kind == "gpu" or (request.kind == "auto" and gpus):
        kind = "gpu"
    count = request.count or _automatic_count(kind, len(gpus), previous)
    names, descriptions = _use_gpus(gpus[:count]) if kind == "gpu" else _use_cpu(count)
    if precision == "auto":
        precision = _automatic_precision(kind, descriptions, previous)
    if jit == "auto" and previous:
        jit = previous.jit
    if deterministic == "auto":
        # Not from CPUs to GPUs: those may lack an operation's deterministic form.
        keep = previous.deterministic if previous and previous.kind == kind else kind == "cpu"
        deterministic = "on" if keep else "off"
    if deterministic == "on":
        tf.config.experimental.enable_op_determinism()
    compile_network = jit == "on" or (jit == "auto" and kind == "gpu")
    return Devices(
        strategy=tf.distribute.MirroredStrategy(names),
        kind=kind,
        descriptions=descriptions,
        precision=precision,
        jit=jit,
        compilation=Compilation(
            network=compile_network,
            elementwise=jit != "off",
            # On CPUs XLA's convolutions are slower still inside of a loop.
            loops=compile_network and kind == "gpu" and len(names) == 1,
        ),
        deterministic=deterministic == "on",
        threads=int(os.environ.get("TF_NUM_INTRAOP_THREADS") or len(os.sched_getaffinity(0))),
    )


def _automatic_count(kind: str, gpus: int, previous: Previous | None) -> int:
    """Every visible GPU, or one CPU replica; a run that goes on keeps its number where it can."""
    visible = gpus if kind == "gpu" else 1
    if previous is None:
        return visible
    if previous.kind == kind and (kind == "cpu" or previous.replicas <= gpus):
        count = previous.replicas
    else:
        # The batch is the run's, and it has to divide.
        count = max(n for n in range(1, visible + 1) if previous.global_batch_size % n == 0)
    if count < visible:
        log.event(
            "idle_gpus",
            logging.WARNING,
            used=count,
            visible=visible,
            message=f"goes on with {count} of {visible} visible GPUs: the run's number, or the "
            f"most that its batch divides by; --devices gpu:N takes N, but costs identical bits",
        )
    return count


def _automatic_precision(
    kind: str, descriptions: tuple[dict[str, Any], ...], previous: Previous | None
) -> Literal["float32", "bfloat16"]:
    in_hardware = _computes_bfloat16(kind, descriptions)
    if previous is None:
        return "bfloat16" if in_hardware else "float32"
    # Older GPUs have no bfloat16 kernels at all; CPUs without the instructions are merely slow.
    keep = previous.precision == "bfloat16" and (in_hardware or kind == "cpu")
    return "bfloat16" if keep else "float32"


def _use_gpus(
    gpus: list[tf.config.PhysicalDevice],
) -> tuple[list[str], tuple[dict[str, Any], ...]]:
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    names = [f"GPU:{index}" for index in range(len(gpus))]
    return names, tuple(describe_gpu(gpu) for gpu in gpus)


def _use_cpu(replicas: int) -> tuple[list[str], tuple[dict[str, Any], ...]]:
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [f"CPU:{index}" for index in range(replicas)]
    descriptions = [
        {"name": name, "model": _cpu_model(), "memory_gib": round(memory / 2**30, 1)}
        for name in names
    ]
    return names, tuple(descriptions)


def _computes_bfloat16(kind: str, descriptions: tuple[dict[str, Any], ...]) -> bool:
    if kind == "gpu":
        return all(gpu["compute_capability"] >= [8, 0] for gpu in descriptions)
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


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
