"""Ends a run that has stopped making progress, so that a scheduler can start it again."""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from job import log
from job.config import ExitCode

COMPILATION_SECONDS = 600.0
"""What the first call of a compiled function may take beyond the timeout of any call."""


def _end_process() -> None:
    # A hung collective never returns, so there is no orderly way out.
    os._exit(ExitCode.DEFECT)


class Watchdog:
    """Watches calls into compiled code that should end within a time.

    Args:
        timeout_seconds: Longest time that a watched call may take.
        on_stall: What ends the run; the process, unless a test says otherwise.
    """

    def __init__(self, timeout_seconds: float, on_stall: Callable[[], None] = _end_process) -> None:
        self._timeout_seconds = timeout_seconds
        self._on_stall = on_stall

    @contextlib.contextmanager
    def watch(self, what: str, *, compiling: bool = False) -> Iterator[None]:
        """End the run if the body does not end in time, with every thread's stack in the log.

        Args:
            what: Names the body in the log.
            compiling: Whether the body may compile first, for which it has time of its own.
        """
        seconds = self._timeout_seconds + (COMPILATION_SECONDS if compiling else 0.0)
        timer = threading.Timer(seconds, self._stalled, [what, seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _stalled(self, what: str, seconds: float) -> None:
        try:
            stacks = thread_stacks()
            log.event(
                "stalled",
                logging.CRITICAL,
                what=what,
                timeout_seconds=seconds,
                stacks=stacks,
                message=f"{what} did not end within {seconds:g} s; ending with exit code "
                f"{int(ExitCode.DEFECT)} so that the job can be started again\n{stacks}",
            )
        finally:
            self._on_stall()


def thread_stacks() -> str:
    """The Python stack of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
