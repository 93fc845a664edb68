"""Run the job, and kill it at one of its operations on files: python -m … N MOMENT train …

N counts the operations that change the output folder, from 1, leaving out the lease, which another
thread renews at any time. MOMENT is "before", "after", or "half", which writes half of the content.
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
        folder: Operations elsewhere do not count.
        number: Which operation is the last, from 1.
        moment: "before", "half" or "after" it.
    """

    def __init__(self, folder: Path, number: int, moment: str) -> None:
        self._folder, self._number, self._moment = str(folder.resolve()), number, moment
        self._count = 0

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))
        Path.write_bytes = self._counted_write(Path.write_bytes)  # type: ignore[assignment, method-assign]

    def _is_last(self, target: Any) -> bool:
        path = target
        if isinstance(target, int):
            path = Path(f"/proc/self/fd/{target}").readlink()
        name = str(Path(path).absolute())
        if not name.startswith(self._folder) or "/.lease" in name:
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
    number, moment, *arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("--output-dir") + 1])
    Injector(folder, int(number), moment).install()
    from job.__main__ import run

    sys.argv[1:] = arguments
    run()
