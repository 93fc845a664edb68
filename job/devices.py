"""Visible devices, and the distribution strategy, precision and compilation that suit them.

The only module that picks a `tf.distribute` strategy.
"""

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import tensorflow as tf

from job import log
from job.cluster import ALONE, ClusterSpec
from job.config import DeviceRequest, Precision, Switch, TrainConfig, UserError
from job.gpus import Promise, check_promised_gpus, promised_gpus, visible_gpus
from job.joining import join
from job.local_devices import LocalDevices, use_cpu, use_gpus
from job.multi_worker_strategy import create_strategy
from job.workers import Workers


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
class Placement:
    """The replicas of a run in their places.

    Attributes:
        strategy: Distributes over all of them, those of other workers too; in sync after each step.
        kind: "cpu" or "gpu".
        descriptions: For each replica its name, model and memory, and on GPUs compute capability.
        computes_bfloat16: Whether all of them do so in hardware.
        local_names: Names of this process's own devices.
        workers: The processes that have them.
    """

    strategy: tf.distribute.Strategy
    kind: Literal["cpu", "gpu"]
    descriptions: tuple[dict[str, Any], ...]
    computes_bfloat16: bool
    local_names: tuple[str, ...]
    workers: Workers

    @property
    def replicas(self) -> int:
        """Number of replicas that train in parallel."""
        return len(self.local_names) * self.workers.count


@dataclass(frozen=True)
class Devices:
    """The replicas of a run and how they compute.

    Attributes:
        placement: Where they are.
        precision: "float32" or "bfloat16".
        jit: The setting that says what XLA compiles.
        compilation: What it compiles with this setting on this kind of device.
        deterministic: Whether every op gives the same bits each time, or fails where it cannot.
        threads: Processors that this process may run on; sums are split by them.
    """

    placement: Placement
    precision: Literal["float32", "bfloat16"]
    jit: Switch
    compilation: Compilation
    deterministic: bool
    threads: int

    @property
    def strategy(self) -> tf.distribute.Strategy:
        """Distributes over all replicas."""
        return self.placement.strategy

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """What they are."""
        return self.placement.kind

    @property
    def descriptions(self) -> tuple[dict[str, Any], ...]:
        """For each replica its name, model and memory, and on GPUs compute capability."""
        return self.placement.descriptions

    @property
    def workers(self) -> Workers:
        """The processes that have them."""
        return self.placement.workers

    def without_other_workers(self) -> "Devices":
        """One device of this process, for what the other workers have no part in."""
        if self.workers.count == 1:
            return self
        names = self.placement.local_names[:1]
        alone = replace(
            self.placement,
            # A single device has no collectives, which would meddle with those of all workers.
            strategy=tf.distribute.MirroredStrategy(names),
            descriptions=self.descriptions[self.workers.spec.index * self.local_replicas :][:1],
            local_names=names,
            workers=Workers(ALONE),
        )
        return replace(self, placement=alone)

    @property
    def local_replicas(self) -> int:
        """Number of replicas of this process."""
        return len(self.placement.local_names)

    @property
    def replicas(self) -> int:
        """Number of replicas that train in parallel."""
        return self.placement.replicas

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


def open_promised_devices(
    config: TrainConfig, previous: Previous | None = None, placement: Placement | None = None
) -> Devices:
    """Set up the devices that a configuration asks for, if every promised GPU is there.

    Args:
        config: Says which devices, and how they compute.
        previous: What "auto" keeps where it can, from the attempt that this one goes on from.
        placement: Replicas that are in their places already, all promised GPUs among them.

    Raises:
        GpuMissingError: If a promised or required GPU cannot be used.
        UserError: If more GPUs are asked for than there are.
    """
    if placement is None:
        require_promised_gpus(config)
    return open_devices(
        config.devices, config.precision, config.jit, config.deterministic, previous, placement
    )


def require_promised_gpus(config: TrainConfig) -> None:
    """Refuse to go on without the GPUs that this process was promised or that are required.

    Raises:
        GpuMissingError: If one cannot be used.
    """
    asked_for_cpu = config.devices.kind == "cpu"
    promise = Promise(0, "") if asked_for_cpu else promised_gpus(os.environ)
    check_promised_gpus(promise, len(visible_gpus()), config.require_gpus)


def place_replicas(request: DeviceRequest, previous: Previous | None = None) -> Placement:
    """Place the replicas of a run on devices of this process.

    Args:
        request: Which; "auto" takes every visible GPU, or the CPU where there is none.
        previous: What "auto" keeps where it can.

    Raises:
        UserError: If more GPUs are asked for than there are.
    """
    local = _use_local_devices(request, previous)
    strategy = tf.distribute.MirroredStrategy(local.names)
    return Placement(
        strategy,
        local.kind,
        local.descriptions,
        local.computes_bfloat16,
        local.names,
        Workers(ALONE),
    )


def place_replicas_on_all(
    request: DeviceRequest, spec: ClusterSpec, join_timeout_seconds: float
) -> Placement:
    """Place the replicas of a run on devices of all its workers, once all of them are there.

    Args:
        request: Which devices of each worker.
        spec: The workers.
        join_timeout_seconds: Longest time to wait for them.

    Raises:
        UserError: If more GPUs are asked for than there are, or workers differ in their devices.
        LostWorkerError: If not all workers come.
    """
    local = _use_local_devices(request, None)
    create = partial(create_strategy, spec, local.kind, len(local.names))
    strategy = join(spec, create, join_timeout_seconds)
    workers = Workers(spec)
    offers = workers.gather(
        {
            "devices": f"{local.kind}:{len(local.names)}",
            "descriptions": local.descriptions,
            "computes_bfloat16": local.computes_bfloat16,
        }
    )
    _require_equal_devices(workers, [offer["devices"] for offer in offers])
    descriptions = [
        {**description, "name": f"worker {rank} {description['name']}"}
        for rank, offer in enumerate(offers)
        for description in offer["descriptions"]
    ]
    return Placement(
        strategy,
        local.kind,
        tuple(descriptions),
        all(offer["computes_bfloat16"] for offer in offers),
        local.names,
        workers,
    )


def _require_equal_devices(workers: Workers, devices: list[str]) -> None:
    """Refuse workers that differ in kind or number of devices: TensorFlow takes equal ones only."""
    if len(set(devices)) == 1:
        return
    listed = ", ".join(f"{workers.spec.name(rank)} {one}" for rank, one in enumerate(devices))
    fewest = min(int(one.partition(":")[2]) for one in devices)
    alike = len({one.partition(":")[0] for one in devices}) == 1
    advice = f"--devices {devices[0].partition(':')[0]}:{fewest}" if alike else "--devices cpu:1"
    error = UserError(
        f"received different devices ({listed}), expected as many of the same kind on every "
        f"worker; start it on equal nodes, or say {advice}"
    )
    workers.end(error)


def _use_local_devices(request: DeviceRequest, previous: Previous | None) -> LocalDevices:
    gpus = visible_gpus()
    if request.kind == "gpu" and request.count > len(gpus):
        raise UserError(
            f"--devices received gpu:{request.count}, expected at most the {len(gpus)} visible "
            f"GPUs; ask for fewer, or --devices auto or cpu:N"
        )
    on_gpus = request.kind == "gpu" or (request.kind == "auto" and bool(gpus))
    count = request.count or _automatic_count("gpu" if on_gpus else "cpu", len(gpus), previous)
    return use_gpus(gpus[:count]) if on_gpus else use_cpu(count)


def open_devices(
    request: DeviceRequest,
    precision: Precision,
    jit: Switch,
    deterministic: Switch = "auto",
    previous: Previous | None = None,
    placement: Placement | None = None,
) -> Devices:
    """Set the requested devices up for one run; once in a process, before any computation.

    Args:
        request: Which replicas; "auto" takes every visible GPU, or the CPU where there is none.
        precision: "auto" takes bfloat16 where all of them compute it in hardware.
        jit: "auto" compiles everything on GPUs, and augmentation and optimizer update on CPUs.
        deterministic: "auto" is on for CPUs.
        previous: What "auto" keeps where it can, from the attempt that this one goes on from.
        placement: Replicas that are in their places already.

    Raises:
        UserError: If more GPUs are asked for than there are.
    """
    if placement is None:
        placement = place_replicas(request, previous)
    kind = placement.kind
    if precision == "auto":
        precision = _automatic_precision(placement, previous)
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
        placement=placement,
        precision=precision,
        jit=jit,
        compilation=Compilation(
            network=compile_network,
            elementwise=jit != "off",
            # On CPUs XLA's convolutions are slower still inside of a loop.
            loops=compile_network and kind == "gpu" and placement.replicas == 1,
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
    placement: Placement, previous: Previous | None
) -> Literal["float32", "bfloat16"]:
    in_hardware = placement.computes_bfloat16
    if previous is None:
        return "bfloat16" if in_hardware else "float32"
    # Older GPUs have no bfloat16 kernels at all; CPUs without the instructions are merely slow.
    keep = previous.precision == "bfloat16" and (in_hardware or placement.kind == "cpu")
    return "bfloat16" if keep else "float32"
