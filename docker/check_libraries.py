"""Fail the image build if a library that the job needs on a GPU host is missing.

The driver is not part of the image: the container runtime mounts the host's.
"""

import ctypes
import subprocess
import sys

from job.commands.cli import load_tensorflow

load_tensorflow()

import job.training.train  # noqa: E402, F401 (imports every package that training needs)
from job.cluster.gpus import CUDA_LIBRARIES, DRIVER_LIBRARY, cuda_libraries, xla_tools  # noqa: E402


def missing_from_loader() -> list[str]:
    """List the CUDA libraries that the loader cannot find by name.

    Must run before anything loads them: a loaded library is always found.
    """
    unresolved = []
    for name in CUDA_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            unresolved.append(name)
    return unresolved


unresolved = missing_from_loader()
parts = cuda_libraries() | xla_tools()
for name, path in parts.items():
    print(f"{name}: {path or 'not found'}")
missing = {*unresolved, *(name for name, path in parts.items() if path is None)} - {DRIVER_LIBRARY}
if missing:
    sys.exit(
        f"TensorFlow would not find {', '.join(sorted(missing))}, expected from the wheels of "
        f"locks/image.txt; see pyproject.toml, extra gpu"
    )
if DRIVER_LIBRARY not in unresolved:
    sys.exit(f"{DRIVER_LIBRARY} is in the image, expected from the host; remove the base's stub")
subprocess.run(["ptxas", "--version"], check=True)
