"""Ends a run early and in order: on a signal, at a deadline, on request, or when a call hangs.

Standard library only: it is set up before anything that takes time.
"""

import contextlib
import faulthandler
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from job.config import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

RUN_AGAIN = "run the same command again to go on"

_CALLBACK_SECONDS = 3.0


OnExit = Callable[[ExitCode, str], None]
"""Is given the exit code and, for people to read, the reason."""


class StopRequest:
    """Whether and why this process is to stop.

    As long as there is nothing to save, a request ends the process at once. The training loop
    defers that: it looks at `reason` between two calls, saves its work and ends by itself.

    Attributes:
        advice: What is to be done once the process has stopped.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._stop_after_seconds: float | None = None
        self.advice = RUN_AGAIN
        self._lock = threading.Lock()
        self._requested: str | None = None
        self._postponed: str | None = None
        self._deferred = False
        self._callbacks: list[OnExit] = []

    @property
    def reason(self) -> str | None:
        """Why to stop; None while there is no reason to."""
        limit = self._stop_after_seconds
        if self._requested is None and limit and time.monotonic() - self._start >= limit:
            return f"--stop-after {limit:g}"
        return self._requested

    def stop_after(self, seconds: float) -> None:
        """Give a reason to stop this many seconds after the start of the process.

        It never ends the process at once, so that each attempt gets something done.
        """
        self._stop_after_seconds = seconds

    def ask(self, reason: str, advice: str) -> None:
        """Ask the process to stop when it has got something done.

        Args:
            reason: For people to read.
            advice: Takes the place of `advice`.
        """
        with self._lock:
            if self._requested is None:
                self._requested, self.advice = reason, advice

    def defer(self) -> None:
        """From now on requests are looked at by the caller, who has work to save."""
        self._deferred = True

    def resume_ending_at_once(self) -> None:
        """From now on requests end the process at once again, also one made since `defer`."""
        with self._lock:
            self._deferred = False
            postponed = self._postponed
        if postponed:
            self.request(postponed)

    @contextlib.contextmanager
    def on_exit(self, callback: OnExit) -> Iterator[None]:
        """Set what is done if the process ends at once during the body.

        Args:
            callback: Called in another thread, before what was set earlier. All together have a few
                seconds, as the volume that they write to may hang.
        """
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    def request(self, reason: str, *, at_once: bool = False) -> None:
        """Ask the process to stop; from any thread.

        Args:
            reason: For people to read.
            at_once: Do not wait for work to be saved.
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
        """End the process from any thread, whatever the others are doing."""

        def call_all() -> None:
            for callback in reversed(self._callbacks):
                # Nobody is left to handle an error.
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


def listen_to_signals() -> StopRequest:
    """Turn `SIGNALS` into a request to stop; a second SIGINT ends at once.

    Python runs handlers between two bytecodes of the main thread, which may be inside of a compiled
    call for long. So the handlers do nothing, and a thread reads what arrived.
    """
    stop = StopRequest()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for number in (*SIGNALS, signal.SIGTSTP):
        # A signal that nohup or a shell has made the process ignore stays ignored.
        if number not in (signal.SIGHUP, signal.SIGTSTP) or (
            signal.getsignal(number) != signal.SIG_IGN
        ):
            signal.signal(number, lambda *_arguments: None)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # The sender goes along because the socket closes with its last reference.
    listener = threading.Thread(target=_listen, args=(receiver, sender, stop), daemon=True)
    listener.start()
    return stop


def _listen(receiver: socket.socket, _sender: socket.socket, stop: StopRequest) -> None:
    interrupts = 0
    while True:
        for number in receiver.recv(64):
            if number == signal.SIGTSTP:
                _suspend()
            elif number in SIGNALS:
                name = signal.Signals(number).name
                interrupts += name == "SIGINT"
                if interrupts == 2:
                    stop.request("a second SIGINT", at_once=True)
                stop.request(name)


def _suspend() -> None:
    """Stop the process until it is continued, as Slurm's ``scontrol suspend`` and Ctrl-Z ask."""
    # The watchdog's native timer would count that time; its thread sets the timer again.
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)


COMPILATION_SECONDS = 600.0
"""What the first call of a compiled function may take beyond the timeout of any call."""

NATIVE_MARGIN_SECONDS = 10.0
"""How much later the native timer ends a process whose Python threads cannot run."""

_TICK_SECONDS = 1.0


@dataclass
class _Call:
    what: str
    seconds: float
    left: float


class Watchdog:
    """Ends the run if a call does not return within its time, so that a scheduler can restart it.

    A thread counts the time in ticks, and a tick that comes late counts as two at most: while the
    process was suspended the call could not return. No Python thread runs while a call holds
    Python's global lock, as TensorFlow's do while they wait for other workers. So each tick also
    sets a native timer, which then ends the process with exit code 1 and the stacks on stderr. That
    timer counts a suspension that SIGSTOP began without SIGTSTP before it, or a frozen container:
    one that outlasts the call's time and the margin ends the process when it continues.

    Args:
        timeout_seconds: Longest time that a watched call may take.
        on_stall: Ends the process: a hung call never returns, so there is no orderly way out.
        margin_seconds: Between the end of that time and of the native timer.
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
        self._calls: list[_Call] = []  # the last is inside of those before it
        self._native_end: float | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(
        self, what: str, *, compiling: bool = False, seconds: float | None = None
    ) -> Iterator[None]:
        """End the run if the body does not end in time, with every thread's stack in the log.

        Inside of another watched body this one has its own time, and the outer one then all of its.

        Args:
            what: Names the body in the log.
            compiling: Whether the body may compile first, for which it has time of its own.
            seconds: Its time, where that is not the timeout of any call; infinity for a body that
                has its own end.
        """
        if seconds is None:
            seconds = self._timeout_seconds + (COMPILATION_SECONDS if compiling else 0.0)
        with self._lock:
            self._calls.append(_Call(what, seconds, seconds))
            self._set_native_timer()
            if self._thread is None:
                self._thread = threading.Thread(target=self._count, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._calls.pop()
                for call in self._calls[-1:]:
                    call.left = call.seconds
                self._set_native_timer()

    def _count(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self._tick_seconds)
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self._tick_seconds), now
            with self._lock:
                for call in self._calls[-1:]:
                    call.left -= elapsed
                self._set_native_timer(anew=True)
                stalled = [call for call in self._calls[-1:] if call.left <= 0]
            if stalled:
                self._end(stalled[0])
                return

    def _set_native_timer(self, *, anew: bool = False) -> None:
        """Let the native timer end the process a margin after the innermost call's time."""
        if not self._calls or self._calls[-1].left == math.inf:
            if self._native_end is not None:
                faulthandler.cancel_dump_traceback_later()
                self._native_end = None
            return
        seconds = max(self._calls[-1].left, 0.0) + self._margin_seconds
        end = time.monotonic() + seconds
        # Each tick does it; in between only another length is worth a thread of its own.
        if anew or self._native_end is None or abs(end - self._native_end) > 2 * _TICK_SECONDS:
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
            self._native_end = end

    def _end(self, call: _Call) -> None:
        try:
            from job import log  # signals are listened to before the log is loaded

            stacks = thread_stacks()
            log.event(
                "stalled",
                logging.CRITICAL,
                what=call.what,
                timeout_seconds=call.seconds,
                stacks=stacks,
                message=f"{call.what} did not end within {call.seconds:g} s; ending with exit code "
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
