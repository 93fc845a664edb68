"""The clock of all timers: it counts the time in which the process runs, and no suspension.

A process is suspended (SIGSTOP, a frozen container, a paused virtual machine) for any time, without
a notice before or after. Only a gap between two looks at a clock shows it.
"""

import threading
import time

LONGEST_GAP_SECONDS = 2.0
"""More than that between two looks counts as a suspension."""

_lock = threading.Lock()
_looked_at = time.monotonic()
_seconds = 0.0


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


def keep_looking() -> None:
    """Have a thread look at the clock every second, also while nothing else does."""

    def look() -> None:
        while True:
            running_seconds()
            time.sleep(1.0)

    threading.Thread(target=look, daemon=True).start()
