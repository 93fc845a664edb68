"""The installed ``cifar10-job`` command.

``python -m job`` is the same program, unless the current folder contains a ``job.py``.
"""

import io
import os
import sys
from contextlib import suppress


def run() -> None:
    """Run the program; handle signals first, because one can arrive while it loads."""
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
        with suppress(OSError):  # the reader has closed it
            stream.flush()
    # The interpreter takes a while to shut down. A signal in that time kills the process by default
    # and so replaces the exit code.
    os._exit(code)


def open_standard_streams() -> None:
    """Make sure that stdin, stdout and stderr are open and accept any text.

    Otherwise another file could get the descriptor of a closed stream, and with it the text written
    to that stream. Characters that a stream cannot encode are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest free number, which is this one. Child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder: its files are not libraries of this program
    run()
