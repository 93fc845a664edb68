"""At most one attempt writes into an output folder, also when its attempts run on several hosts.

The holder of the folder renews a lease in it, and `job.takeover` judges by it whether it is alive.
Clocks of two hosts are never compared, and neither process ids nor host names count, since both
repeat between containers.

Each lease is a file of its own, numbered upwards, and taking a folder over means creating the next
number, which exactly one of several waiters can. So a holder that was stopped for a while and goes
on cannot overwrite its successor's lease; it finds a higher number and gives up.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.config import ExitCode, JobError, UserError
from job.preemption import StopRequest

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
        brief: Whether it will give the folder back soon, so that waiting is better than giving up.
    """

    run: str | None
    attempt: int
    host: str
    pid: int
    start: str
    kernel: str | None
    brief: bool = False

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
    fields = dataclasses.fields(Holder)
    if not all(field.name in document for field in fields if field.default is dataclasses.MISSING):
        return content, None
    known = {field.name: document[field.name] for field in fields if field.name in document}
    return content, Holder(**known)


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
