"""What people look at afterwards: the page of a run, and pictures."""

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
"""The environment in which matplotlib loads with its own defaults and fonts."""


def isolate_matplotlib() -> None:
    """Load matplotlib with its own defaults and fonts in place of the user's.

    Only the run decides the bytes of its pictures. matplotlib gets no folder for a cache: a
    container may have none, and a process that is killed would leave one behind.
    """
    if not MATPLOTLIB_VARIABLES.items() <= os.environ.items():
        os.environ |= MATPLOTLIB_VARIABLES
    with _hidden_from_matplotlib("matplotlibrc"):
        import matplotlib as mpl
    for folder in ("get_cachedir", "get_configdir"):
        setattr(mpl, folder, lambda: os.devnull)
    # It would warn that it cannot keep a list of its fonts there.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@contextlib.contextmanager
def _hidden_from_matplotlib(name: str) -> Iterator[None]:
    """Hide a file of the current folder, which matplotlib reads before all others."""
    exists = os.path.exists
    setattr(os.path, "exists", lambda path: path != name and exists(path))  # noqa: B010
    try:
        yield
    finally:
        setattr(os.path, "exists", exists)  # noqa: B010


@contextlib.contextmanager
def spare_the_run(what: str) -> Iterator[None]:
    """Let no defect of the body, which draws, cost the run: a warning takes its place.

    Args:
        what: Names in the log what is drawn.

    Raises:
        UserError: If a file cannot be written.
        LeaseLostError: If the folder is another attempt's now.
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
            message=f"everything but {what} is there; drawing it failed, which is a defect of the "
            f"job: please report the trace\n{trace}",
        )
