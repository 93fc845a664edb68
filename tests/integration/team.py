"""Several workers of one run on this machine, each a process of the job with its own TF_CONFIG."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Job, free_ports


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback with unused ports."""
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def evaluate_on_one_device(output: Path, data_dir: Path) -> None:
    """Evaluate a run's model on one device, as a chief does: the order of sums depends on it."""
    words = ("--devices", "cpu:1", "--data-dir", data_dir, "--output-dir", output)
    result = Job(output, "evaluate", *words).finish()
    assert result.returncode == 0, result.stderr


class Team:
    """Starts workers and waits for them.

    Args:
        folder: Working directory of all workers, with the output folders.
        count: Number of workers.
        arguments: Arguments of the command line.
        module: Python module to run instead of the job itself.
    """

    def __init__(
        self, folder: Path, count: int, *arguments: str | Path, module: str = "job"
    ) -> None:
        self.addresses = free_addresses(count)
        self._folder, self._arguments, self._module = folder, arguments, module
        self.workers: dict[int, Job] = {}
        self._started: list[Job] = []

    def start(
        self,
        *ranks: int,
        options: Sequence[str | Path] = (),
        env: Mapping[str, str] | None = None,
    ) -> "Team":
        """Start the workers with these ranks, by default all."""
        for rank in ranks or range(len(self.addresses)):
            task = {"type": "worker", "index": rank}
            config = {"cluster": {"worker": self.addresses}, "task": task}
            self.workers[rank] = Job(
                self._folder,
                *self._arguments,
                *options,
                env={"TF_CONFIG": json.dumps(config), **(env or {})},
                module=self._module,
            )
            self._started.append(self.workers[rank])
        return self

    def finish(self, timeout: float = 300) -> list[int]:
        """Wait until all workers have exited; return their exit codes, ordered by rank."""
        end = time.monotonic() + timeout
        codes = []
        self.logs: dict[int, list[dict[str, Any]]] = {}
        self.errors: dict[int, str] = {}
        for rank, worker in sorted(self.workers.items()):
            result = worker.finish(max(end - time.monotonic(), 1))
            self.logs[rank] = [json.loads(line) for line in result.stdout.splitlines()]
            self.errors[rank] = result.stderr
            codes.append(result.returncode)
        return codes

    def kill(self) -> None:
        """Kill all processes, including those removed from `workers`."""
        for worker in self._started:
            worker.end()
