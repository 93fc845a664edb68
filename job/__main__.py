"""``python -m job``: the same program as the installed ``cifar10-job`` command."""

import contextlib
import io
import os
import sys

from job.run.stop import listen_to_signals


def run() -> None:
    """Run the program; signals first, so that none finds it unprepared while it loads."""
    open_standard_streams()
    stop = listen_to_signals()
    from job.commands.cli import main

    try:
        main(stop)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            # Whoever read it has gone.
            with contextlib.suppress(OSError):
                stream.flush()
        # The interpreter's own end takes a while, in which a signal would kill it by default and
        # so replace the exit code.
        os._exit(int(end.code or 0))


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
    run()
