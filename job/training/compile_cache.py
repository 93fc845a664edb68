"""XLA's compiled GPU code, kept between attempts: a requeued one does not compile again.

XLA has caches in files: of compiled kernels, and of the algorithms that were fastest. It fails the
call that meets a damaged file or cannot write one, and runs whatever code it reads. So it is given
files in this process's memory, which nothing else can damage or fill. From the folder they come
only after everything about the entry there was verified.

XLA also fails one of two compilations at the same time. So there is a cache where a whole loop is
one program, on a single GPU; with several replicas they compile side by side. For CPUs XLA's only
cache is a folder of its own, on whose damaged entries it fails as well.

The training sees it as an observer.
"""

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from job import log
from job.cluster.devices import Devices
from job.cluster.gpus import driver_version, xla_tools
from job.config import StoppedError, TrainConfig, UserError
from job.environment import remedy
from job.run.fingerprint import computing_variables
from job.run.lease import LeaseLostError
from job.run.manifest import versions
from job.run.record import EpochRecord
from job.training.observer import Observer

FOLDER = "compile-cache"
"""Name of the folder in the output folder, unless the user names another."""

MAX_BYTES = 256 * 2**20
"""All entries of a folder together have at most this size; the oldest make room."""

_SUFFIX = ".xla-cache"
_MAGIC = b"cifar10-job compile cache 1\n"
_HEAD_BYTES = len(_MAGIC) + hashlib.sha256().digest_size


class Entry(msgspec.Struct, frozen=True):
    """What XLA has in its caches.

    Attributes:
        key: Under which the entry is kept.
        kernels: A serialized `CompilationCacheProto` of XLA; empty if it has compiled nothing.
        autotuning: A serialized `AutotuneResults` of XLA; empty as the kernels.
    """

    key: str
    kernels: bytes = b""
    autotuning: bytes = b""


class UntrustedError(Exception):
    """A folder or file from which no code may be taken."""


class Store:
    """A folder of entries, of which others can write none.

    Args:
        folder: Is made, if it is not there.
        key: The entry that is read and written.

    Attributes:
        path: The entry's file.

    Raises:
        OSError: If it cannot be made.
        UntrustedError: If it is a link or a file, or others can write into it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        is_other = folder.is_symlink() or folder.is_file()
        _require(not is_other, f"{folder} is a link or a file, expected a folder")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(folder.lstat(), folder)
        self._key, self.path = key, folder / f"{key}{_SUFFIX}"

    def read(self) -> Entry:
        """Read the entry; an empty one if there is none.

        Raises:
            UntrustedError: If it is not as `write` has left it, or others can write it.
        """
        # Neither through a link nor waiting for the writer of a pipe.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(self.path, flags), "rb") as file:
                _require_private(os.fstat(file.fileno()), self.path)
                content = file.read(MAX_BYTES)
        except FileNotFoundError:
            return Entry(self._key)
        except OSError as error:
            raise UntrustedError(f"{self.path} cannot be read: {error.strerror}") from error
        head, payload = content[:_HEAD_BYTES], content[_HEAD_BYTES:]
        _require(head == _head(payload), f"{self.path} is damaged")
        try:
            entry = msgspec.msgpack.decode(payload, type=Entry)
        except msgspec.DecodeError as error:
            raise UntrustedError(f"{self.path} is of another version") from error
        _require(entry.key == self._key, f"{self.path} is of another machine or version")
        return entry

    def write(self, entry: Entry) -> None:
        """Replace the entry, or remove it if the new one is too large; the oldest others make room.

        Raises:
            OSError: If it cannot be written; the one before is still there then.
        """
        payload = msgspec.msgpack.encode(entry)
        content = _head(payload) + payload
        if len(content) > MAX_BYTES:
            self.remove()  # XLA only adds to what it is given, so that no later one would fit
            return
        # Nothing waits for the disk: what a crash leaves of it is found to be damaged.
        descriptor, name = tempfile.mkstemp(_SUFFIX, ".", self.path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(self.path)
        except OSError:
            temporary.unlink()
            raise
        with contextlib.suppress(OSError):  # another process makes room, too
            self._make_room()

    def _make_room(self) -> None:
        """Remove the oldest entries, also those that killed processes left half-written."""
        files = [(path.lstat(), path) for path in self.path.parent.glob(f"*{_SUFFIX}")]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total > MAX_BYTES:
                path.unlink()
                total -= status.st_size

    def remove(self) -> None:
        """Remove the entry.

        Raises:
            OSError: If it cannot be removed.
        """
        self.path.unlink(missing_ok=True)


def _head(payload: bytes) -> bytes:
    """What a payload has before it in its file."""
    return _MAGIC + hashlib.sha256(payload).digest()


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UntrustedError(problem)


def _require_private(status: os.stat_result, path: Path) -> None:
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    private = owner == os.geteuid() and not mode & (stat.S_IWGRP | stat.S_IWOTH)
    _require(
        private,
        f"{path} has owner {owner} and mode {mode:04o}, expected owner {os.geteuid()} and no write "
        f"permission for others",
    )


class CompileCache(Observer):
    """XLA's caches in this process, from where it has compiled nothing yet.

    Args:
        store: Where they are kept.
        entry: What they begin with.
    """

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._has_kept = store, entry, False
        # Never closed: XLA writes them at each compilation, to the end of the process.
        self._kernels, self._autotuning = (
            Path(f"/proc/self/fd/{os.memfd_create(name)}") for name in ("kernels", "autotuning")
        )
        self._kernels.write_bytes(entry.kernels)
        self._autotuning.write_bytes(entry.autotuning)

    @property
    def flags(self) -> str:
        """The flags by which XLA uses them."""
        flags = [
            f"--xla_gpu_kernel_cache_file={self._kernels}",
            # XLA uses the file only so: a kernel that is compiled by itself can be used by itself.
            "--xla_gpu_enable_llvm_module_compilation_parallelism=true",
            f"--xla_gpu_dump_autotune_results_to={self._autotuning}",
        ]
        if self._entry.autotuning:  # an empty file is a damaged one
            flags.append(f"--xla_gpu_load_autotune_results_from={self._autotuning}")
        return " ".join(flags)

    def finish_epoch(self, line: EpochRecord) -> None:
        """Keep what the first epoch has compiled, in case that the process is killed."""
        self.keep_once()

    def keep_once(self) -> None:
        """Keep what XLA has compiled by the end of the first epoch; later it may be compiling."""
        if not self._has_kept:
            self.keep()

    def keep(self) -> None:
        """Keep what XLA has compiled, if there is something new; a failure is a warning."""
        self._has_kept = True
        kernels, autotuning = self._kernels.read_bytes(), self._autotuning.read_bytes()
        entry = Entry(self._entry.key, kernels, autotuning)
        if entry == self._entry:
            return
        self._entry = entry
        try:
            self._store.write(entry)
        except OSError as error:
            _warn(f"cannot write {self._store.path}: {error.strerror}; {remedy(error)}")

    def discard(self) -> None:
        """Remove what is kept, as far as that is possible."""
        with contextlib.suppress(OSError):
            self._store.remove()


@contextlib.contextmanager
def open_compile_cache(config: TrainConfig, devices: Devices) -> Iterator[Sequence[Observer]]:
    """Let XLA use and fill the cache for the time of the body; before the first compilation.

    Any problem with the folder is one warning and costs a compilation. An attempt that fails for an
    unknown reason removes the entry, which may be the cause.

    Args:
        config: The folder's name, if the user names one.
        devices: What is compiled for.

    Yields:
        An observer that keeps what is compiled, or none where there is no cache.
    """
    users_flags = os.environ.get("XLA_FLAGS", "")
    # XLA takes any other text for the name of a file with flags.
    can_add_flags = users_flags.lstrip()[:1] in ("", "-")
    cache = None
    if devices.compilation.loops and can_add_flags:
        cache = _open(config.compile_cache or config.output_dir / FOLDER, _key(devices))
    if cache is None:
        yield []
        return
    # Native code reads the process's environment. Python's copy stays the user's: the fingerprint
    # of the run is taken of that one. Of one flag given twice the later counts, the user's.
    os.putenv("XLA_FLAGS", f"{cache.flags} {users_flags}")
    try:
        yield [cache]
    except StoppedError:
        cache.keep_once()
        raise
    except (UserError, LeaseLostError):  # no fault of what was compiled
        raise
    except BaseException:
        cache.discard()
        raise
    else:
        cache.keep()
    finally:
        os.putenv("XLA_FLAGS", users_flags)


def _open(folder: Path, key: str) -> CompileCache | None:
    try:
        store = Store(folder, key)
        try:
            entry = store.read()
        except UntrustedError as error:
            store.remove()
            _warn(f"{error}; it was removed, and the run compiles anew")
            entry = Entry(key)
        cache = CompileCache(store, entry)
    except UntrustedError as error:
        _warn(f"{error}; correct that, or name another folder with --compile-cache")
        return None
    except OSError as error:
        _warn(f"cannot use {folder}: {error.strerror}; {remedy(error)}")
        return None
    if entry.kernels:
        log.event("compile_cache", message=f"reuses the compiled code in {store.path}")
    return cache


def _key(devices: Devices) -> str:
    """Hash of everything that decides whether compiled code may be used again."""
    gpus = sorted({(str(one.model), *one.compute_capability) for one in devices.descriptions})
    tools = [(path, Path(path).stat().st_size) for path in xla_tools().values() if path]
    identity = {
        "gpus": gpus,
        "driver": driver_version(),
        "tools": tools,
        "versions": versions(),
        "variables": computing_variables(),
        # An algorithm that was fastest may not be one that gives the same bits each time.
        "deterministic": devices.deterministic,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _warn(problem: str) -> None:
    log.event("compile_cache", logging.WARNING, message=f"compile cache: {problem}")
