"""Several workers of one run on this machine, each a process of the job with its TF_CONFIG."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Job, free_ports


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback with ports that nobody uses."""
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def evaluate_on_one_device(output: Path, data_dir: Path) -> None:
    """Evaluate a run's model again as a chief does: on more devices a sum has another order."""
    words = ("--devices", "cpu:1", "--data-dir", data_dir, "--output-dir", output)
    result = Job(output, "evaluate", *words).finish()
    assert result.returncode == 0, result.stderr


class Team:
    """Starts workers and waits for them.

    Args:
        folder: Working directory of all; output folders are in it.
        count: Number of workers.
        arguments: Of the command line.
        module: What to run instead of the job itself.
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
        """Start some of the workers, or all of them."""
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
        """Wait for the end of all; their exit codes, in the order of their ranks."""
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
        """Leave no process behind, also of those that are no longer among the workers."""
        for worker in self._started:
            worker.end()
