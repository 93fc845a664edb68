"""The clock of all timers: it counts the time in which the process runs, without suspensions.

A process can be suspended for any length of time (SIGSTOP, a frozen container, a paused virtual
machine), without notice before or after. Only a gap between two readings of a clock shows it.
"""

import threading
import time

LONGEST_GAP_SECONDS = 2.0
"""A longer gap between two readings of the clock counts as a suspension."""

_RECENT_SECONDS = 60.0

_lock = threading.Lock()
_last_reading = time.monotonic()
_seconds = 0.0
_suspended = (0.0, 0.0)  # length of the last suspension, and its end by this clock


def running_seconds() -> float:
    """Return the seconds that this process has run since its start, without suspensions.

    All time limits of waits and runs are measured by this clock. A call that blocks all other
    threads counts as `LONGEST_GAP_SECONDS` at most.
    """
    global _last_reading, _seconds
    with _lock:
        now = time.monotonic()
        _seconds += min(now - _last_reading, LONGEST_GAP_SECONDS)
        _last_reading = now
        return _seconds


def suspended_seconds() -> float:
    """Return the seconds of a suspension that ended less than a minute ago, or 0."""
    seconds, end = _suspended
    return seconds if running_seconds() - end < _RECENT_SECONDS else 0.0


def start_reading() -> None:
    """Start a thread that reads the clock every second, even if nothing else does."""

    def read() -> None:
        global _suspended
        while True:
            before = time.monotonic()
            time.sleep(1.0)
            gap, now = time.monotonic() - before, running_seconds()
            if gap > 2 * LONGEST_GAP_SECONDS:
                _suspended = (gap, now)

    threading.Thread(target=read, daemon=True).start()
