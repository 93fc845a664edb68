"""Distinguishes the faults of a machine and its installation from those of the program.

Standard library only: it also explains why the other libraries cannot be loaded.
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

_VOLUME = "mend the volume"
_ACCESS = (
    "give user {user} access, or run as the owner (docker run --user, in Kubernetes "
    "securityContext.fsGroup)"
)
_MEMORY = "give the job more memory, or raise its limits (ulimit -v, ulimit -d)"
_THREADS = "let the job start more threads (ulimit -u, or the limit of its container on pids)"

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "mount the volume writable",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files (sysctl fs.file-max)",
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN), _VOLUME),
}

_SIGNS = {
    r"can't start new thread|can't allocate lock|watchdog thread|pthread_create": _THREADS,
    # The last one is oneDNN's code for it.
    r"bad_alloc|cannot allocate memory|failed to map segment|could not create.*Status: 1,": _MEMORY,
}

# What a training takes, as measured on one and two processors. Where that ends, native code aborts
# or, as OpenBLAS does, interrupts the process.
_LEAST_MEMORY = 4 * 2**30
_THREADS_PER_PROCESSOR, _OTHER_THREADS = 5, 18
_PROCESSORS = 32  # of more, a variable like TF_NUM_INTRAOP_THREADS may leave some out


def program() -> str:
    """The command that starts this program from any folder, as a shell reads it.

    Unlike ``python -m job`` it runs no file of the current folder.
    """
    installed = Path(sysconfig.get_path("scripts"), "cifar10-job")
    words = [str(installed)] if installed.exists() else [sys.executable, "-P", "-m", "job"]
    return shlex.join(words)


def remedy(error: OSError) -> str:
    """What a person can do about an error of the system."""
    advice = _REMEDIES.get(error.errno or 0, f"{_VOLUME}, or name another path")
    return advice.format(user=os.getuid())


def explain(error: BaseException) -> UserError | None:
    """Explain an error that the machine or the installation causes.

    Returns:
        None if it may as well be a defect of the program.
    """
    if lacking := lacks_resources(error):
        return lacking
    what = _describe(error)
    if intruder := _intruder(error):
        return UserError(
            f"{what}; {intruder} takes the place of what this program was installed with: unset "
            f"PYTHONPATH, or move it away, and start {program()}"
        )
    if _comes_from_an_import(error):
        return UserError(
            f"cannot load the libraries: {what}; unset PYTHONPATH, start {program()} where they "
            f"are installed, or install them again with make install"
        )
    return None


def lacks_resources(error: BaseException) -> UserError | None:
    """Explain an error of a machine's memory, threads, files or volumes; None if it is another."""
    what = _describe(error)
    if isinstance(error, MemoryError):
        return UserError(f"out of memory ({what}); {_MEMORY}, then run again")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        name = "" if error.filename is None else f" for {error.filename}"
        return UserError(
            f"received '{error.strerror or error}'{name}; {remedy(error)}, then run again"
        )
    for sign, advice in _SIGNS.items():
        if re.search(sign, str(error), re.IGNORECASE):
            return UserError(f"the machine's limits are too low ({what}); {advice}, then run again")
    return None


def _describe(error: BaseException) -> str:
    return textwrap.shorten(": ".join(filter(None, (type(error).__name__, str(error)))), 300)


def require_threads(per_processor: int = 1, others: int = 0) -> None:
    """Prove that this process can have so many more threads: libraries do not report the lack.

    Raises:
        RuntimeError: If not, as Python itself does; `explain` adds what to do.
    """
    end, threads = threading.Event(), []
    try:
        processors = min(len(os.sched_getaffinity(0)), _PROCESSORS)
        for _ in range(per_processor * processors + others):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    finally:
        end.set()
        for thread in threads:
            thread.join()


def require_capable_machine(processor: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse a machine on which TensorFlow would only crash.

    Args:
        processor: The kernel's description of it, see proc(5).

    Raises:
        UserError: If the processor or the limit on address space is not enough.
        RuntimeError: If there are too few threads.
    """
    require_threads(_THREADS_PER_PROCESSOR, _OTHER_THREADS)
    for name, letter in ((resource.RLIMIT_AS, "v"), (resource.RLIMIT_DATA, "d")):
        limit, _ = resource.getrlimit(name)
        if limit != resource.RLIM_INFINITY and limit < _LEAST_MEMORY:
            raise UserError(
                f"received a limit of {limit // 2**20} MiB on memory (ulimit -{letter}), expected "
                f"at least {_LEAST_MEMORY // 2**20} MiB for TensorFlow; {_MEMORY}, then run again"
            )
    if platform.machine() == "x86_64" and "avx" not in processor.read_text().split():
        raise UserError(
            "received a processor without AVX, expected one with it, for which TensorFlow is "
            "built; use another machine, or let the virtual machine show its host's processor"
        )


def _comes_from_an_import(error: BaseException) -> bool:
    """Whether it is about a module of somebody else's, or arose while one was loaded."""
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
    """The files of Python that an error comes from or is about."""
    frames = traceback.walk_tb(error.__traceback__)
    about = getattr(error, "filename", None) or getattr(error, "path", None)
    return [*(frame.f_code.co_filename for frame, _ in frames), str(about or "")]


def _intruder(error: BaseException) -> Path | None:
    """A module in use from the current folder or PYTHONPATH that is also installed."""
    early = [*takewhile(lambda folder: folder != sysconfig.get_path("stdlib"), sys.path)]
    late = sys.path[len(early) :]
    files = _files(error)
    if _comes_from_an_import(error):
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
