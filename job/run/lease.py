"""The lease on an output folder: at most one attempt writes into it, even from several hosts.

The holder of the folder renews a lease in it. A waiter judges the latest lease by its own clock:
the lease is alive if it changes, and dead if it has not changed for `LEASE_SECONDS`. If holder and
waiter share a kernel, a file lock decides immediately. Clocks of two hosts are never compared.
Neither process ids nor host names count, because both repeat between containers.

Each lease is a separate file, and its name is a number. To take the folder over, a waiter creates
the file with the next number, and only one of several waiters can do that. A holder that was
suspended and continues cannot overwrite its successor's lease: it finds a higher number and gives
up.
"""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from job import log
from job.clock import running_seconds
from job.cluster.scheduler import RunIdentity
from job.config import ExitCode, JobError, UserError
from job.run.folder import flush, refused
from job.run.stop import StopRequest

FOLDER = ".lease"

RENEW_SECONDS = 2.0
UNRENEWED_SECONDS = 15.0
"""A holder that could not renew for this long stops: others will soon consider it dead."""

LEASE_SECONDS = 20.0
"""A lease that has not changed for this long is dead."""

HANDOVER_SECONDS = 15.0
"""Time for an older attempt of the same run to save its work after a request to stop."""

POLL_SECONDS = 0.5


class LeaseLostError(JobError):
    """Another attempt has taken the folder over; this process must not write into it."""

    exit_code = ExitCode.RUN_AGAIN


class Holder(msgspec.Struct, frozen=True):
    """The holder of a folder, as recorded in a lease.

    Attributes:
        run: Name of its run; None if it has no name.
        attempt: Number of the attempt in its run.
        host: Host name, for messages only, because host names repeat.
        pid: Process id, for messages only, because process ids repeat.
        start: When it took the folder, UTC; for messages only.
        kernel: Identifies the kernel and the file system: if they are also those of a waiter, the
            file lock decides. None if the holder could not get the lock.
        beats: Number of times that it has written the lease.
        released: Whether it has released the folder.
    """

    run: str | None
    attempt: int
    host: str
    pid: int
    start: str
    kernel: str | None
    beats: int = 0
    released: bool = False

    def __str__(self) -> str:
        run = f"{self.run}, " if self.run else ""
        return f"{run}process {self.pid} on host {self.host} since {self.start}"


class Lease:
    """A folder held by this process, until `release` or the end of the process.

    Args:
        folder: The folder that contains the leases.
        generation: Number of this lease.
        descriptor: Its open file, locked if possible.
        holder: This process.
        stop: Receives a request when another attempt requests the folder or has taken it over.

    Attributes:
        token: A name that is unique to this lease.
    """

    def __init__(
        self, folder: Path, generation: int, descriptor: int, holder: Holder, stop: StopRequest
    ) -> None:
        self.token = uuid.uuid4().hex[:8]
        self._folder, self._generation, self._stop = folder, generation, stop
        self._descriptor, self._holder = descriptor, holder
        self._size = len(msgspec.json.encode(holder)) + 16  # space for more digits of beats
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._write()
        threading.Thread(target=self._keep_renewing, daemon=True).start()

    def check(self) -> None:
        """Verify that this process still holds the folder.

        Raises:
            LeaseLostError: If another attempt has taken it over.
            UserError: If the lease cannot be read or is missing, probably together with its volume.
        """
        path = lease_path(self._folder, self._generation)
        try:
            latest = latest_generation(self._folder)
        except OSError as error:
            raise refused("use the lease", path, error) from error
        if latest > self._generation:
            successor = None
            with contextlib.suppress(OSError):  # it may have been replaced as well
                successor = read_lease(lease_path(self._folder, latest))
            raise LeaseLostError(
                f"{self._folder.parent} was taken over by {successor or 'another attempt'}; "
                f"this attempt ends without writing"
            )
        if latest < self._generation:
            raise UserError(
                f"the lease {path} is missing, expected it to exist while the run lasts; check "
                f"whether the volume is mounted, then run again"
            )

    def release(self) -> None:
        """Release the folder; without effect if it is already released or the lease is lost."""
        with self._lock:
            if self._released.is_set():
                return
            self._released.set()
            with contextlib.suppress(OSError):
                self._write(released=True)
            os.close(self._descriptor)

    def _keep_renewing(self) -> None:
        renewed = running_seconds()
        while not self._released.wait(RENEW_SECONDS):
            try:
                self.check()
                with self._lock:
                    if self._released.is_set():
                        return
                    self._write()
                renewed = running_seconds()
                request = stop_request_path(self._folder, self._generation)
                if request.exists() and (name := request.read_text("utf-8")):
                    reason = f"{name} has requested the folder {self._folder.parent}"
                    self._stop.request_handover(reason, "that attempt resumes the run")
            except LeaseLostError as error:
                self._stop.request(str(error))
                return
            except (OSError, UserError) as error:
                if running_seconds() - renewed > UNRENEWED_SECONDS:
                    self._stop.request(f"the lease cannot be renewed: {error}")

    def _write(self, *, released: bool = False) -> None:
        self._holder = msgspec.structs.replace(
            self._holder, beats=self._holder.beats + 1, released=released
        )
        # In place and with a constant size: network file systems show such a change to other hosts
        # immediately, but a replaced file only after their directory cache has expired.
        os.pwrite(self._descriptor, msgspec.json.encode(self._holder).ljust(self._size), 0)
        flush(self._descriptor)


def lease_path(folder: Path, generation: int) -> Path:
    """Path of a lease's file."""
    return folder / f"{generation:08d}"


def stop_request_path(folder: Path, generation: int) -> Path:
    """Path of the file that requests the holder of a lease to stop."""
    return folder / f"{generation:08d}.stop"


def latest_generation(folder: Path) -> int:
    """The highest number of a lease in the folder; 0 if it contains none."""
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)


def read_lease(path: Path) -> Holder | None:
    """The holder in a lease; None while it is being written for the first time."""
    content = path.read_bytes()
    try:
        return msgspec.json.decode(content, type=Holder)
    except (msgspec.MsgspecError, ValueError):
        return None


def acquire(
    output_dir: Path,
    identity: RunIdentity,
    stop: StopRequest,
    before_takeover: Callable[[], None] = lambda: None,
) -> Lease:
    """Take the output folder, and wait as long as an earlier holder may be alive.

    Args:
        output_dir: An existing folder.
        identity: The run of this process. An older attempt of the same run is requested to stop and
            then replaced.
        stop: Receives a request when another attempt requests the folder.
        before_takeover: Called before an older attempt is requested to stop; raises to prevent it.

    Raises:
        UserError: If a live attempt of another run holds it, or the lease cannot be written.
        LeaseLostError: If a newer attempt of this run holds it.
    """
    folder = output_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        while True:
            generation = latest_generation(folder)
            # Another process may be faster and remove the lease that this one reads.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                if generation:
                    _wait_until_replaceable(folder, generation, identity, before_takeover)
                return _create(folder, generation + 1, identity, stop)
            time.sleep(POLL_SECONDS)
    except OSError as error:
        raise refused("use the lease", folder, error) from error


def read_holder(output_dir: Path) -> Holder | None:
    """Read the current holder of the output folder, without requesting the folder.

    Returns:
        None if the folder has no holder or the holder has ended. A returned holder on another host
        may have ended too: that only shows if its lease does not change for `LEASE_SECONDS`.

    Raises:
        UserError: If the lease cannot be read.
    """
    folder = output_dir / FOLDER
    try:
        generation = latest_generation(folder) if folder.is_dir() else 0
        if not generation:
            return None
        path = lease_path(folder, generation)
        holder = read_lease(path)
        return None if holder is None or _probe(path, holder) == "free" else holder
    except FileNotFoundError:
        return read_holder(output_dir)  # its successor has removed it
    except OSError as error:
        raise refused("use the lease", folder, error) from error


def refusal(output_dir: Path, identity: RunIdentity, holder: Holder) -> JobError:
    """The error for an output folder that another running process holds."""
    is_same_run = holder.run is not None and holder.run == identity.name
    if is_same_run and identity.attempt is not None and holder.attempt > identity.attempt:
        return LeaseLostError(f"{output_dir} is held by a newer attempt of this run: {holder}")
    return UserError(
        f"--output-dir {output_dir} is in use by {holder}; wait until that process ends, stop it, "
        f"or use another folder"
    )


def _wait_until_replaceable(
    folder: Path, generation: int, identity: RunIdentity, before_takeover: Callable[[], None]
) -> None:
    """Wait until a lease is released or dead, or its holder has had its time to stop.

    Raises:
        JobError: If the holder is alive and need not stop.
        FileNotFoundError: If a successor has removed the lease.
    """
    path = lease_path(folder, generation)
    last, read_at = read_lease(path), running_seconds()
    unchanged_seconds, announced = 0.0, False
    requested_at: float | None = None
    while True:
        holder = read_lease(path)
        lock = _probe(path, holder) if holder else "unknown"
        if lock == "free":
            return
        now, alive = running_seconds(), lock == "held" or holder != last
        replaces = holder is not None and identity.replaces(holder.run, holder.attempt)
        if holder and alive and not replaces:
            raise refusal(folder.parent, identity, holder)
        # While the volume does not respond, no time counts: the holder cannot renew either.
        seconds = min(now - read_at, 2 * POLL_SECONDS)
        unchanged_seconds = unchanged_seconds + seconds if holder == last else 0.0
        last, read_at = holder, now
        if replaces and requested_at is None:
            before_takeover()
            name = f"a newer attempt of {identity.name} on host {socket.gethostname()}"
            stop_request_path(folder, generation).write_text(name, "utf-8")
            requested_at = running_seconds()
        if not announced:
            _announce(folder.parent, holder)
            announced = True
        had_its_time = requested_at is not None and now - requested_at >= HANDOVER_SECONDS
        if had_its_time or unchanged_seconds >= LEASE_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _announce(output_dir: Path, holder: Holder | None) -> None:
    log.event(
        "waiting",
        logging.WARNING,
        holder=str(holder) if holder else None,
        timeout_seconds=LEASE_SECONDS,
        message=f"{output_dir} is held by {holder or 'another process'}; waiting until its lease "
        f"is released or has not been renewed for {LEASE_SECONDS:g} s",
    )


def _create(folder: Path, generation: int, identity: RunIdentity, stop: StopRequest) -> Lease:
    """Create the lease with this number, and remove all earlier ones.

    Raises:
        FileExistsError: If another waiter was faster.
    """
    path = lease_path(folder, generation)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    kernel = kernel_of(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        kernel = None  # the file system does not support locks
    attempt = identity.attempt or 0
    holder = Holder(
        identity.name, attempt, socket.gethostname(), os.getpid(), log.utc_now(), kernel
    )
    lease = Lease(folder, generation, descriptor, holder, stop)
    for earlier in folder.iterdir():
        if earlier.stem.isdecimal() and int(earlier.stem) < generation:
            earlier.unlink(missing_ok=True)
    return lease


def _probe(path: Path, holder: Holder) -> str:
    """Whether a lease is "free", "held", or "unknown" because its file lock is on another host."""
    if holder.released:
        return "free"
    if holder.kernel is None or holder.kernel != kernel_of(path):
        return "unknown"
    with path.open("rb") as file:
        try:
            # A shared lock, so that two waiters that probe at once do not conflict.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError:
            return "unknown"
    return "free"


def kernel_of(path: Path) -> str | None:
    """Identifies kernel and file system: file locks conflict only within the same two."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{path.stat().st_dev}"
    except OSError:
        return None
