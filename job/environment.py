"""Explanations of errors that the machine or the installation causes, not the program.

Standard library only, because it also explains why other libraries cannot be loaded.
"""

import errno
import os
import platform
import re
import resource
import shlex
import sys
import sysconfig
import textwrap
import threading
import traceback
from importlib.machinery import PathFinder
from itertools import takewhile
from pathlib import Path

from job.config import UserError

_VOLUME = "fix the volume"
_ACCESS = (
    "give user {user} access, or run as the owner (docker run --user, in Kubernetes "
    "securityContext.fsGroup)"
)
_MEMORY = "give the job more memory, or raise its limits (ulimit -v, ulimit -d)"
_THREADS = "let the job start more threads (ulimit -u, or the pids limit of its container)"

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount the volume writable",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files (sysctl fs.file-max)",
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN), _VOLUME),
}

_MESSAGE_PATTERNS = {
    r"can't start new thread|can't allocate lock|watchdog thread|pthread_create": _THREADS,
    # The last alternative is oneDNN's message.
    r"bad_alloc|cannot allocate memory|failed to map segment|could not create.*Status: 1,": _MEMORY,
}

# What a training needs, measured on one and two processors. With less, native code aborts or, like
# OpenBLAS, interrupts the process.
_MIN_MEMORY = 4 * 2**30
_THREADS_PER_PROCESSOR, _OTHER_THREADS = 5, 18
# Threads for more processors than this are not checked: a variable such as TF_NUM_INTRAOP_THREADS
# can limit them, so the check could refuse a machine that works.
_MAX_PROCESSORS = 32


def program() -> str:
    """Return a shell command that starts this program from any folder.

    Unlike ``python -m job``, it imports no file of the current folder.
    """
    installed = Path(sysconfig.get_path("scripts"), "cifar10-job")
    words = [str(installed)] if installed.exists() else [sys.executable, "-P", "-m", "job"]
    return shlex.join(words)


def remedy(error: OSError) -> str:
    """Return advice on an error of the operating system."""
    advice = _REMEDIES.get(error.errno or 0, "fix the path or the volume")
    return advice.format(user=os.getuid())


def explain(error: BaseException) -> UserError | None:
    """Explain an error that the machine or the installation causes.

    Returns:
        The explanation; None if the error can also be a defect of the program.
    """
    if explained := explain_resource_error(error):
        return explained
    what = _describe(error)
    if path := _shadowing_module(error):
        return UserError(
            f"{what}; {path} shadows a library that this program was installed with: unset "
            f"PYTHONPATH, or move that file away, and start {program()}"
        )
    if _concerns_library(error):
        return UserError(
            f"cannot load the libraries: {what}; unset PYTHONPATH, start {program()} where they "
            f"are installed, or install them again with make install"
        )
    return None


def explain_resource_error(error: BaseException) -> UserError | None:
    """Explain an error of the machine's memory, threads, files or volumes; None for others."""
    what = _describe(error)
    if isinstance(error, MemoryError):
        return UserError(f"out of memory ({what}); {_MEMORY}, then run again")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        name = "" if error.filename is None else f" for {error.filename}"
        return UserError(
            f"received '{error.strerror or error}'{name}; {remedy(error)}, then run again"
        )
    for pattern, advice in _MESSAGE_PATTERNS.items():
        if re.search(pattern, str(error), re.IGNORECASE):
            return UserError(f"the machine's limits are too low ({what}); {advice}, then run again")
    return None


def _describe(error: BaseException) -> str:
    return textwrap.shorten(": ".join(filter(None, (type(error).__name__, str(error)))), 300)


def require_threads(per_processor: int = 1, others: int = 0) -> None:
    """Check that this process can start this many more threads: libraries do not report a lack.

    Raises:
        RuntimeError: Python's own error, if it cannot; `explain` adds the advice.
    """
    end, threads = threading.Event(), []
    try:
        processors = min(len(os.sched_getaffinity(0)), _MAX_PROCESSORS)
        for _ in range(per_processor * processors + others):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    finally:
        end.set()
        for thread in threads:
            thread.join()


def require_capable_machine(processor: Path = Path("/proc/cpuinfo")) -> None:
    """Reject a machine on which TensorFlow would crash.

    Args:
        processor: The kernel's description of the processor, see proc(5).

    Raises:
        UserError: If the processor or the memory limits are insufficient.
        RuntimeError: If the process cannot start enough threads.
    """
    require_threads(_THREADS_PER_PROCESSOR, _OTHER_THREADS)
    for name, letter in ((resource.RLIMIT_AS, "v"), (resource.RLIMIT_DATA, "d")):
        limit, _ = resource.getrlimit(name)
        if limit != resource.RLIM_INFINITY and limit < _MIN_MEMORY:
            raise UserError(
                f"received a limit of {limit // 2**20} MiB on memory (ulimit -{letter}), expected "
                f"at least {_MIN_MEMORY // 2**20} MiB for TensorFlow; {_MEMORY}, then run again"
            )
    if platform.machine() == "x86_64" and "avx" not in processor.read_text().split():
        raise UserError(
            "received a processor without AVX, expected one with AVX, which TensorFlow requires; "
            "use another machine, or pass the host's processor through to the virtual machine"
        )


def _concerns_library(error: BaseException) -> bool:
    """Whether an error concerns another project's module, or was raised while one was loaded."""
    if isinstance(error, ImportError) and not f"{error.name}.".startswith("job."):
        return True
    package = str(Path(__file__).parent)
    loaded = [
        frame.f_code.co_filename
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    if isinstance(error, SyntaxError):
        loaded.append(error.filename or "<")
    return any(not file.startswith(("<", package)) for file in loaded)


def _files(error: BaseException) -> list[str]:
    """Return the Python files that an error comes from or concerns."""
    frames = traceback.walk_tb(error.__traceback__)
    subject = getattr(error, "filename", None) or getattr(error, "path", None)
    return [*(frame.f_code.co_filename for frame, _ in frames), str(subject or "")]


def _shadowing_module(error: BaseException) -> Path | None:
    """Find a module from the current folder or PYTHONPATH that shadows an installed one."""
    early = [*takewhile(lambda folder: folder != sysconfig.get_path("stdlib"), sys.path)]
    late = sys.path[len(early) :]
    files = _files(error)
    if _concerns_library(error):
        files += [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
    for folder in early:
        for file in files:
            if not file.startswith(f"{folder}/"):
                continue
            top = file.removeprefix(f"{folder}/").partition("/")[0]
            name = top.partition(".")[0]
            own = PathFinder.find_spec(name, late) if name not in ("", "job") else None
            if own and own.origin and not own.origin.startswith(f"{folder}/{name}"):
                return Path(folder, top)
    return None
