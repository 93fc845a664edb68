"""Fail the build of the image if TensorFlow would miss something on a GPU host.

The driver, libcuda, is the host's: the container runtime mounts it.
"""

import sys

from job.startup import load_tensorflow

load_tensorflow()

from job.gpus import DRIVER_LIBRARY, cuda_libraries, xla_tools  # noqa: E402 (needs TensorFlow)

found = [*cuda_libraries(), *xla_tools()]
for part in found:
    print(f"{part.name}: {part.path or 'not found'}")
missing = [part.name for part in found if part.path is None and part.name != DRIVER_LIBRARY]
if missing:
    sys.exit(
        f"TensorFlow would not find {', '.join(missing)}, expected in the base image or in "
        f"locks/image.txt; add it there (pyproject.toml, group image)"
    )
