"""Fail the build of the image if the job would miss something on a GPU host.

The driver is the host's: the container runtime mounts it.
"""

import ctypes
import subprocess
import sys

from job.commands.cli import load_tensorflow

load_tensorflow()

import job.training.train  # noqa: E402, F401 (every package that training needs)
from job.cluster.gpus import CUDA_LIBRARIES, DRIVER_LIBRARY, cuda_libraries, xla_tools  # noqa: E402


def unknown_to_the_loader() -> list[str]:
    """The CUDA libraries that no process finds by name. First of all: a loaded one is found."""
    unknown = []
    for name in CUDA_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            unknown.append(name)
    return unknown


unknown = unknown_to_the_loader()
parts = cuda_libraries() | xla_tools()
for name, path in parts.items():
    print(f"{name}: {path or 'not found'}")
missing = {*unknown, *(name for name, path in parts.items() if path is None)} - {DRIVER_LIBRARY}
if missing:
    sys.exit(
        f"TensorFlow would not find {', '.join(sorted(missing))}, expected from the wheels of "
        f"locks/image.txt; see pyproject.toml, extra gpu"
    )
if DRIVER_LIBRARY not in unknown:
    sys.exit(f"{DRIVER_LIBRARY} is in the image, expected from the host; remove the base's stub")
subprocess.run(["ptxas", "--version"], check=True)
