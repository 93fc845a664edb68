"""The early end of a run: on a signal, at a deadline, on request, or when a call hangs.

Standard library only: it is set up before anything slow.
"""

import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from job.clock import running_seconds, start_reading
from job.config import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

RUN_AGAIN = "run the same command again to resume"

_CALLBACK_SECONDS = 3.0


OnExit = Callable[[ExitCode, str], None]
"""Called with the exit code and the reason in words."""


class StopRequest:
    """Whether and why this process must stop.

    As long as the process has nothing to save, a request ends it immediately. The training loop
    defers that: it checks `reason` between two calls, saves its work and ends by itself.

    Attributes:
        advice: What to do once the process has stopped.
    """

    def __init__(self) -> None:
        self._start = running_seconds()
        self._stop_after_seconds: float | None = None
        self.advice = RUN_AGAIN
        self._lock = threading.Lock()
        self._requested: str | None = None
        self._postponed: str | None = None
        self._deferred = False
        self._callbacks: list[OnExit] = []

    @property
    def reason(self) -> str | None:
        """Why the process must stop; None if it need not stop."""
        limit = self._stop_after_seconds
        if self._requested is None and limit and running_seconds() - self._start >= limit:
            return f"--stop-after {limit:g}"
        return self._requested

    def stop_after(self, seconds: float) -> None:
        """Request a stop once the process has run for this many seconds.

        This never ends the process immediately, so that each attempt makes progress.
        """
        self._stop_after_seconds = seconds

    def request_handover(self, reason: str, advice: str) -> None:
        """Request the process to stop once it has made progress.

        Args:
            reason: The reason in words.
            advice: Replaces `advice`.
        """
        with self._lock:
            if self._requested is None:
                self._requested, self.advice = reason, advice

    def defer(self) -> None:
        """Leave requests to the caller from now on, because it has work to save."""
        self._deferred = True

    def end_deferral(self) -> None:
        """Let requests end the process immediately again, including one made since `defer`."""
        with self._lock:
            self._deferred = False
            postponed = self._postponed
        if postponed:
            self.request(postponed)

    @contextlib.contextmanager
    def on_exit(self, callback: OnExit) -> Iterator[None]:
        """Register a callback for an immediate end of the process during the body.

        Args:
            callback: Called in another thread, before callbacks that were registered earlier. All
                together have a few seconds, because the volume that they write to may hang.
        """
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    def request(self, reason: str, *, at_once: bool = False) -> None:
        """Request the process to stop, from any thread.

        Args:
            reason: The reason in words.
            at_once: Whether to end without waiting for work to be saved.
        """
        with self._lock:
            self._requested = self._requested or reason
            at_once = at_once or not self._deferred
            if not at_once:
                self._postponed = reason
        if at_once:
            self.end(ExitCode.RUN_AGAIN, reason)

    def end_hung(self) -> NoReturn:
        """End the process after a call that did not return."""
        self.end(ExitCode.DEFECT, "a call did not return within --stall-timeout")

    def end(self, exit_code: ExitCode, reason: str) -> NoReturn:
        """End the process, from any thread and whatever the other threads are doing."""

        def call_all() -> None:
            for callback in reversed(self._callbacks):
                # No caller is left to handle an error.
                with contextlib.suppress(Exception):
                    callback(exit_code, reason)

        try:
            caller = threading.Thread(target=call_all, daemon=True)
            caller.start()
            caller.join(_CALLBACK_SECONDS)
            if os.isatty(1) and os.environ.get("TERM") != "dumb":
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
        finally:
            os._exit(exit_code)


def _acknowledge(reason: str) -> None:
    """Acknowledge a signal immediately: the current call can take a while."""
    from job import log  # signals are handled before the log is loaded

    # The reader of the log may have ended; the work is saved nevertheless.
    with contextlib.suppress(OSError):
        log.event(
            "stopping",
            logging.WARNING,
            reason=reason,
            message=f"{reason}: the run finishes its current computation, saves a checkpoint and "
            "stops" + ("; a second Ctrl-C stops it without saving" if reason == "SIGINT" else ""),
        )


def listen_to_signals() -> StopRequest:
    """Turn `SIGNALS` into a request to stop; a second SIGINT ends the process immediately.

    Python runs handlers between two bytecodes of the main thread, which can be inside a compiled
    call for a long time, and TensorFlow installs its own handlers. Therefore all threads block the
    signals, because they inherit the block from this one, and one thread waits for the signals. A
    forked process receives them as usual; a program that this process starts inherits the block.
    """
    stop = StopRequest()
    # SIGHUP stays ignored if nohup or a shell has started the process that way.
    numbers = {number for number in SIGNALS if not _is_ignored_hangup(number)}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers))
    start_reading()
    threading.Thread(target=_listen, args=(numbers, stop), daemon=True).start()
    return stop


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _listen(numbers: set[signal.Signals], stop: StopRequest) -> None:
    interrupts, acknowledged = 0, set()
    while True:
        name = signal.Signals(signal.sigwait(numbers)).name
        interrupts += name == "SIGINT"
        if interrupts == 2:
            stop.request("a second SIGINT", at_once=True)
        stop.request(name)  # returns if there is work to save
        if name not in acknowledged:
            _acknowledge(name)
            acknowledged.add(name)


COMPILATION_SECONDS = 600.0
"""Extra time for the first call of a compiled function, in addition to the timeout of any call."""

NATIVE_MARGIN_SECONDS = 10.0
"""How much later the native timer ends a process whose Python threads cannot run."""

_TICK_SECONDS = 1.0


@dataclass
class _Call:
    what: str
    seconds: float
    end: float = math.inf

    def begin(self) -> None:
        self.end = running_seconds() + self.seconds


class Watchdog:
    """Ends the run if a call does not return in time, so that a scheduler can restart it.

    A thread counts only time in which the process runs, because a call cannot return while the
    process is suspended. No Python thread runs while a call holds Python's global lock, which an
    import or a driver can do for a long time. For such calls, a native timer ends the process a
    margin later, with exit code 1 and the stacks on stderr. The native timer also counts
    suspensions: if the process is suspended in the first seconds of a run for longer than the
    call's time (by default ten minutes or more), it ends the run.

    Args:
        timeout_seconds: Longest time that a watched call may take.
        on_stall: Ends the process: a hung call never returns, so an orderly end is impossible.
        margin_seconds: Time from the end of that timeout to the end of the native timer.
    """

    def __init__(
        self,
        timeout_seconds: float,
        on_stall: Callable[[], object],
        margin_seconds: float = NATIVE_MARGIN_SECONDS,
    ) -> None:
        self._timeout_seconds, self._margin_seconds = timeout_seconds, margin_seconds
        self._on_stall = on_stall
        self._tick_seconds = min(_TICK_SECONDS, timeout_seconds / 4)
        self._calls: list[_Call] = []  # nested: the last one is the innermost
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(
        self,
        what: str,
        *,
        compiling: bool = False,
        seconds: float | None = None,
        native: bool = False,
    ) -> Iterator[None]:
        """End the run if the body does not end in time, and log the stack of every thread.

        A body inside another watched body has its own time. After it, the time of the outer body
        starts again from the beginning.

        Args:
            what: Name of the body in the log.
            compiling: Whether the body may compile first, for which it gets extra time.
            seconds: Its time, if it differs from the timeout of any call; infinity for a body that
                has its own limit.
            native: Whether the body may hold Python's global lock for a long time, before the run
                has any work to lose. Such a body must not contain another watched body.
        """
        if seconds is None:
            seconds = self._timeout_seconds + (COMPILATION_SECONDS if compiling else 0.0)
        call = _Call(what, seconds)
        with self._lock:
            call.begin()
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._monitor, daemon=True)
                self._thread.start()
        if native:
            faulthandler.dump_traceback_later(seconds + self._margin_seconds, exit=True, file=2)
        try:
            yield
        finally:
            if native:
                faulthandler.cancel_dump_traceback_later()
            with self._lock:
                self._calls.pop()
                for outer in self._calls[-1:]:
                    outer.begin()

    def _monitor(self) -> None:
        while True:
            time.sleep(self._tick_seconds)
            with self._lock:
                stalled = [call for call in self._calls[-1:] if running_seconds() >= call.end]
            if stalled:
                self._end(stalled[0])
                return

    def _end(self, call: _Call) -> None:
        try:
            from job import log  # signals are handled before the log is loaded

            stacks = thread_stacks()
            log.event(
                "stalled",
                logging.CRITICAL,
                what=call.what,
                timeout_seconds=call.seconds,
                stacks=stacks,
                message=f"{call.what} did not end within {call.seconds:g} s; ending with exit code "
                f"{int(ExitCode.DEFECT)} so that the job can be restarted\n{stacks}",
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
