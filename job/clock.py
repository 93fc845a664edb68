"""The clock of all timers: it counts the time in which the process runs, and no suspension.

A process is suspended (SIGSTOP, a frozen container, a paused virtual machine) for any time, without
a notice before or after. Only a gap between two looks at a clock shows it.
"""

import threading
import time

LONGEST_GAP_SECONDS = 2.0
"""More than that between two looks counts as a suspension."""

_JUST_SECONDS = 60.0

_lock = threading.Lock()
_looked_at = time.monotonic()
_seconds = 0.0
_suspended = (0.0, 0.0)  # for how long the last time, and when it ended by this clock


def running_seconds() -> float:
    """Seconds in which this process has run since it was started.

    Whatever ends a wait or a run after some time measures it by this clock. The time of a call that
    lets no other thread run is counted for `LONGEST_GAP_SECONDS` at most.
    """
    global _looked_at, _seconds
    with _lock:
        now = time.monotonic()
        _seconds += min(now - _looked_at, LONGEST_GAP_SECONDS)
        _looked_at = now
        return _seconds


def suspended_seconds() -> float:
    """Seconds of a suspension that ended less than a minute ago; 0 without one."""
    seconds, end = _suspended
    return seconds if running_seconds() - end < _JUST_SECONDS else 0.0


def keep_looking() -> None:
    """Have a thread look at the clock every second, also while nothing else does."""

    def look() -> None:
        global _suspended
        while True:
            before = time.monotonic()
            time.sleep(1.0)
            gap, now = time.monotonic() - before, running_seconds()
            if gap > 2 * LONGEST_GAP_SECONDS:
                _suspended = (gap, now)

    threading.Thread(target=look, daemon=True).start()
