"""Run the job and kill it at one of its file operations: python -m … WHAT N MOMENT train …

WHAT is "checkpoints" or "artifacts". N is the number of the operation that changes one of these
files, from 1. MOMENT is "before", "after", or "half", which first writes half of the content.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir")


class Injector:
    """Counts operations and kills the process at one of them.

    Args:
        folder: The output folder.
        what: "checkpoints", or "artifacts" for everything else in the folder except the lease,
            which another thread renews at any time.
        number: Number of the operation at which the process is killed, from 1.
        moment: "before", "half" or "after" the operation.
    """

    def __init__(self, folder: Path, what: str, number: int, moment: str) -> None:
        self._folder, self._what = folder.resolve(), what
        self._number, self._moment = number, moment
        self._count = 0

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))
        Path.write_bytes = self._counted_write(Path.write_bytes)  # type: ignore[assignment, method-assign]

    def _is_last(self, target: Any) -> bool:
        path = target
        if isinstance(target, int):
            path = Path(f"/proc/self/fd/{target}").readlink()
        # Resolve only the parent: the file itself can be a link, or be missing.
        name = Path(path).parent.resolve() / Path(path).name
        if not name.is_relative_to(self._folder):
            return False
        parts = name.relative_to(self._folder).parts
        part = "checkpoints" if parts[:1] == ("checkpoints",) else "artifacts"
        if part != self._what or parts[:1] == (".lease",):
            return False
        self._count += 1
        return self._count == self._number

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def wrapper(target: Any, *arguments: Any, **options: Any) -> Any:
            is_last = self._is_last(target)
            if is_last and self._moment != "after":
                kill()
            try:
                return operation(target, *arguments, **options)
            finally:
                if is_last:
                    kill()

        return wrapper

    def _counted_write(self, write: Callable[[Path, bytes], int]) -> Callable[[Path, bytes], int]:
        def wrapper(path: Path, content: bytes) -> int:
            is_last = self._is_last(path)
            if is_last and self._moment == "before":
                kill()
            if is_last and self._moment == "half":
                content = content[: len(content) // 2]
            result = write(path, content)
            if is_last:
                kill()
            return result

        return wrapper


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    what, number, moment, *arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("--output-dir") + 1])
    Injector(folder, what, int(number), moment).install()
    from job.__main__ import run

    sys.argv[1:] = arguments
    run()
