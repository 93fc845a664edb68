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
"""A holder that could not renew for so long stops: soon others will take it for dead."""

LEASE_SECONDS = 20.0
"""A lease that has not changed for so long is dead."""

HANDOVER_SECONDS = 15.0
"""Time that an older attempt of the same run has to save its work when it is asked to stop."""

POLL_SECONDS = 0.5


class LeaseLostError(JobError):
    """Another attempt has taken the folder over; nothing may be written any more."""

    exit_code = ExitCode.RUN_AGAIN


class Holder(msgspec.Struct, frozen=True):
    """Who holds a folder: the content of a lease.

    Attributes:
        run: Name of its run; None where nothing tells.
        attempt: Number of the attempt in its run.
        host: For people; host names repeat.
        pid: For people; process ids repeat.
        start: When it took the folder, UTC; for people.
        kernel: What identifies the kernel and the file system as one in which file locks of holder
            and waiter meet; None where the holder could get no lock.
        beats: How often it has written the lease.
        released: Whether it has given the folder back.
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
        self._size = len(msgspec.json.encode(holder)) + 16  # the digits of many beats
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._write()
        threading.Thread(target=self._keep_renewing, daemon=True).start()

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
            raise refused("use the lease", path, error) from error
        if latest > self._generation:
            successor = None
            with contextlib.suppress(OSError):  # it may have been followed in turn
                successor = read_lease(lease_path(self._folder, latest))
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
        renewed = running_seconds()
        while not self._released.wait(RENEW_SECONDS):
            try:
                self.check()
                with self._lock:
                    if self._released.is_set():
                        return
                    self._write()
                renewed = running_seconds()
                asking = asking_path(self._folder, self._generation)
                if asking.exists() and (name := asking.read_text("utf-8")):
                    reason = f"{name} has asked for {self._folder.parent}"
                    self._stop.ask(reason, "it goes on with the run")
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
        # In place and of one size: network file systems show that to others without a delay, and a
        # name that comes to mean another file only once their directory cache has expired.
        os.pwrite(self._descriptor, msgspec.json.encode(self._holder).ljust(self._size), 0)
        flush(self._descriptor)


def lease_path(folder: Path, generation: int) -> Path:
    """The file of a lease."""
    return folder / f"{generation:08d}"


def asking_path(folder: Path, generation: int) -> Path:
    """The file by which the holder of a lease is asked to stop."""
    return folder / f"{generation:08d}.stop"


def latest_generation(folder: Path) -> int:
    """The highest number of a lease in the folder; 0 where there is none."""
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)


def read_lease(path: Path) -> Holder | None:
    """A lease's holder; None where it is being written for the first time."""
    content = path.read_bytes()
    try:
        return msgspec.json.decode(content, type=Holder)
    except (msgspec.MsgspecError, ValueError):
        return None


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
        while True:
            generation = latest_generation(folder)
            # Another one may be faster, and tidy away what this one looks at.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                if generation:
                    _outlast(folder, generation, identity, before_asking)
                return _create(folder, generation + 1, identity, stop)
            time.sleep(POLL_SECONDS)
    except OSError as error:
        raise refused("use the lease", folder, error) from error


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
        generation = latest_generation(folder) if folder.is_dir() else 0
        if not generation:
            return None
        path = lease_path(folder, generation)
        holder = read_lease(path)
        return None if holder is None or _probe(path, holder) == "free" else holder
    except FileNotFoundError:
        return read_holder(output_dir)  # its successor has tidied it away
    except OSError as error:
        raise refused("use the lease", folder, error) from error


def refusal(output_dir: Path, identity: RunIdentity, holder: Holder) -> JobError:
    """Why a process cannot have an output folder that another, living one holds."""
    is_same_run = holder.run is not None and holder.run == identity.name
    if is_same_run and identity.attempt is not None and holder.attempt > identity.attempt:
        return LeaseLostError(f"{output_dir} is held by a newer attempt of this run: {holder}")
    return UserError(
        f"--output-dir {output_dir} is in use by {holder}; wait for its end, stop it, or name "
        f"another folder"
    )


def _outlast(
    folder: Path, generation: int, identity: RunIdentity, before_asking: Callable[[], None]
) -> None:
    """Wait until a lease is given back or dead, or its holder has had its time to stop.

    Raises:
        JobError: If the holder is alive and does not have to stop.
        FileNotFoundError: If a successor has tidied the lease away.
    """
    path = lease_path(folder, generation)
    seen, looked_at = read_lease(path), running_seconds()
    unchanged_seconds, announced = 0.0, False
    asked_at: float | None = None
    while True:
        holder = read_lease(path)
        lock = _probe(path, holder) if holder else "unknown"
        if lock == "free":
            return
        now, alive = running_seconds(), lock == "held" or holder != seen
        replaces = holder is not None and identity.replaces(holder.run, holder.attempt)
        if holder and alive and not replaces:
            raise refusal(folder.parent, identity, holder)
        # Not the time in which the volume gave no answer: the holder could not renew it either.
        silence = min(now - looked_at, 2 * POLL_SECONDS)
        unchanged_seconds = unchanged_seconds + silence if holder == seen else 0.0
        seen, looked_at = holder, now
        if replaces and asked_at is None:
            before_asking()
            name = f"a newer attempt of {identity.name} on host {socket.gethostname()}"
            asking_path(folder, generation).write_text(name, "utf-8")
            asked_at = running_seconds()
        if not announced:
            _announce(folder.parent, holder)
            announced = True
        had_its_time = asked_at is not None and now - asked_at >= HANDOVER_SECONDS
        if had_its_time or unchanged_seconds >= LEASE_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _announce(output_dir: Path, holder: Holder | None) -> None:
    log.event(
        "waiting",
        logging.WARNING,
        holder=str(holder) if holder else None,
        timeout_seconds=LEASE_SECONDS,
        message=f"{output_dir} is held by {holder or 'somebody'}; waiting until it is given back "
        f"or not renewed for {LEASE_SECONDS:g} s",
    )


def _create(folder: Path, generation: int, identity: RunIdentity, stop: StopRequest) -> Lease:
    """Create the lease of this number, and remove all earlier ones.

    Raises:
        FileExistsError: If another waiter was faster.
    """
    path = lease_path(folder, generation)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    kernel = kernel_of(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        kernel = None  # a file system without locks
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
    """Whether a lease is "free" or "held", or "unknown" as its file lock is on another host."""
    if holder.released:
        return "free"
    if holder.kernel is None or holder.kernel != kernel_of(path):
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
