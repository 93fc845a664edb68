"""The devices of a run, and the precision and compilation that suit them."""

import functools
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import tensorflow as tf

from job.config import DeviceRequest, Precision, Switch, TrainConfig, UserError
from job.gpus import Promise, check_promised_gpus, promised_gpus, visible_gpus
from job.placement import Placement, Previous, place_replicas
from job.workers import Workers

graph_function = functools.partial(tf.function, autograph=False)
"""`tf.function` that does not translate Python's control flow: on tensors it is `tf.while_loop`.

AutoGraph writes a file into ``TMPDIR`` for each function that it translates. A process that is
killed, or that ends without the interpreter's own end as this job does, leaves them behind.
"""


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
        return replace(self, placement=self.placement.without_other_workers())

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


def _automatic_precision(
    placement: Placement, previous: Previous | None
) -> Literal["float32", "bfloat16"]:
    in_hardware = placement.computes_bfloat16
    if previous is None:
        return "bfloat16" if in_hardware else "float32"
    # Older GPUs have no bfloat16 kernels at all; CPUs without the instructions are merely slow.
    keep = previous.precision == "bfloat16" and (in_hardware or placement.kind == "cpu")
    return "bfloat16" if keep else "float32"
