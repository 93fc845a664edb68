"""The replicas of a run and where they are: on devices of this process, or of all its workers.

The only module that picks a `tf.distribute` strategy.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import tensorflow as tf

from job import log
from job.cluster import ALONE, ClusterSpec
from job.config import DeviceRequest, Precision, Switch, UserError
from job.gpus import visible_gpus
from job.joining import join
from job.local_devices import LocalDevices, use_cpu, use_gpus
from job.multi_worker_strategy import create_strategy
from job.workers import Workers


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

    def without_other_workers(self) -> "Placement":
        """One replica on the first device of this process."""
        names = self.local_names[:1]
        first = self.workers.spec.index * len(self.local_names)
        # A single device has no collectives, which would meddle with those of all workers.
        return Placement(
            tf.distribute.MirroredStrategy(names),
            self.kind,
            self.descriptions[first : first + 1],
            self.computes_bfloat16,
            names,
            Workers(ALONE),
        )


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
