"""Kill small real-data trainings in every way, resume them until done, and compare every bit.

A round is one run: faults of one kind hit it one after the other, then it may finish. Its weights,
optimizer state, metrics and evaluation have to be those of a run that nothing happened to.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np

REPOSITORY = Path(__file__).parents[2]
FAULTS = ("SIGKILL", "file operation", "SIGTERM", "SIGINT", "SIGUSR1", "two SIGINT", "--stop-after")
TIME_FIELDS = ("seconds", "images_per_second", "elapsed_seconds")
VISIBLE = {
    "cifar10_model.h5",
    "evaluation.json",
    "prediction.png",
    "metrics.jsonl",
    "run.json",
    "checkpoints",
}
# Due after every span, so that there is no moment without a checkpoint being written.
OPTIONS = "--limit 5120 --batch-size 64 --epochs 3 --checkpoint-every 0.001 --log-format json"
# From the start of the process; on two cores training begins after some eight seconds.
LONGEST_SECONDS = 16.0


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        fault: One of `FAULTS`.
        replicas: CPU replicas that trained.
        exits: Exit codes of the attempts; negative is the signal that killed one.
        problems: What was found to be wrong; nothing if the round is good.
    """

    fault: str
    replicas: int
    exits: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Attempt:
    """A process of the job that runs, and what it has logged so far."""

    process: subprocess.Popen[str]
    start: float

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)


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
        attempt = self._launch(self._reference, [])
        _, errors = attempt.process.communicate()
        assert attempt.process.returncode == 0, errors

    def make_round(self, fault: str, seed: int) -> Round:
        """Let faults hit a run, let it finish, and examine it."""
        rng = random.Random(seed)
        output = self._folder / f"round-{self._replicas}-{seed}"
        shutil.rmtree(output, ignore_errors=True)
        result = Round(fault, self._replicas)
        reported: list[int] = []
        for _ in range(rng.randint(1, 3)):
            result.exits.append(self._hit(fault, output, rng, reported, result.problems))
            result.problems += examine_visible(output)
            if result.exits[-1] == 0:
                break
        while result.exits[-1] != 0 and len(result.exits) < 10:
            attempt = self._launch(output, [])
            reported += [event["epoch"] for event in attempt.events() if event["event"] == "epoch"]
            result.exits.append(attempt.process.wait())
        result.problems += examine_visible(output)
        if reported != sorted(set(reported)):
            result.problems.append(f"epochs were repeated: {reported}")
        result.problems += compare(self._reference, output)
        if not result.problems:
            shutil.rmtree(output)
        return result

    def _hit(
        self,
        fault: str,
        output: Path,
        rng: random.Random,
        reported: list[int],
        problems: list[str],
    ) -> int:
        """Start an attempt and let one fault hit it."""
        prefix, options = [], []
        expected = {75}
        if fault == "file operation":
            prefix = ["tests.integration.faults", str(rng.randint(1, 60))]
            prefix.append(rng.choice(["before", "half", "after"]))
            expected = {-signal.SIGKILL}
        elif fault == "--stop-after":
            options = ["--stop-after", f"{rng.uniform(0.1, LONGEST_SECONDS):.2f}"]
        elif fault == "SIGKILL":
            expected = {-signal.SIGKILL}
        attempt = self._launch(output, options, prefix)
        # One half at any moment, the other while it trains and writes.
        events_before = rng.choice([0, rng.randint(1, 20)])
        delay = rng.uniform(0, 0.5 if events_before else LONGEST_SECONDS)
        events = attempt.events()
        for _, event in zip(range(events_before), events, strict=False):
            if event["event"] == "epoch":
                reported.append(event["epoch"])
        signalled = None
        if fault not in ("file operation", "--stop-after"):
            time.sleep(delay)
            name = "SIGINT" if fault == "two SIGINT" else fault
            signalled = time.monotonic()
            attempt.process.send_signal(getattr(signal, name))
            if fault == "two SIGINT":
                time.sleep(rng.uniform(0.01, 0.5))
                attempt.process.send_signal(signal.SIGINT)
        reported += [event["epoch"] for event in events if event["event"] == "epoch"]
        code = attempt.process.wait()
        if code not in {*expected, 0}:
            assert attempt.process.stderr is not None
            problems.append(f"exit code {code}: {attempt.process.stderr.read()[-500:]}")
        if signalled and time.monotonic() - signalled > 15 and code != 0:
            problems.append(f"took {time.monotonic() - signalled:.1f} s to end")
        return code

    def _launch(self, output: Path, options: list[str], prefix: list[str] | None = None) -> Attempt:
        command = [sys.executable, "-m", *(prefix or ["job"]), "train", *OPTIONS.split(), *options]
        command += ["--devices", f"cpu:{self._replicas}"]
        command += ["--data-dir", str(self._data_dir), "--output-dir", str(output)]
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JOB_", "SLURM_"))
        }
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Attempt(process, time.monotonic())


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
        picture = output / "prediction.png"
        if picture.exists() and not picture.read_bytes().endswith(b"IEND\xaeB`\x82"):
            problems.append("half a picture")
    except (ValueError, OSError) as error:
        problems.append(f"half a file: {error}")
    return problems


def compare(reference: Path, output: Path) -> list[str]:
    """Find what two finished runs differ in, but for times."""
    problems = []
    for what, read in (
        ("checkpoint", state_of_checkpoint),
        ("model file", state_of_model),
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
    if any(attempt["outcome"] not in ("stopped", "lost") for attempt in attempts[:-1]):
        problems.append(f"attempts ended as {[attempt['outcome'] for attempt in attempts]}")
    return problems


def state_of_checkpoint(output: Path) -> dict[str, Any]:
    """Variables of network and optimizer in the last checkpoint."""
    with np.load(max((output / "checkpoints").glob("*.npz"))) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


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
        "| fault | replicas | rounds | faults that hit | attempts | identical |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    counts = Counter((one.fault, one.replicas) for one in rounds)
    for (fault, replicas), count in sorted(counts.items(), key=lambda item: str(item[0])):
        group = [one for one in rounds if (one.fault, one.replicas) == (fault, replicas)]
        hits = sum(len([code for code in one.exits if code != 0]) for one in group)
        attempts = sum(len(one.exits) for one in group)
        good = sum(not one.problems for one in group)
        lines.append(
            f"| {fault} | {replicas} | {count} | {hits} | {attempts} | {good} of {count} |"
        )
    good = sum(not one.problems for one in rounds)
    hits = sum(len([code for code in one.exits if code != 0]) for one in rounds)
    lines.append(
        f"| all | | {len(rounds)} | {hits} | {sum(len(one.exits) for one in rounds)} "
        f"| **{good} of {len(rounds)}** |"
    )
    return "\n".join(lines)


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
    sys.exit(any(one.problems for one in done))


if __name__ == "__main__":
    main()
