"""``python -m job``: the same program as the installed ``cifar10-job`` command."""

import contextlib
import os
import sys

from job.run.stop import listen_to_signals


def run() -> None:
    """Run the program; signals first, so that none finds it unprepared while it loads."""
    stop = listen_to_signals()
    from job.commands.cli import main

    try:
        main(stop)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            # Whoever read it has gone, or it was closed from the start.
            with contextlib.suppress(OSError, AttributeError):
                stream.flush()
        # The interpreter's own end takes a while, in which a signal would kill it by default and
        # so replace the exit code.
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    run()
