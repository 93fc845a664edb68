"""Machines, devices and processes."""

import msgspec

from job.config import Switch


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device that runs a replica.

    Attributes:
        name: TensorFlow's name, preceded by the worker if there are several.
        model: Model of the processor; None if unknown.
        memory_gib: Its total memory.
        compute_capability: Major and minor number; empty for a CPU.
    """

    name: str
    model: str | None = None
    memory_gib: float | None = None
    compute_capability: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"model {self.model or 'unknown'}"]
        if self.memory_gib is not None:
            parts.append(f"memory {self.memory_gib} GiB")
        if self.compute_capability:
            parts.append(f"compute capability {'.'.join(map(str, self.compute_capability))}")
        return ", ".join(parts)


class Environment(msgspec.Struct, frozen=True):
    """How a run is computed, and on which devices.

    Attributes:
        device_kind: "cpu" or "gpu".
        device_models: Different models of the devices, sorted.
        workers: Processes that train together.
        replicas: Replicas over all workers.
        threads: Processors that a process may run on; sums are split among them.
        precision: "float32" or "bfloat16".
        jit: The setting that determines what XLA compiles.
        deterministic: Whether every operation computes the same bits each time.
        versions: Versions of the job, Python and the libraries.
        git_commit: Commit of the program.
        variables: Environment variables that change TensorFlow's bits.
    """

    device_kind: str
    device_models: list[str]
    replicas: int
    threads: int
    precision: str
    jit: Switch
    deterministic: bool
    versions: dict[str, str]
    git_commit: str | None
    variables: dict[str, str]
    workers: int = 1
