"""``python -m job``: the same program as the installed ``cifar10-job`` command."""

from job.preemption import listen_to_signals


def run() -> None:
    """Run the program; signals first, so that none finds it unprepared while it loads."""
    stop = listen_to_signals()
    from job.cli import main

    main(stop)


if __name__ == "__main__":
    run()
