"""The devices of a run, the strategy over its replicas, and the precision and XLA that suit them.

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
"""`tf.function` that does not translate Python's control flow: on tensors it is `tf.while_loop`.

AutoGraph writes a file into ``TMPDIR`` for each function that it translates. A process that is
killed, or that ends without the interpreter's own end as this job does, leaves them behind.
"""

Kind = Literal["cpu", "gpu"]


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

    network: bool = False
    elementwise: bool = False
    loops: bool = False


@dataclass(frozen=True)
class Devices:
    """The replicas of a run, where they are and how they compute.

    Attributes:
        strategy: Distributes over all replicas, those of other workers too; in sync after each
            step.
        kind: "cpu" or "gpu".
        descriptions: For each replica its device.
        computes_bfloat16: Whether all devices do so in hardware.
        local_names: Names of this process's own devices.
        workers: The processes that have the devices.
        precision: "float32" or "bfloat16".
        jit: The setting that says what XLA compiles.
        compilation: What it compiles with this setting on this kind of device.
        deterministic: Whether every op gives the same bits each time, or fails where it cannot.
        threads: Processors that this process may run on; sums are split by them.
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

    def resolve(self, config: TrainConfig, previous: Environment | None = None) -> "Devices":
        """Settle how the devices compute; before any computation.

        Args:
            config: With "auto", precision is bfloat16 where all devices compute it in hardware,
                XLA compiles everything on GPUs and augmentation and optimizer update on CPUs, and
                operations are deterministic on CPUs.
            previous: What the attempt before computed with, which "auto" keeps where it can.
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
            # Not from CPUs to GPUs: those may lack an operation's deterministic form.
            if previous and previous.device_kind == self.kind:
                deterministic = previous.deterministic
        if deterministic:
            tf.config.experimental.enable_op_determinism()
        # TF32 is how GPUs speed float32 up. Beside bfloat16 the little that is float32 stays exact,
        # and so the saved model's evaluation, which is too, can be compiled during the training.
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
                # On CPUs XLA's convolutions are slower still inside of a loop.
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
        """The first device of this process, for what the other workers have no part in."""
        if self.workers.count == 1:
            return self
        names = self.local_names[:1]
        first = self.workers.spec.index * len(self.local_names)
        return replace(
            self,
            # A single device has no collectives, which would meddle with those of all workers.
            strategy=tf.distribute.MirroredStrategy(names),
            descriptions=self.descriptions[first : first + 1],
            local_names=names,
            workers=Workers(ALONE),
        )


def _threads() -> int:
    """Processors that TensorFlow computes with."""
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
    asked_for_cpu = config.devices.kind == "cpu"
    expected = ExpectedGpus(0, "") if asked_for_cpu else expected_gpus(os.environ)
    check_expected_gpus(expected, len(visible_gpus()), config.require_gpus)


def open_devices(config: TrainConfig, previous: Environment | None = None) -> Devices:
    """Set up devices of this process for one run; once in a process, before any computation.

    Raises:
        GpuMissingError: If an expected or required GPU cannot be used.
        UserError: If more GPUs are asked for than there are.
    """
    require_expected_gpus(config)
    return open_visible_devices(config, previous)


def open_visible_devices(config: TrainConfig, previous: Environment | None = None) -> Devices:
    """`open_devices` of what there is, even if GPUs are missing."""
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
    """What a worker has to train with: one device for each of its replicas."""

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
    """Set up devices of all workers of a run, once all of them are there.

    Precision and the like are not settled yet: `Devices.resolve` does that.

    Args:
        config: The run's configuration.
        spec: The workers.
        connecting: Entered once all are there, while TensorFlow connects them. A worker that dies
            in that second leaves the others waiting for ever, with Python's global lock held.

    Raises:
        GpuMissingError: If an expected or required GPU cannot be used.
        UserError: If more GPUs are asked for than there are, or workers differ in their devices.
        LostWorkerError: If not all workers come.
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
                f"cpu:1, as TensorFlow takes one CPU replica of each of several workers; start "
                f"more workers instead"
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
    """The strategy over several workers: GPUs reduce by NCCL, CPUs by TensorFlow's own ring."""
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
    """Refuse workers that differ in kind or number of devices: TensorFlow takes equal ones only."""
    if len(set(map(str, offers))) == 1:
        return
    listed = ", ".join(f"{workers.spec.name(rank)} {offer}" for rank, offer in enumerate(offers))
    fewest = min(len(offer.devices) for offer in offers)
    advice = f"gpu:{fewest}" if all(offer.kind == "gpu" for offer in offers) else "cpu:1"
    workers.end(
        UserError(
            f"received different devices ({listed}), expected as many of the same kind on every "
            f"worker; start it on equal nodes, or say --devices {advice}"
        )
    )


def _use_local_devices(
    config: TrainConfig, previous: Environment | None
) -> tuple[Kind, tuple[str, ...], tuple[Device, ...]]:
    """Make devices of this process ready: their kind, their names in it and what they are."""
    request, gpus = config.devices, visible_gpus()
    if request.kind == "gpu" and request.replicas > len(gpus):
        raise UserError(
            f"--devices received {request}, expected at most the number of GPUs that TensorFlow "
            f"sees, {len(gpus)}; use --devices auto, which takes what is there, or cpu:N"
        )
    on_gpus = request.kind == "gpu" or (request.kind == "auto" and bool(gpus))
    kind: Kind = "gpu" if on_gpus else "cpu"
    count = request.replicas or _automatic_count(kind, len(gpus), config, previous)
    names = tuple(f"{kind.upper()}:{index}" for index in range(count))
    return kind, names, use_gpus(gpus[:count]) if on_gpus else use_cpu(count)


def _automatic_count(
    kind: Kind, gpus: int, config: TrainConfig, previous: Environment | None
) -> int:
    """Every visible GPU, or one CPU replica; a run that resumes keeps its number where it can."""
    visible = gpus if kind == "gpu" else 1
    if previous is None:
        return visible
    if previous.device_kind == kind and (kind == "cpu" or previous.replicas <= gpus):
        count = previous.replicas
    else:
        # The batch is the run's, and it has to divide.
        count = max(n for n in range(1, visible + 1) if config.batch_size % n == 0)
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


def use_gpus(gpus: list[tf.config.PhysicalDevice]) -> tuple[Device, ...]:
    """Make GPUs ready, and hide the others; before any computation."""
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return tuple(map(describe_gpu, gpus))


def use_cpu(replicas: int) -> tuple[Device, ...]:
    """Split the processor into replicas, and hide all GPUs; before any computation."""
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
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else ""
