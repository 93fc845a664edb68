import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from job.config import UserError
from job.environment import explain, program, require_capable_machine


def shell(script: str, folder: Path) -> tuple[int, str]:
    """Run a bash script in which $JOB is the installed program; return exit code and stderr."""
    env = {"PATH": os.environ["PATH"], "JOB": program(), "PYTHON": sys.executable}
    command = ["bash", "-c", script]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("$JOB --help > /dev/full", "No space left on device'; free some space"),
        ("ulimit -v 1500000; $JOB doctor", "received a limit of 1464 MiB on memory (ulimit -v)"),
        ("ulimit -d 1500000; $JOB doctor", "received a limit of 1464 MiB on memory (ulimit -d)"),
        ("ulimit -v 2000000 -s 8000000; $JOB --version", "can't start new thread"),
        ("ulimit -v 5000000 -s 500000; $JOB doctor", "can't start new thread"),
        ("ulimit -n 6; $JOB doctor", "Too many open files"),
        ("PYTHONPATH=foreign $JOB doctor", "foreign/numpy shadows a library"),
        ("PYTHONPATH=foreign/newer $JOB compare x", "foreign/newer/numpy.py shadows a library"),
        ("PYTHONPATH=foreign/click $JOB --help", "foreign/click/click.py shadows a library"),
    ],
)
def test_errors_of_the_machine_cause_one_error_line_and_exit_code_2(
    tmp_path: Path, script: str, message: str
) -> None:
    for name in ("numpy/__init__.py", "click/click.py"):
        path = tmp_path / "foreign" / name
        path.parent.mkdir(parents=True)
        path.write_text("raise AttributeError('of another version')")
    (tmp_path / "foreign" / "newer").mkdir()
    (tmp_path / "foreign" / "newer" / "numpy.py").write_text("for another Python")
    exit_code, errors = shell(script, tmp_path)
    (line,) = errors.splitlines()
    assert exit_code == 2
    assert line.startswith("cifar10-job: error: ")
    assert message in line


def test_files_in_the_current_folder_are_not_used_as_libraries(tmp_path: Path) -> None:
    for name in ("random", "click", "numpy", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not it')")
    assert shell("$PYTHON -m job --version", tmp_path) == (0, "")
    (tmp_path / "job.py").write_text("raise SystemExit('this is not it')")
    assert shell("$JOB --version", tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 146 MiB"), "146 MiB); give the job more memory"),
        (RuntimeError("std::bad_alloc"), "give the job more memory"),
        (OSError(errno.EIO, "Input/output error", "x"), "error' for x; fix the volume, then run"),
        (ImportError("libz.so.1: cannot open shared object file"), "cannot load the libraries: "),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), "cannot load the libraries"),
        (ImportError("cannot import name 'a' from 'job.b'", name="job.b"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (AttributeError("'NoneType' object has no attribute 'a'"), None),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), None),
    ],
)
def test_only_errors_that_cannot_be_defects_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, words: str | None
) -> None:
    if words is None:
        # A second copy of a module, as the environment modules of a cluster put it on PYTHONPATH.
        (tmp_path / "json").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        copy = ModuleType("json.decoder")
        copy.__file__ = str(tmp_path / "json" / "decoder.py")
        monkeypatch.setitem(sys.modules, "json.decoder", copy)
    explained = explain(error)
    assert (explained is None) == (words is None)
    assert (words or "") in str(explained)


def test_a_processor_that_tensorflow_does_not_support_is_rejected(tmp_path: Path) -> None:
    require_capable_machine()
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse4_2 popcnt\n")
    with pytest.raises(UserError, match="received a processor without AVX"):
        require_capable_machine(tmp_path / "cpuinfo")
