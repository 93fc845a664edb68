"""The report of a run: its page and pictures."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator

from job import log
from job.config import JobError

MATPLOTLIB_VARIABLES = {
    "MPLBACKEND": "agg",
    "MATPLOTLIBRC": os.devnull,
    "MPL_IGNORE_SYSTEM_FONTS": "1",
}
"""Environment variables that make matplotlib load with its own defaults and fonts."""


def isolate_matplotlib() -> None:
    """Load matplotlib with its own defaults and fonts instead of the user's.

    So only the run determines the bytes of its pictures. matplotlib gets no cache folder: in a
    container there is not always one, and a killed process would leave one behind.
    """
    if not MATPLOTLIB_VARIABLES.items() <= os.environ.items():
        os.environ |= MATPLOTLIB_VARIABLES
    with _hidden_from_matplotlib("matplotlibrc"):
        import matplotlib as mpl
    for folder in ("get_cachedir", "get_configdir"):
        setattr(mpl, folder, lambda: os.devnull)
    # Without the folder, it warns that it cannot save its list of fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@contextlib.contextmanager
def _hidden_from_matplotlib(name: str) -> Iterator[None]:
    """Hide a file in the current folder, which matplotlib would read before all others."""
    exists = os.path.exists
    setattr(os.path, "exists", lambda path: path != name and exists(path))  # noqa: B010
    try:
        yield
    finally:
        setattr(os.path, "exists", exists)  # noqa: B010


@contextlib.contextmanager
def tolerate_drawing_errors(what: str) -> Iterator[None]:
    """Log a warning if the body, which draws, fails because of a defect. The run continues.

    Args:
        what: Name of the drawing in the log.

    Raises:
        UserError: If a file cannot be written.
        LeaseLostError: If another attempt has taken the folder over.
    """
    try:
        yield
    except JobError:
        raise
    except Exception:
        trace = traceback.format_exc()
        log.event(
            "not_drawn",
            logging.WARNING,
            what=what,
            trace=trace,
            message=f"could not draw {what}; all other artifacts are complete; this is a defect in "
            f"the job; report this traceback\n{trace}",
        )
