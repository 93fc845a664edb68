"""The installed ``cifar10-job`` command.

``python -m job`` is the same program, unless the current folder has a ``job.py``.
"""

import os
import sys


def run() -> None:
    """Run the program; signals first, so that none finds it unprepared while it loads."""
    import contextlib

    from job.environment import explain

    try:
        from job.run.stop import listen_to_signals

        stop = listen_to_signals()
        from job.commands.cli import main

        main(stop)
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception as error:  # before the command line can report it
        explained = explain(error)
        if explained is None:
            raise
        with contextlib.suppress(OSError):
            print(f"cifar10-job: error: {explained}", file=sys.stderr)
        code = int(explained.exit_code)
    for stream in (sys.stdout, sys.stderr):
        # Whoever read it has gone, or it was closed from the start.
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    # The interpreter's own end takes a while, in which a signal would kill it by default and so
    # replace the exit code.
    os._exit(code)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder: its files are no libraries of this program
    run()
