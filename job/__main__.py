"""The installed ``cifar10-job`` command.

``python -m job`` is the same program, unless the current folder has a ``job.py``.
"""

import io
import os
import sys
from contextlib import suppress


def run() -> None:
    """Run the program; signals first, so that none finds it unprepared while it loads."""
    try:
        open_standard_streams()
        from job.run.stop import listen_to_signals

        stop = listen_to_signals()
        from job.commands.cli import main

        main(stop)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except Exception as error:  # before the command line can report it
        from job.environment import explain

        explained = explain(error)
        if explained is None:
            raise
        print(f"cifar10-job: error: {explained}", file=sys.stderr)
        code = int(explained.exit_code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it has gone
            stream.flush()
    # The interpreter's own end takes a while, in which a signal would kill it by default and so
    # replace the exit code.
    os._exit(code)


def open_standard_streams() -> None:
    """Give the program stdin, stdout and stderr that are open and take any text.

    Something else would get the number of a closed one, and what is written there. What a stream
    cannot encode is escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free. The programs that this one starts get it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder: its files are no libraries of this program
    run()
