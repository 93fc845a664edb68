"""What people look at afterwards: the page of a run, and pictures.

Only the run decides their bytes. So matplotlib is loaded here, before any module of the package
uses it, with its own defaults and fonts in place of the user's. It gets no folder for a cache: a
container may have none, and a process that is killed would leave one behind.
"""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator

from job import log
from job.config import JobError


@contextlib.contextmanager
def _hidden_from_matplotlib(name: str) -> Iterator[None]:
    """Hide a file of the current folder, which matplotlib reads before all others."""
    exists = os.path.exists
    setattr(os.path, "exists", lambda path: path != name and exists(path))  # noqa: B010
    try:
        yield
    finally:
        setattr(os.path, "exists", exists)  # noqa: B010


os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull, "MPL_IGNORE_SYSTEM_FONTS": "1"}
with _hidden_from_matplotlib("matplotlibrc"):
    import matplotlib as mpl
for _folder in ("get_cachedir", "get_configdir"):
    setattr(mpl, _folder, lambda: os.devnull)
# It would warn that it cannot keep a list of its fonts there.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


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
