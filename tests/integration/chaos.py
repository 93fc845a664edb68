"""Kill small real-data trainings in every way, resume them until done, and compare every bit.

A round is one run: faults of one kind interrupt it several times, then it finishes undisturbed. Its
weights, optimizer state, metrics and evaluation must equal those of an uninterrupted run.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np

from job.config import UserError
from job.run.predictions import Predictions
from job.run.stop import SIGNALS

REPOSITORY = Path(__file__).parents[2]
# File operations to kill at, with the highest number to draw: every attempt has at least as many.
OPERATIONS = {"checkpoints": 40, "artifacts": 80}
FAULTS = (
    "SIGKILL",
    "SIGKILL at a checkpoint's file operation",
    "SIGTERM",
    "SIGKILL at an artifact's file operation",
    "SIGINT",
    "SIGUSR1",
    "two SIGINT",
    "--stop-after",
)
TIME_FIELDS = ("seconds", "images_per_second", "elapsed_seconds")
VISIBLE = {
    "cifar10_model.h5",
    "evaluation.json",
    "prediction.png",
    "predictions.npz",
    "report",
    "report.html",
    "metrics.jsonl",
    "run.json",
    "checkpoints",
}
# A checkpoint after every execution, so that one is always being written.
OPTIONS = "--limit 5120 --batch-size 64 --epochs 3 --checkpoint-every 0.001 --log-format json"
# Since the start of the process. On two cores, training starts after about eight seconds.
LONGEST_SECONDS = 16.0
# Until Python has run the program's first lines, signals have their default effect.
STARTING_SECONDS = 0.5
# An attempt that takes this long hangs.
TIMEOUT_SECONDS = 300.0


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        fault: One of `FAULTS`.
        replicas: Number of CPU replicas.
        exits: Exit codes of the attempts; a negative code is the signal that killed the attempt.
        seconds_to_end: Seconds from a signal other than SIGKILL to the end of each attempt.
        problems: Problems that were found; empty if the round is good.
    """

    fault: str
    replicas: int
    exits: list[int] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Attempt:
    """A process of the job.

    Args:
        command: The command to run.
    """

    def __init__(self, command: list[str]) -> None:
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JOB_", "SLURM_", "KUBERNETES_"))
        }
        self.start = time.monotonic()
        self.epochs: list[int] = []
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._timer = threading.Timer(TIMEOUT_SECONDS, self._process.kill)
        self._timer.start()

    def read(self, events: int | None = None) -> None:
        """Read this number of log events, by default all, and record the reported epochs."""
        assert self._process.stdout is not None
        for line in itertools.islice(self._process.stdout, events):
            event = json.loads(line)
            if event["event"] == "epoch":
                self.epochs.append(event["epoch"])

    def send(self, name: str) -> None:
        self._process.send_signal(getattr(signal, name))

    def finish(self) -> tuple[int, str]:
        """Wait for the process to exit; return its exit code and stderr."""
        self.read()
        _, errors = self._process.communicate()
        self._timer.cancel()
        return self._process.returncode, errors


class Chaos:
    """Runs rounds with a fixed number of replicas.

    Args:
        data_dir: Folder with the real CIFAR-10.
        folder: Parent folder for the runs.
        replicas: Number of CPU replicas.
    """

    def __init__(self, data_dir: Path, folder: Path, replicas: int) -> None:
        self._data_dir, self._folder, self._replicas = data_dir, folder, replicas
        self._reference = folder / f"reference-{replicas}"

    def train_reference(self) -> None:
        """Train once without faults."""
        shutil.rmtree(self._reference, ignore_errors=True)
        code, errors = self._launch(self._reference).finish()
        assert code == 0, errors

    def run_round(self, fault: str, seed: int) -> Round:
        """Interrupt a run with faults, let it finish, and check it."""
        rng = random.Random(seed)
        output = self._folder / f"round-{self._replicas}-{seed}"
        result = Round(fault, self._replicas)
        # If every fault came too late to interrupt the run, repeat the round.
        while not any(result.exits):
            shutil.rmtree(output, ignore_errors=True)
            result = Round(fault, self._replicas)
            epochs = []
            for _ in range(rng.randint(1, 3)):
                epochs += self._interrupt(fault, output, rng, result)
                result.problems += check_visible(output)
                if result.exits[-1] == 0:
                    break
        if result.exits[-1] != 0:
            attempt = self._launch(output)
            code, errors = attempt.finish()
            result.exits.append(code)
            epochs += attempt.epochs
            if code != 0:
                result.problems.append(f"exit code {code} without a fault: {errors}")
                return result
        if epochs != sorted(set(epochs)):
            result.problems.append(f"epochs were repeated: {epochs}")
        result.problems += [*check_visible(output), *compare(self._reference, output)]
        if not result.problems:
            shutil.rmtree(output)
        return result

    def _interrupt(self, fault: str, output: Path, rng: random.Random, result: Round) -> list[int]:
        """Start an attempt, interrupt it with one fault, and return the epochs that it reported."""
        module, options = ["job"], []
        match = re.search("checkpoint|artifact", fault)
        if match:
            what = f"{match[0]}s"
            number = rng.randint(1, OPERATIONS[what])
            moment = rng.choice(["before", "half", "after"])
            module = ["tests.integration.faults", what, str(number), moment]
        elif fault == "--stop-after":
            options = [fault, f"{rng.uniform(0.1, LONGEST_SECONDS):.2f}"]
        attempt = self._launch(output, module, options)
        seconds = None
        if not match and fault != "--stop-after":
            # Half of the signals come at any moment, the others while the run trains and writes.
            events = rng.choice([0, rng.randint(1, 20)])
            attempt.read(events)
            time.sleep(rng.uniform(0, 0.5 if events else LONGEST_SECONDS))
            signalled = time.monotonic()
            attempt.send("SIGINT" if fault == "two SIGINT" else fault)
            if fault == "two SIGINT":
                time.sleep(rng.uniform(0.01, 0.5))
                attempt.send("SIGINT")
            seconds = signalled - attempt.start
        code, errors = attempt.finish()
        result.exits.append(code)
        killed = match or fault == "SIGKILL"
        expected = {0, -signal.SIGKILL if killed else 75}
        if seconds is not None and not killed:
            result.seconds_to_end.append(time.monotonic() - signalled)
            if seconds < STARTING_SECONDS:
                expected |= {-number for number in SIGNALS}
        if code not in expected:
            result.problems.append(f"exit code {code}: {errors[-500:]}")
        return attempt.epochs

    def _launch(
        self, output: Path, module: Iterable[str] = ("job",), options: Iterable[str] = ()
    ) -> Attempt:
        return Attempt(
            [
                *(sys.executable, "-m", *module, "train", *OPTIONS.split(), *options),
                *("--devices", f"cpu:{self._replicas}"),
                *("--data-dir", str(self._data_dir), "--output-dir", str(output)),
            ]
        )


def check_visible(output: Path) -> list[str]:
    """Find visible files that are unexpected or incomplete."""
    problems = []
    for path in output.glob("[!.]*"):
        if path.name not in VISIBLE:
            problems.append(f"unexpected {path.name}")
    for path in (output / "checkpoints").glob("[!.]*"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not path.stem.endswith(f"-{digest[:16]}"):
            problems.append(f"incomplete checkpoint {path.name}")
    try:
        for name in ("evaluation.json", "run.json"):
            if (output / name).exists():
                json.loads((output / name).read_text())
        if (output / "metrics.jsonl").exists():
            for line in (output / "metrics.jsonl").read_text().splitlines():
                json.loads(line)
        if (output / "cifar10_model.h5").exists():
            state_of_model(output)
        for picture in (*output.glob("[!.]*.png"), *(output / "report").glob("[!.]*.png")):
            if not picture.read_bytes().endswith(b"IEND\xaeB`\x82"):
                problems.append(f"incomplete picture {picture.name}")
        page = output / "report.html"
        if page.exists() and not page.read_text().endswith("</html>\n"):
            problems.append("incomplete report")
        if (output / "predictions.npz").exists():
            Predictions.load(output)
    except (ValueError, OSError, UserError) as error:
        problems.append(f"incomplete file: {error}")
    return problems


def compare(
    reference: Path, output: Path, ends: tuple[str, ...] = ("stopped", "lost", "done")
) -> list[str]:
    """Find differences between two finished runs, except in times.

    Args:
        reference: Output folder of an uninterrupted run.
        output: Output folder of the other run.
        ends: Allowed outcomes of the attempts before the last.
    """
    problems = []
    for what, read in (
        ("checkpoint", state_of_checkpoint),
        ("model file", state_of_model),
        ("predictions", state_of_predictions),
    ):
        one, two = read(reference), read(output)
        different = [name for name in one if not np.array_equal(one[name], two.get(name, ()))]
        if different or one.keys() != two.keys():
            problems.append(f"different {what}: {different}")
    if metrics(reference) != metrics(output):
        problems.append("different metrics.jsonl")
    one, two = (json.loads((run / "evaluation.json").read_text()) for run in (reference, output))
    if {**one, "model_sha256": ""} != {**two, "model_sha256": ""}:
        problems.append("different evaluation.json")
    manifest = json.loads((output / "run.json").read_text())
    attempts = manifest["attempts"]
    if manifest["outcome"] != "done" or attempts[-1]["outcome"] != "done":
        problems.append("the outcome in run.json is not done")
    # An attempt that is interrupted while it draws the report has completed the training.
    if any(attempt["outcome"] not in ends for attempt in attempts[:-1]):
        problems.append(f"attempts ended as {[attempt['outcome'] for attempt in attempts]}")
    return problems


def state_of_checkpoint(output: Path) -> dict[str, Any]:
    """Read the variables of network and optimizer from the last checkpoint."""
    with np.load(max((output / "checkpoints").glob("*.npz"))) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def state_of_predictions(output: Path) -> dict[str, Any]:
    """Read every array of the predictions, because the file's bytes depend on the zip library."""
    with np.load(output / "predictions.npz") as file:
        return dict(file)


def state_of_model(output: Path) -> dict[str, Any]:
    """Read every array of the model file."""
    arrays = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(output / "cifar10_model.h5") as file:
        file.visititems(collect)
    return arrays


def metrics(output: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


def run_rounds(
    data_dir: Path, folder: Path, plan: list[tuple[str, int]], seed: int, jobs: int
) -> Iterator[Round]:
    """Run a round for each pair of fault and number of replicas."""
    chaos = {replicas: Chaos(data_dir, folder, replicas) for _, replicas in plan}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Chaos.train_reference, chaos.values()))
        yield from pool.map(
            lambda item: chaos[item[1][1]].run_round(item[1][0], seed + item[0]),
            enumerate(plan),
        )


def table(rounds: list[Round]) -> str:
    """Format the rounds as a table for BENCHMARKS.md."""
    lines = [
        "| fault | replicas | rounds | interruptions | identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault in FAULTS:
        for replicas in (1, 2):
            group = [one for one in rounds if (one.fault, one.replicas) == (fault, replicas)]
            if group:
                lines.append(_row(fault, str(replicas), group))
    return "\n".join([*lines, _row("all", "1 and 2", rounds)])


def _row(fault: str, replicas: str, rounds: list[Round]) -> str:
    interruptions = sum(code != 0 for one in rounds for code in one.exits)
    good = sum(not one.problems for one in rounds)
    return f"| {fault} | {replicas} | {len(rounds)} | {interruptions} | {good} of {len(rounds)} |"


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, output_dir: Path, rounds: int, seed: int, jobs: int) -> None:
    """Run rounds, print the result of each, and a table of all."""
    # Each kind of fault on one replica, then each on two, and so on.
    plan = [(FAULTS[n % len(FAULTS)], 1 + n // len(FAULTS) % 2) for n in range(rounds)]
    done = []
    for number, one in enumerate(run_rounds(data_dir, output_dir, plan, seed, jobs), 1):
        done.append(one)
        verdict = "; ".join(one.problems) or "identical"
        click.echo(f"{number}/{rounds}  {one.fault} on {one.replicas}: {one.exits} {verdict}")
    click.echo(table(done))
    seconds = [second for one in done for second in one.seconds_to_end]
    click.echo(f"longest time from a signal to the exit: {max(seconds, default=0.0):.1f} s")
    sys.exit(any(one.problems for one in done))


if __name__ == "__main__":
    main()
