"""At most one attempt writes into an output folder, also when its attempts run on several hosts.

The holder of the folder renews a lease in it. A waiter judges the latest lease by its own clock: it
is alive if it changes, and dead if the waiter has watched it not change for `LEASE_SECONDS`. Where
holder and waiter share a kernel, a file lock decides at once. Clocks of two hosts are never
compared, and neither process ids nor host names count, since both repeat between containers.

Each lease is a file of its own, numbered upwards, and taking a folder over means creating the next
number, which exactly one of several waiters can. So a holder that was suspended for a while and
continues cannot overwrite its successor's lease; it finds a higher number and gives up.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job import log
from job.cluster.scheduler import RunIdentity
from job.config import ExitCode, JobError, UserError
from job.run.stop import StopRequest

FOLDER = ".lease"

RENEW_SECONDS = 2.0
UNRENEWED_SECONDS = 15.0
"""A holder that could not renew for so long stops: soon others will take it for dead."""


class LeaseLostError(JobError):
    """Another attempt has taken the folder over; nothing may be written any more."""

    exit_code = ExitCode.RUN_AGAIN


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        run: Name of its run; None where nothing tells.
        attempt: Number of the attempt in its run.
        host: For people; host names repeat.
        pid: For people; process ids repeat.
        start: When it took the folder, UTC; for people.
        kernel: What identifies the kernel and the file system as one in which file locks of holder
            and waiter meet; None where the holder could get no lock.
    """

    run: str | None
    attempt: int
    host: str
    pid: int
    start: str
    kernel: str | None

    def __str__(self) -> str:
        run = self.run or "a run without --run-id"
        return f"{run}, process {self.pid} on host {self.host} since {self.start}"


class Lease:
    """A folder held by this process, until `release` or the end of the process.

    Args:
        folder: Where the leases are.
        generation: Number of this lease.
        descriptor: Its open and, where possible, locked file.
        holder: This process.
        stop: Is asked when another attempt wants the folder or has taken it.

    Attributes:
        token: A name that no other lease has.
    """

    def __init__(
        self, folder: Path, generation: int, descriptor: int, holder: Holder, stop: StopRequest
    ) -> None:
        self.token = uuid.uuid4().hex[:8]
        self._folder, self._generation, self._stop = folder, generation, stop
        self._descriptor, self._holder = descriptor, holder
        self._beats = 0
        self._size = len(self._document(released=False)) + 16
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._write(released=False)
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the folder is still this process's to write into.

        Raises:
            LeaseLostError: If another attempt has taken it over.
            UserError: If the lease cannot be read or is gone, and with it probably the volume.
        """
        path = lease_path(self._folder, self._generation)
        try:
            latest = latest_generation(self._folder)
        except OSError as error:
            raise UserError(unusable(path, error)) from error
        if latest > self._generation:
            successor = None
            with contextlib.suppress(OSError):  # it may have been followed in turn
                _, successor = read_lease(lease_path(self._folder, latest))
            raise LeaseLostError(
                f"{self._folder.parent} was taken over by {successor or 'another attempt'}; "
                f"this attempt ends without writing"
            )
        if latest < self._generation:
            raise UserError(
                f"the lease {path} is gone, expected it to stay while the run lasts; was the "
                f"volume unmounted? Restore it and run again"
            )

    def release(self) -> None:
        """Give the folder back; nothing happens if it was done before or the lease is lost."""
        with self._lock:
            if self._released.is_set():
                return
            self._released.set()
            with contextlib.suppress(OSError):
                self._write(released=True)
            os.close(self._descriptor)

    def _keep_renewing(self) -> None:
        renewed = time.monotonic()
        while not self._released.wait(RENEW_SECONDS):
            try:
                self.check()
                with self._lock:
                    if self._released.is_set():
                        return
                    self._write(released=False)
                renewed = time.monotonic()
                asking = asking_path(self._folder, self._generation)
                if asking.exists() and (name := asking.read_text()):
                    reason = f"{name} has asked for {self._folder.parent}"
                    self._stop.ask(reason, "it goes on with the run")
            except LeaseLostError as error:
                self._stop.request(str(error))
                return
            except (OSError, UserError) as error:
                if time.monotonic() - renewed > UNRENEWED_SECONDS:
                    self._stop.request(f"the lease cannot be renewed: {error}")

    def _write(self, *, released: bool) -> None:
        self._beats += 1
        text = self._document(released=released).ljust(self._size)
        # In place and of one size: network file systems show that to others without a delay, and a
        # name that comes to mean another file only once their directory cache has expired.
        os.pwrite(self._descriptor, text.encode(), 0)
        os.fsync(self._descriptor)

    def _document(self, *, released: bool) -> str:
        return json.dumps({**asdict(self._holder), "beats": self._beats, "released": released})


def lease_path(folder: Path, generation: int) -> Path:
    """The file of a lease."""
    return folder / f"{generation:08d}"


def asking_path(folder: Path, generation: int) -> Path:
    """The file by which the holder of a lease is asked to stop."""
    return folder / f"{generation:08d}.stop"


def latest_generation(folder: Path) -> int:
    """The highest number of a lease in the folder; 0 where there is none."""
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)


def read_lease(path: Path) -> tuple[bytes, Holder | None]:
    """A lease's content and its holder; None where it is being written for the first time."""
    content = path.read_bytes()
    document = _parse(content)
    names = [field.name for field in dataclasses.fields(Holder)]
    if not all(name in document for name in names):
        return content, None
    return content, Holder(**{name: document[name] for name in names})


def is_released(content: bytes) -> bool:
    """Whether the holder has given the folder back, by the content of its lease."""
    return bool(_parse(content).get("released"))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def unusable(path: Path, error: OSError) -> str:
    """The message about a lease that the system refuses."""
    return (
        f"cannot use the lease {path}: {error.strerror or error}; mend the volume or give user "
        f"{os.getuid()} access, then run again"
    )


LEASE_SECONDS = 20.0
"""A lease that has not changed for so long is dead."""

HANDOVER_SECONDS = 15.0
"""Time that an older attempt of the same run has to save its work when it is asked to stop."""

POLL_SECONDS = 0.5


def acquire(
    output_dir: Path,
    identity: RunIdentity,
    stop: StopRequest,
    before_asking: Callable[[], None] = lambda: None,
) -> Lease:
    """Take the output folder, waiting as long as an earlier holder may be alive.

    Args:
        output_dir: An existing folder.
        identity: Which run this process belongs to. An older attempt of the same run is asked to
            stop and then replaced.
        stop: Is asked when another attempt wants the folder.
        before_asking: Raises if an older attempt should not be asked to stop after all.

    Raises:
        UserError: If a live attempt of another run holds it, or the lease cannot be written.
        LeaseLostError: If a newer attempt of this run holds it.
    """
    folder = output_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        return _Waiter(folder, identity, stop, before_asking).wait()
    except OSError as error:
        raise UserError(unusable(folder, error)) from error


def read_holder(output_dir: Path) -> Holder | None:
    """Read who holds the output folder now, without asking for it.

    Returns:
        None if nobody does, or the holder has ended. A holder on another host may have ended too:
        only a lease that is watched for `LEASE_SECONDS` shows that.

    Raises:
        UserError: If the lease cannot be read.
    """
    folder = output_dir / FOLDER
    try:
        if not folder.is_dir() or (generation := latest_generation(folder)) == 0:
            return None
        path = lease_path(folder, generation)
        content, holder = read_lease(path)
        is_over = is_released(content) or _probe(path, holder) == "free"
    except FileNotFoundError:
        return read_holder(output_dir)  # its successor has tidied it away
    except OSError as error:
        raise UserError(unusable(folder, error)) from error
    return None if is_over else holder


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
    ) -> None:
        self._folder, self._identity, self._stop = folder, identity, stop
        self._before_asking = before_asking
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
                time.sleep(POLL_SECONDS)

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
        if holder and alive and not replaces:
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
        silence = min(now - self._looked_at, 2 * POLL_SECONDS)
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
        kernel = kernel_of(path)
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
        )
        lease = Lease(self._folder, generation, descriptor, holder, self._stop)
        for earlier in self._folder.iterdir():
            if earlier.stem.isdecimal() and int(earlier.stem) < generation:
                earlier.unlink(missing_ok=True)
        return lease


def _probe(path: Path, holder: Holder | None) -> str:
    """Whether the holder's file lock is "held", "free", or "unknown" because it is elsewhere."""
    if holder is None or holder.kernel is None or holder.kernel != kernel_of(path):
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


def kernel_of(path: Path) -> str | None:
    """Identifies kernel and file system: file locks meet only within both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{path.stat().st_dev}"
    except OSError:
        return None
