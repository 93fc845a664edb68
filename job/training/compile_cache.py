"""XLA's compiled GPU code, kept between attempts: a requeued attempt does not compile again.

XLA keeps two cache files: one of compiled kernels, and one of the fastest algorithms. If a file is
damaged or cannot be written, the call that uses it fails. And XLA runs any code that it reads from
a file. So it receives files in this process's memory, which nothing else can damage or fill. They
are loaded from the folder only after the entry there was verified completely.

If two compilations use these files at the same time, one of them can fail too. So there is a cache
only where a whole loop is one program, which is the case on a single GPU; several replicas compile
in parallel.
For CPUs, XLA's only cache is a folder that XLA manages, and calls also fail on damaged entries in
it.

The training uses the cache as an observer.
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
"""Name of the folder in the output folder, unless the user passes another folder."""

MAX_BYTES = 256 * 2**20
"""Largest total size of all entries of a folder; the oldest entries are removed first."""

_SUFFIX = ".xla-cache"
_MAGIC = b"cifar10-job compile cache 1\n"
_HEAD_BYTES = len(_MAGIC) + hashlib.sha256().digest_size


class Entry(msgspec.Struct, frozen=True):
    """The contents of XLA's caches.

    Attributes:
        key: The key of the entry.
        kernels: A serialized `CompilationCacheProto` of XLA; empty if XLA has compiled nothing.
        autotuning: A serialized `AutotuneResults` of XLA; empty if XLA has compiled nothing.
    """

    key: str
    kernels: bytes = b""
    autotuning: bytes = b""


class UntrustedError(Exception):
    """The folder or file is not safe to load code from."""


class Store:
    """A folder of entries that only this user can write.

    Args:
        folder: The folder; created if it is missing.
        key: The entry to read and write.

    Attributes:
        path: The entry's file.

    Raises:
        OSError: If the folder cannot be created.
        UntrustedError: If the path is a link or a file, or if others can write into the folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        is_other = folder.is_symlink() or folder.is_file()
        _require(not is_other, f"{folder} is a link or a file, expected a folder")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(folder.lstat(), folder)
        self._key, self.path = key, folder / f"{key}{_SUFFIX}"

    def read(self) -> Entry:
        """Read the entry. Without an entry, return an empty one.

        Raises:
            UntrustedError: If it is not as `write` left it, or others can write it.
        """
        # Do not follow a link, and do not wait for the writer of a pipe.
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
            raise UntrustedError(f"{self.path} was written by another version") from error
        _require(entry.key == self._key, f"{self.path} belongs to another machine or version")
        return entry

    def write(self, entry: Entry) -> None:
        """Replace the entry, or remove it if the new one is too large.

        If the folder becomes too large, the oldest entries are removed.

        Raises:
            OSError: If the entry cannot be written; the previous one is kept.
        """
        payload = msgspec.msgpack.encode(entry)
        content = _head(payload) + payload
        if len(content) > MAX_BYTES:
            self.remove()  # XLA only adds to the entry it starts with, so no later one can fit
            return
        # No fsync: if a crash truncates the file, the checksum detects that.
        descriptor, name = tempfile.mkstemp(_SUFFIX, ".", self.path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(self.path)
        except OSError:
            temporary.unlink()
            raise
        with contextlib.suppress(OSError):  # another process can remove the same entries
            self._make_room()

    def _make_room(self) -> None:
        """Remove the oldest entries, including files that killed processes left half-written."""
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
    """The bytes before a payload in its file."""
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
    """XLA's caches in this process; to be created before XLA compiles anything.

    Args:
        store: The store that keeps them.
        entry: Their initial contents.
    """

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._has_kept = store, entry, False
        # Never closed: XLA writes them at each compilation until the process ends.
        self._kernels, self._autotuning = (
            Path(f"/proc/self/fd/{os.memfd_create(name)}") for name in ("kernels", "autotuning")
        )
        self._kernels.write_bytes(entry.kernels)
        self._autotuning.write_bytes(entry.autotuning)

    @property
    def flags(self) -> str:
        """The flags that make XLA use these caches."""
        flags = [
            f"--xla_gpu_kernel_cache_file={self._kernels}",
            # XLA uses the file only with this flag: a kernel must be compiled separately to be
            # reused separately.
            "--xla_gpu_enable_llvm_module_compilation_parallelism=true",
            f"--xla_gpu_dump_autotune_results_to={self._autotuning}",
        ]
        if self._entry.autotuning:  # XLA treats an empty file as damaged
            flags.append(f"--xla_gpu_load_autotune_results_from={self._autotuning}")
        return " ".join(flags)

    def finish_epoch(self, line: EpochRecord) -> None:
        """Save the code compiled in the first epoch, in case the process is killed."""
        self.keep_once()

    def keep_once(self) -> None:
        """Save the caches, unless they are saved already.

        For use while the run trains: after the first epoch XLA can be compiling in another thread.
        """
        if not self._has_kept:
            self.keep()

    def keep(self) -> None:
        """Save the caches if their contents are new. A failure is only a warning."""
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
        """Remove the saved entry if possible."""
        with contextlib.suppress(OSError):
            self._store.remove()


@contextlib.contextmanager
def open_compile_cache(config: TrainConfig, devices: Devices) -> Iterator[Sequence[Observer]]:
    """Let XLA use and fill the cache during the body. Call it before the first compilation.

    After any problem with the folder there is one warning, and XLA compiles without the cache. An
    attempt that fails for an unknown reason removes the entry, because the entry can be the cause.

    Args:
        config: Contains the folder, if the user passes one.
        devices: The devices to compile for.

    Yields:
        An observer that saves the compiled code; empty where there is no cache.
    """
    users_flags = os.environ.get("XLA_FLAGS", "")
    # XLA reads any other text as the name of a file with flags.
    can_add_flags = users_flags.lstrip()[:1] in ("", "-")
    cache = None
    if devices.compilation.loops and can_add_flags:
        cache = _open(config.compile_cache or config.output_dir / FOLDER, _key(devices))
    if cache is None:
        yield []
        return
    # Native code reads the process's environment. Python's copy keeps the user's value, because
    # the run's fingerprint includes it. If a flag occurs twice, the later one counts: the user's.
    os.putenv("XLA_FLAGS", f"{cache.flags} {users_flags}")
    try:
        yield [cache]
    except StoppedError:
        cache.keep_once()
        raise
    except (UserError, LeaseLostError):  # not caused by the compiled code
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
            _warn(f"{error}; it was removed, and the run compiles again")
            entry = Entry(key)
        cache = CompileCache(store, entry)
    except UntrustedError as error:
        _warn(f"{error}; fix that, or pass another folder with --compile-cache")
        return None
    except OSError as error:
        _warn(f"cannot use {folder}: {error.strerror}; {remedy(error)}")
        return None
    if entry.kernels:
        log.event("compile_cache", message=f"reusing the compiled code in {store.path}")
    return cache


def _key(devices: Devices) -> str:
    """Hash of everything that determines whether compiled code can be reused."""
    gpus = sorted({(str(one.model), *one.compute_capability) for one in devices.descriptions})
    tools = [(path, Path(path).stat().st_size) for path in xla_tools().values() if path]
    identity = {
        "gpus": gpus,
        "driver": driver_version(),
        "tools": tools,
        "versions": versions(),
        "variables": computing_variables(),
        # The fastest algorithm is not always one that returns the same bits each time.
        "deterministic": devices.deterministic,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _warn(problem: str) -> None:
    log.event("compile_cache", logging.WARNING, message=f"compile cache: {problem}")
