"""``python -m job``: the same program as the installed ``cifar10-job`` command."""

from job.cli import main

if __name__ == "__main__":
    main()
