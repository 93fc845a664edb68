"""Kill small real-data trainings in every way, resume them until done, and compare every bit.

A round is one run: faults of one kind hit it one after the other, then it may finish. Its weights,
optimizer state, metrics and evaluation have to be those of a run that nothing happened to.
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
# Of operations on files, with how many of them an attempt has at least while it is worth to hit.
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
# Due after every execution, so that there is no moment without a checkpoint being written.
OPTIONS = "--limit 5120 --batch-size 64 --epochs 3 --checkpoint-every 0.001 --log-format json"
# From the start of the process; on two cores training begins after some eight seconds.
LONGEST_SECONDS = 16.0
# Until Python has run the program's first lines, signals do what they do by default.
STARTING_SECONDS = 0.5
# Nothing in here takes nearly as long, unless it hangs.
TIMEOUT_SECONDS = 300.0


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        fault: One of `FAULTS`.
        replicas: CPU replicas that trained.
        exits: Exit codes of the attempts; negative is the signal that killed one.
        seconds_to_end: How long each attempt took to end after a signal other than SIGKILL.
        problems: What was found to be wrong; nothing if the round is good.
    """

    fault: str
    replicas: int
    exits: list[int] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Attempt:
    """A process of the job.

    Args:
        command: What to run.
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
        """Read so many events of the log, or all up to the end, and note the epochs reported."""
        assert self._process.stdout is not None
        for line in itertools.islice(self._process.stdout, events):
            event = json.loads(line)
            if event["event"] == "epoch":
                self.epochs.append(event["epoch"])

    def send(self, name: str) -> None:
        self._process.send_signal(getattr(signal, name))

    def finish(self) -> tuple[int, str]:
        """Wait for the end: exit code and stderr."""
        self.read()
        _, errors = self._process.communicate()
        self._timer.cancel()
        return self._process.returncode, errors


class Chaos:
    """Makes rounds of one number of replicas.

    Args:
        data_dir: Has the real CIFAR-10.
        folder: Receives the runs' folders.
        replicas: CPU replicas.
    """

    def __init__(self, data_dir: Path, folder: Path, replicas: int) -> None:
        self._data_dir, self._folder, self._replicas = data_dir, folder, replicas
        self._reference = folder / f"reference-{replicas}"

    def make_reference(self) -> None:
        """Train once without a fault."""
        shutil.rmtree(self._reference, ignore_errors=True)
        code, errors = self._launch(self._reference).finish()
        assert code == 0, errors

    def make_round(self, fault: str, seed: int) -> Round:
        """Let faults hit a run, let it finish, and examine it."""
        rng = random.Random(seed)
        output = self._folder / f"round-{self._replicas}-{seed}"
        result = Round(fault, self._replicas)
        # Some faults come too late for a run to notice; then it is done over.
        while not any(result.exits):
            shutil.rmtree(output, ignore_errors=True)
            result = Round(fault, self._replicas)
            epochs = []
            for _ in range(rng.randint(1, 3)):
                epochs += self._hit(fault, output, rng, result)
                result.problems += examine_visible(output)
                if result.exits[-1] == 0:
                    break
        if result.exits[-1] != 0:
            attempt = self._launch(output)
            code, errors = attempt.finish()
            result.exits.append(code)
            epochs += attempt.epochs
            if code != 0:
                result.problems.append(f"nothing happened, but the exit code was {code}: {errors}")
                return result
        if epochs != sorted(set(epochs)):
            result.problems.append(f"epochs were repeated: {epochs}")
        result.problems += [*examine_visible(output), *compare(self._reference, output)]
        if not result.problems:
            shutil.rmtree(output)
        return result

    def _hit(self, fault: str, output: Path, rng: random.Random, result: Round) -> list[int]:
        """Start an attempt, let one fault hit it, and return the epochs that it reported."""
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
            # One half at any moment, the other while it trains and writes.
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


def examine_visible(output: Path) -> list[str]:
    """Find files that are visible and not whole."""
    problems = []
    for path in output.glob("[!.]*"):
        if path.name not in VISIBLE:
            problems.append(f"unexpected {path.name}")
    for path in (output / "checkpoints").glob("[!.]*"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not path.stem.endswith(f"-{digest[:16]}"):
            problems.append(f"half a checkpoint {path.name}")
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
                problems.append(f"half a picture {picture.name}")
        page = output / "report.html"
        if page.exists() and not page.read_text().endswith("</html>\n"):
            problems.append("half a report")
        if (output / "predictions.npz").exists():
            Predictions.load(output)
    except (ValueError, OSError, UserError) as error:
        problems.append(f"half a file: {error}")
    return problems


def compare(
    reference: Path, output: Path, ends: tuple[str, ...] = ("stopped", "lost", "done")
) -> list[str]:
    """Find what two finished runs differ in, but for times.

    Args:
        reference: Output folder of a run that nothing happened to.
        output: Output folder of the other.
        ends: How attempts before the last may have ended.
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
            problems.append(f"other {what}: {different}")
    if metrics(reference) != metrics(output):
        problems.append("other metrics.jsonl")
    one, two = (json.loads((run / "evaluation.json").read_text()) for run in (reference, output))
    if {**one, "model_sha256": ""} != {**two, "model_sha256": ""}:
        problems.append("other evaluation.json")
    manifest = json.loads((output / "run.json").read_text())
    attempts = manifest["attempts"]
    if manifest["outcome"] != "done" or attempts[-1]["outcome"] != "done":
        problems.append("run.json does not say done")
    # One that is hit while it draws the report has done the rest.
    if any(attempt["outcome"] not in ends for attempt in attempts[:-1]):
        problems.append(f"attempts ended as {[attempt['outcome'] for attempt in attempts]}")
    return problems


def state_of_checkpoint(output: Path) -> dict[str, Any]:
    """Variables of network and optimizer in the last checkpoint."""
    with np.load(max((output / "checkpoints").glob("*.npz"))) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def state_of_predictions(output: Path) -> dict[str, Any]:
    """Every array of the predictions; compressed, its bytes are those of the library, too."""
    with np.load(output / "predictions.npz") as file:
        return dict(file)


def state_of_model(output: Path) -> dict[str, Any]:
    """Every array of the model file."""
    arrays = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(output / "cifar10_model.h5") as file:
        file.visititems(collect)
    return arrays


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


def make_rounds(
    data_dir: Path, folder: Path, plan: list[tuple[str, int]], seed: int, jobs: int
) -> Iterator[Round]:
    """Make a round for each pair of fault and number of replicas."""
    chaos = {replicas: Chaos(data_dir, folder, replicas) for _, replicas in plan}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Chaos.make_reference, chaos.values()))
        yield from pool.map(
            lambda item: chaos[item[1][1]].make_round(item[1][0], seed + item[0]),
            enumerate(plan),
        )


def table(rounds: list[Round]) -> str:
    """The rounds as a table for the README."""
    lines = [
        "| fault | replicas | rounds | times it hit | identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault in FAULTS:
        for replicas in (1, 2):
            group = [one for one in rounds if (one.fault, one.replicas) == (fault, replicas)]
            if group:
                lines.append(_row(fault, str(replicas), group))
    return "\n".join([*lines, _row("all", "1 and 2", rounds)])


def _row(fault: str, replicas: str, rounds: list[Round]) -> str:
    hits = sum(code != 0 for one in rounds for code in one.exits)
    good = sum(not one.problems for one in rounds)
    return f"| {fault} | {replicas} | {len(rounds)} | {hits} | {good} of {len(rounds)} |"


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, output_dir: Path, rounds: int, seed: int, jobs: int) -> None:
    """Make rounds, print what happened in each and a table of all."""
    # Each kind on one replica, then each on two, and so on.
    plan = [(FAULTS[n % len(FAULTS)], 1 + n // len(FAULTS) % 2) for n in range(rounds)]
    done = []
    for number, one in enumerate(make_rounds(data_dir, output_dir, plan, seed, jobs), 1):
        done.append(one)
        verdict = "; ".join(one.problems) or "identical"
        click.echo(f"{number}/{rounds}  {one.fault} on {one.replicas}: {one.exits} {verdict}")
    click.echo(table(done))
    seconds = [second for one in done for second in one.seconds_to_end]
    click.echo(f"longest time from a signal to the end: {max(seconds, default=0.0):.1f} s")
    sys.exit(any(one.problems for one in done))


if __name__ == "__main__":
    main()
