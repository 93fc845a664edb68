"""Machines, devices and processes."""

import msgspec


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
