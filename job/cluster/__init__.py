"""Machines, devices and processes."""

import msgspec

from job.config import Switch


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device that has a replica.

    Attributes:
        name: As TensorFlow calls it, after its worker where there are several.
        model: Of the processor; None where nothing gives it.
        memory_gib: Its whole memory.
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
    """How and on what a run is computed.

    Attributes:
        device_kind: "cpu" or "gpu".
        device_models: Different models of the devices, in order.
        workers: Processes that train together.
        replicas: Replicas over all workers.
        threads: Processors that a process may run on; sums are split by them.
        precision: "float32" or "bfloat16".
        jit: The setting that says what XLA compiles.
        deterministic: Whether every operation gives the same bits each time.
        versions: Of the job, Python and the libraries.
        git_commit: Of the program.
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
