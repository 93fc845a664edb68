"""Ends a run early and in order: on a signal, at a deadline, or when its folder is asked for.

Standard library only: it is set up before anything that takes time.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

from job.config import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

RUN_AGAIN = "run the same command again to go on"

_LAST_WORDS_SECONDS = 3.0


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
        self._last_words: list[Callable[[str], None]] = []

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
    def last_words(self, say: Callable[[str], None]) -> Iterator[None]:
        """Set what is done if the process ends at once during the body.

        Args:
            say: Is given the reason, in another thread, before what was set earlier. All together
                have a few seconds.
        """
        self._last_words.append(say)
        try:
            yield
        finally:
            self._last_words.remove(say)

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
            end_process(ExitCode.RUN_AGAIN, [partial(say, reason) for say in self._last_words])


def end_process(exit_code: ExitCode, last_words: Sequence[Callable[[], None]]) -> NoReturn:
    """End the process from any thread, whatever the others are doing.

    Args:
        exit_code: What the process returns.
        last_words: Done before, from the last to the first, for as long as a few seconds: the
            volume that they write to may hang.
    """

    def speak() -> None:
        for say in reversed(last_words):
            # Nobody is left to handle an error.
            with contextlib.suppress(Exception):
                say()

    try:
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_SECONDS)
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
    listen_again()
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # The sender goes along because the socket closes with its last reference.
    listener = threading.Thread(target=_listen, args=(receiver, sender, stop), daemon=True)
    listener.start()
    return stop


def listen_again() -> None:
    """Take the handlers of `SIGNALS` back from a library that has set its own.

    TensorFlow's distributed runtime swallows SIGTERM.
    """
    for number in SIGNALS:
        # What nohup has made the process deaf to stays unheard.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handled_by_the_listener)


def _listen(receiver: socket.socket, _sender: socket.socket, stop: StopRequest) -> None:
    interrupts = 0
    while True:
        for number in receiver.recv(64):
            name = signal.Signals(number).name
            interrupts += name == "SIGINT"
            if interrupts == 2:
                stop.request("a second SIGINT", at_once=True)
            stop.request(name)


def _handled_by_the_listener(*_arguments: object) -> None:
    pass
