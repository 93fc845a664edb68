"""The devices of a run, the strategy over its replicas, and their precision and XLA settings.

The only module that picks a `tf.distribute` strategy.
"""

import contextlib
import functools
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import tensorflow as tf

from job import log
from job.cluster import Device, Environment
from job.cluster.gpus import (
    ExpectedGpus,
    check_expected_gpus,
    describe_gpu,
    expected_gpus,
    visible_gpus,
)
from job.cluster.scheduler import ALONE, ClusterSpec
from job.cluster.workers import Workers, rendezvous
from job.config import Switch, TrainConfig, UserError

graph_function = functools.partial(tf.function, autograph=False)
"""`tf.function` without AutoGraph: control flow on tensors must use `tf.cond` and `tf.while_loop`.

AutoGraph writes a file into ``TMPDIR`` for each function that it translates. A process that is
killed, or that skips the interpreter's cleanup as this job does, leaves these files behind.
"""

Kind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Compilation:
    """What XLA compiles.

    Attributes:
        network: The forward and backward passes. XLA's CPU convolutions take ten times as long as
            oneDNN's, so this is for GPUs.
        elementwise: Augmentation and optimizer update, chains of small ops that become one kernel.
        loops: Whole loops over steps, so that the host launches nothing between two steps. Only for
            a single replica: an all-reduce must stay outside XLA.
    """

    network: bool = False
    elementwise: bool = False
    loops: bool = False


@dataclass(frozen=True)
class Devices:
    """The replicas of a run, their devices and how they compute.

    Attributes:
        strategy: Distributes over all replicas, including those of other workers; in sync after
            each step.
        kind: "cpu" or "gpu".
        descriptions: The device of each replica.
        computes_bfloat16: Whether all devices compute bfloat16 in hardware.
        local_names: Names of this process's own devices.
        workers: The processes that use the devices.
        precision: "float32" or "bfloat16".
        jit: The setting that determines what XLA compiles.
        compilation: What XLA compiles with this setting on this kind of device.
        deterministic: Whether every op computes the same bits each time, or fails if it cannot.
        threads: Processors that this process may run on; sums are split among them.
    """

    strategy: tf.distribute.Strategy
    kind: Kind
    descriptions: tuple[Device, ...]
    computes_bfloat16: bool
    local_names: tuple[str, ...]
    workers: Workers
    precision: Literal["float32", "bfloat16"] = "float32"
    jit: Switch = "auto"
    compilation: Compilation = Compilation()
    deterministic: bool = False
    threads: int = 1

    @property
    def replicas(self) -> int:
        """Number of replicas that train in parallel."""
        return len(self.local_names) * self.workers.count

    def rows_per_replica(self, global_batch_size: int) -> int:
        """Rows of the global batch that each replica processes.

        Raises:
            UserError: If the batch cannot be divided equally.
        """
        rows, rest = divmod(global_batch_size, self.replicas)
        if rest:
            raise UserError(
                f"--batch-size received {global_batch_size}, expected a multiple of "
                f"{self.replicas}, the number of replicas; use {(rows + 1) * self.replicas} or "
                f"another multiple"
            )
        return rows

    def resolve(self, config: TrainConfig, previous: Environment | None = None) -> "Devices":
        """Determine how the devices compute; call this before any computation.

        Args:
            config: With "auto", precision is bfloat16 if all devices compute it in hardware, XLA
                compiles everything on GPUs and augmentation and optimizer update on CPUs, and
                operations are deterministic on CPUs.
            previous: How the previous attempt computed, which "auto" keeps if it can.
        """
        precision = config.precision
        if precision == "auto":
            precision = self._automatic_precision(previous)
        jit = config.jit
        if jit == "auto" and previous:
            jit = previous.jit
        deterministic = config.deterministic == "on"
        if config.deterministic == "auto":
            deterministic = self.kind == "cpu"
            # Not kept from CPUs to GPUs, which may lack the deterministic form of an operation.
            if previous and previous.device_kind == self.kind:
                deterministic = previous.deterministic
        if deterministic:
            tf.config.experimental.enable_op_determinism()
        # TF32 speeds up float32 on GPUs. A training in bfloat16 keeps its few float32 operations
        # exact. So the saved model's evaluation, also exact, can be compiled during the training.
        in_tf32 = self.kind == "gpu" and precision == "float32"
        tf.config.experimental.enable_tensor_float_32_execution(in_tf32)
        compile_network = jit == "on" or (jit == "auto" and self.kind == "gpu")
        return replace(
            self,
            precision=precision,
            jit=jit,
            compilation=Compilation(
                network=compile_network,
                elementwise=jit != "off",
                # On CPUs XLA's convolutions are even slower inside a loop.
                loops=compile_network and self.kind == "gpu" and self.replicas == 1,
            ),
            deterministic=deterministic,
            threads=_threads(),
        )

    def _automatic_precision(self, previous: Environment | None) -> Literal["float32", "bfloat16"]:
        if previous is None:
            return "bfloat16" if self.computes_bfloat16 else "float32"
        # Older GPUs have no bfloat16 kernels; CPUs without the instructions are merely slow.
        can = self.computes_bfloat16 or self.kind == "cpu"
        return "bfloat16" if previous.precision == "bfloat16" and can else "float32"

    def without_other_workers(self) -> "Devices":
        """The first device of this process, for work without the other workers."""
        if self.workers.count == 1:
            return self
        names = self.local_names[:1]
        first = self.workers.spec.index * len(self.local_names)
        return replace(
            self,
            # A single device uses no collectives, so it cannot interfere with those of all workers.
            strategy=tf.distribute.MirroredStrategy(names),
            descriptions=self.descriptions[first : first + 1],
            local_names=names,
            workers=Workers(ALONE),
        )


def _threads() -> int:
    """Number of processors that TensorFlow computes with."""
    text = os.environ.get("TF_NUM_INTRAOP_THREADS") or "0"
    if not text.isdecimal():
        raise UserError(
            f"TF_NUM_INTRAOP_THREADS received {text!r}, expected a number; unset or correct it"
        )
    return int(text) or len(os.sched_getaffinity(0))


def require_expected_gpus(config: TrainConfig) -> None:
    """Refuse to start without the GPUs that this process should have or that are required.

    Raises:
        GpuMissingError: If one cannot be used.
    """
    cpu_requested = config.devices.kind == "cpu"
    expected = ExpectedGpus(0, "") if cpu_requested else expected_gpus(os.environ)
    check_expected_gpus(expected, len(visible_gpus()), config.require_gpus)


def open_devices(config: TrainConfig, previous: Environment | None = None) -> Devices:
    """Set up this process's devices for one run; call this once, before any computation.

    Raises:
        GpuMissingError: If an expected or required GPU cannot be used.
        UserError: If more GPUs are requested than exist.
    """
    require_expected_gpus(config)
    return open_visible_devices(config, previous)


def open_visible_devices(config: TrainConfig, previous: Environment | None = None) -> Devices:
    """`open_devices` with the available devices, even if GPUs are missing."""
    kind, names, descriptions = _use_local_devices(config, previous)
    return Devices(
        strategy=tf.distribute.MirroredStrategy(names),
        kind=kind,
        descriptions=descriptions,
        computes_bfloat16=_compute_bfloat16(kind, descriptions),
        local_names=names,
        workers=Workers(ALONE),
    ).resolve(config, previous)


class _Offer(msgspec.Struct):
    """The devices of a worker: one for each of its replicas."""

    kind: Kind
    devices: tuple[Device, ...]
    computes_bfloat16: bool

    def __str__(self) -> str:
        return f"{self.kind}:{len(self.devices)}"


def open_devices_of_all(
    config: TrainConfig,
    spec: ClusterSpec,
    connecting: contextlib.AbstractContextManager[None] | None = None,
) -> Devices:
    """Set up the devices of all workers of a run, once all of them have started.

    Precision, XLA and determinism are not determined yet: `Devices.resolve` does that.

    Args:
        config: The run's configuration.
        spec: The workers.
        connecting: Entered once all have started, while TensorFlow connects them. If a worker dies
            in that second, the others wait forever, with Python's global lock held.

    Raises:
        GpuMissingError: If an expected or required GPU cannot be used.
        UserError: If more GPUs are requested than exist, or the workers' devices differ.
        LostWorkerError: If a worker is missing.
    """
    require_expected_gpus(config)
    kind, names, own = _use_local_devices(config, None)

    def connect() -> tf.distribute.Strategy:
        with connecting or contextlib.nullcontext():
            return _create_strategy(spec, kind, len(names))

    strategy = rendezvous(spec, connect, config.join_timeout)
    workers = Workers(spec)
    offers = workers.gather(_Offer(kind, own, _compute_bfloat16(kind, own)))
    _require_equal_devices(workers, offers)
    if strategy.num_replicas_in_sync != len(names) * spec.count:
        workers.end(
            UserError(
                f"--devices received {kind}:{len(names)} with {spec.count} workers, expected "
                f"cpu:1, because with several workers TensorFlow uses one CPU replica per worker; "
                f"start more workers instead"
            )
        )
    descriptions = [
        msgspec.structs.replace(device, name=f"worker {rank} {device.name}")
        for rank, offer in enumerate(offers)
        for device in offer.devices
    ]
    return Devices(
        strategy=strategy,
        kind=kind,
        descriptions=tuple(descriptions),
        computes_bfloat16=all(offer.computes_bfloat16 for offer in offers),
        local_names=names,
        workers=workers,
    )


def _create_strategy(spec: ClusterSpec, kind: Kind, replicas: int) -> tf.distribute.Strategy:
    """The strategy over several workers: GPUs reduce with NCCL, CPUs with TensorFlow's own ring."""
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(spec.workers)}),
        task_type="worker",
        task_id=spec.index,
        num_accelerators={"GPU": replicas if kind == "gpu" else 0},
        rpc_layer="grpc",
    )
    implementations = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementations.NCCL if kind == "gpu" else implementations.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


def _require_equal_devices(workers: Workers, offers: list[_Offer]) -> None:
    """Refuse workers that differ in kind or number of devices: TensorFlow requires equal ones."""
    if len(set(map(str, offers))) == 1:
        return
    listed = ", ".join(f"{workers.spec.name(rank)} {offer}" for rank, offer in enumerate(offers))
    fewest = min(len(offer.devices) for offer in offers)
    advice = f"gpu:{fewest}" if all(offer.kind == "gpu" for offer in offers) else "cpu:1"
    workers.end(
        UserError(
            f"received different devices ({listed}), expected the same kind and number on every "
            f"worker; use nodes with equal devices, or pass --devices {advice}"
        )
    )


def _use_local_devices(
    config: TrainConfig, previous: Environment | None
) -> tuple[Kind, tuple[str, ...], tuple[Device, ...]]:
    """Set up devices of this process; return their kind, names and descriptions."""
    request, gpus = config.devices, visible_gpus()
    if request.kind == "gpu" and request.replicas > len(gpus):
        raise UserError(
            f"--devices received {request}, expected at most {len(gpus)}, the number of GPUs that "
            f"TensorFlow detects; use --devices auto for the available devices, or cpu:N"
        )
    on_gpus = request.kind == "gpu" or (request.kind == "auto" and bool(gpus))
    kind: Kind = "gpu" if on_gpus else "cpu"
    count = request.replicas or _automatic_count(kind, len(gpus), config, previous)
    names = tuple(f"{kind.upper()}:{index}" for index in range(count))
    return kind, names, use_gpus(gpus[:count]) if on_gpus else use_cpu(count)


def _automatic_count(
    kind: Kind, gpus: int, config: TrainConfig, previous: Environment | None
) -> int:
    """Every visible GPU, or one CPU replica; a resumed run keeps its number if it can."""
    visible = gpus if kind == "gpu" else 1
    if previous is None:
        return visible
    if previous.device_kind == kind and (kind == "cpu" or previous.replicas <= gpus):
        count = previous.replicas
    else:
        # The batch belongs to the run and must divide equally.
        count = max(n for n in range(1, visible + 1) if config.batch_size % n == 0)
    if count < visible:
        log.event(
            "idle_gpus",
            logging.WARNING,
            used=count,
            visible=visible,
            message=f"resuming with {count} of {visible} visible GPUs: as many as before, or the "
            f"most that divide the batch equally; --devices gpu:N uses N, but then the run is no "
            f"longer bit-identical",
        )
    return count


def use_gpus(gpus: list[tf.config.PhysicalDevice]) -> tuple[Device, ...]:
    """Set up GPUs and hide the others; call this before any computation."""
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return tuple(map(describe_gpu, gpus))


def use_cpu(replicas: int) -> tuple[Device, ...]:
    """Split the CPU into replicas and hide all GPUs; call this before any computation."""
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model, memory_gib = _cpuinfo("model name") or os.uname().machine, round(memory / 2**30, 1)
    return tuple(Device(f"CPU:{index}", model, memory_gib) for index in range(replicas))


def _compute_bfloat16(kind: Kind, devices: tuple[Device, ...]) -> bool:
    """Whether all devices of this process compute bfloat16 in hardware."""
    if kind == "gpu":
        return all(device.compute_capability >= (8, 0) for device in devices)
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


def _cpuinfo(key: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty if it is missing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else ""
