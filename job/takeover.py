"""Taking an output folder over from whoever held it before.

A waiter judges the latest lease by its own clock: it is alive if it changes, and dead if the waiter
has watched it not change for `LEASE_SECONDS`. Where holder and waiter share a kernel, a file lock
tells at once.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from job import log
from job.cluster import RunIdentity
from job.config import JobError, UserError
from job.lease import (
    FOLDER,
    Holder,
    Lease,
    LeaseLostError,
    asking_path,
    is_released,
    latest_generation,
    lease_path,
    read_lease,
    unusable,
)
from job.preemption import StopRequest

LEASE_SECONDS = 20.0
"""A lease that has not changed for so long is dead."""

HANDOVER_SECONDS = 15.0
"""Time that an older attempt of the same run has to save its work when it is asked to stop."""

_POLL_SECONDS = 0.5


def acquire(
    output_dir: Path,
    identity: RunIdentity,
    stop: StopRequest,
    before_asking: Callable[[], None] = lambda: None,
    *,
    brief: bool = False,
) -> Lease:
    """Take the output folder, waiting as long as an earlier holder may be alive.

    Args:
        output_dir: An existing folder.
        identity: Which run this process belongs to. An older attempt of the same run is asked to
            stop and then replaced.
        stop: Is asked when another attempt wants the folder.
        before_asking: Raises if an older attempt should not be asked to stop after all.
        brief: Whether others should wait until this process gives the folder back.

    Raises:
        UserError: If a live attempt of another run holds it, or the lease cannot be written.
        LeaseLostError: If a newer attempt of this run holds it.
    """
    folder = output_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        return _Waiter(folder, identity, stop, before_asking, brief).wait()
    except OSError as error:
        raise UserError(unusable(folder, error)) from error


def find_holder(output_dir: Path) -> Holder | None:
    """Find out who holds the output folder, by the rules of `acquire` and without asking for it.

    Where only a change of the lease tells whether its holder is alive, this waits for one as long
    as `acquire` would.

    Returns:
        None if nobody does.

    Raises:
        UserError: If the lease cannot be read.
    """
    folder = output_dir / FOLDER
    try:
        if not folder.is_dir() or (generation := latest_generation(folder)) == 0:
            return None
        path = lease_path(folder, generation)
        first, holder = read_lease(path)
        content, give_up_at = first, time.monotonic() + LEASE_SECONDS
        while not is_released(content) and time.monotonic() < give_up_at:
            lock = _probe(path, holder)
            if lock == "free":
                return None
            if holder and (lock == "held" or content != first):
                return holder
            time.sleep(_POLL_SECONDS)
            content, holder = read_lease(path)
    except FileNotFoundError:
        return find_holder(output_dir)  # its successor has tidied it away
    except OSError as error:
        raise UserError(unusable(folder, error)) from error
    return None


def refusal(output_dir: Path, identity: RunIdentity, holder: Holder) -> JobError:
    """Why a process cannot have an output folder that another, living one holds."""
    if holder.run is not None and holder.run == identity.name:
        return LeaseLostError(f"{output_dir} is held by a newer attempt of this run: {holder}")
    return UserError(
        f"--output-dir {output_dir} is in use by {holder}; wait for its end, stop it, or name "
        f"another folder"
    )


class _Waiter:
    """Watches the latest lease of a folder until it can be succeeded."""

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        stop: StopRequest,
        before_asking: Callable[[], None],
        brief: bool,
    ) -> None:
        self._folder, self._identity, self._stop = folder, identity, stop
        self._before_asking, self._brief = before_asking, brief
        self._watch(0, b"")

    def _watch(self, generation: int, content: bytes) -> None:
        self._generation, self._content = generation, content
        self._looked_at = time.monotonic()
        self._unchanged_seconds = 0.0
        self._asked_at: float | None = None
        self._announced = False

    def wait(self) -> Lease:
        while True:
            generation = latest_generation(self._folder)
            if generation == 0 or self._may_follow(generation):
                lease = self._create(generation + 1)
                if lease:
                    return lease
            else:
                time.sleep(_POLL_SECONDS)

    def _may_follow(self, generation: int) -> bool:
        """Whether the holder of a lease has given it back, is dead, or has had its time."""
        try:
            return self._is_over(generation)
        except FileNotFoundError:
            return False  # its successor has tidied it away

    def _is_over(self, generation: int) -> bool:
        path = lease_path(self._folder, generation)
        content, holder = read_lease(path)
        if generation != self._generation:
            self._watch(generation, content)
        if is_released(content):
            return True
        lock = _probe(path, holder)
        if lock == "free":
            return True
        alive = lock == "held" or content != self._content
        self._count_silence(content)
        replaces = holder and self._identity.replaces(holder.run, holder.attempt)
        if holder and alive and not replaces and not (holder.brief and not self._brief):
            raise refusal(self._folder.parent, self._identity, holder)
        if replaces:
            self._ask_to_stop(generation)
        self._announce(holder)
        return self._unchanged_seconds >= LEASE_SECONDS or (
            self._asked_at is not None and time.monotonic() - self._asked_at >= HANDOVER_SECONDS
        )

    def _count_silence(self, content: bytes) -> None:
        """Count the time in which the lease was seen not to change.

        Not the time in which the volume gave no answer: the holder could not renew it either.
        """
        now = time.monotonic()
        silence = min(now - self._looked_at, 2 * _POLL_SECONDS)
        self._unchanged_seconds = (
            self._unchanged_seconds + silence if content == self._content else 0.0
        )
        self._looked_at, self._content = now, content

    def _ask_to_stop(self, generation: int) -> None:
        if self._asked_at is None:
            self._before_asking()
            name = f"a newer attempt of {self._identity.name} on host {socket.gethostname()}"
            asking_path(self._folder, generation).write_text(name)
            self._asked_at = time.monotonic()

    def _announce(self, holder: Holder | None) -> None:
        if not self._announced:
            self._announced = True
            log.event(
                "waiting",
                logging.WARNING,
                holder=str(holder) if holder else None,
                timeout_seconds=LEASE_SECONDS,
                message=f"{self._folder.parent} is held by {holder or 'somebody'}; waiting until "
                f"it is given back or not renewed for {LEASE_SECONDS:g} s",
            )

    def _create(self, generation: int) -> Lease | None:
        """Create the lease of this number; None if somebody else was faster."""
        path = lease_path(self._folder, generation)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        kernel = _kernel(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            kernel = None  # a file system without locks
        holder = Holder(
            self._identity.name,
            self._identity.attempt,
            socket.gethostname(),
            os.getpid(),
            log.utc_now(),
            kernel,
            self._brief,
        )
        lease = Lease(self._folder, generation, descriptor, holder, self._stop)
        for earlier in self._folder.iterdir():
            if earlier.stem.isdecimal() and int(earlier.stem) < generation:
                earlier.unlink(missing_ok=True)
        return lease


def _probe(path: Path, holder: Holder | None) -> str:
    """Whether the holder's file lock is "held", "free", or "unknown" because it is elsewhere."""
    if holder is None or holder.kernel is None or holder.kernel != _kernel(path):
        return "unknown"
    with path.open("rb") as file:
        try:
            # Shared, so that two waiters who probe at once do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError:
            return "unknown"
    return "free"


def _kernel(path: Path) -> str | None:
    """Identifies kernel and file system: file locks meet only within both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{path.stat().st_dev}"
    except OSError:
        return None
