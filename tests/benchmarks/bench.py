"""Measure this job against the conventional Keras script, and where the job's own time goes.

Rounds are interleaved, so that a machine whose speed drifts is fair to all; a run counts by the
fastest of its epochs after the first, and each figure is the median over the rounds.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from job import log

JOB_PRECISIONS = ("float32", "auto")
CONVENTIONAL = "conventional"


@dataclass(frozen=True)
class Kernels:
    """How much of an epoch's training time oneDNN's kernels account for.

    Attributes:
        covered: Fraction of the time in which at least one kernel was running.
        summed: The kernels' durations added up over the time; above 1 where they overlap.
    """

    covered: float
    summed: float


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(min=2), default=3, show_default=True)
def main(data_dir: Path, output_dir: Path, rounds: int, epochs: int) -> None:
    """Print a table and write bench.json."""
    if not (data_dir / "cifar-10-batches-py").is_dir():
        raise click.ClickException(f"no cifar-10-batches-py in {data_dir}; name another --data-dir")
    seconds: dict[str, list[float]] = {CONVENTIONAL: [], **{name: [] for name in JOB_PRECISIONS}}
    for number in range(1, rounds + 1):
        for name, runs in seconds.items():
            runs.append(_fastest_epoch(name, data_dir, epochs))
            click.echo(f"round {number}/{rounds}  {name:<14} {runs[-1]:7.2f} s an epoch")
    kernels = {name: _measure_kernels(name, data_dir) for name in JOB_PRECISIONS}
    document = _document(seconds, kernels, epochs)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    click.echo(_table(document))


def _fastest_epoch(name: str, data_dir: Path, epochs: int) -> float:
    """Seconds of the fastest training epoch after the first, without validation."""
    if name == CONVENTIONAL:
        script = Path(__file__).with_name("conventional.py")
        lines = _run([script, data_dir, epochs])
        records = [json.loads(line) for line in lines if line.startswith("{")]
    else:
        records = [event for event in _train(name, data_dir, epochs) if event["event"] == "epoch"]
    return min(float(record["seconds"]) for record in records[1:])


def _train(precision: str, data_dir: Path, epochs: int) -> list[dict[str, Any]]:
    lines = _run_job(precision, data_dir, epochs)
    return [json.loads(line) for line in lines if line.startswith("{")]


def _run_job(precision: str, data_dir: Path, epochs: int, **env: str) -> list[str]:
    with tempfile.TemporaryDirectory() as output_dir:
        options = f"--epochs {epochs} --precision {precision} --log-format json".split()
        folders = ["--data-dir", data_dir, "--output-dir", output_dir]
        return _run(["-m", "job", "train", *options, *folders], **env)


def _run(arguments: Iterable[Any], **env: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise click.ClickException(f"exit code {result.returncode}:\n{result.stderr}")
    return result.stdout.splitlines()


def _measure_kernels(precision: str, data_dir: Path) -> Kernels:
    """Time oneDNN's kernels over the training part of a run's second epoch.

    Each kernel prints a line when it ends, which itself takes time: shares are underestimated.
    """
    env = {"ONEDNN_VERBOSE": "profile_exec", "ONEDNN_VERBOSE_TIMESTAMP": "1"}
    lines = _run_job(precision, data_dir, 2, **env)
    epochs = [json.loads(line) for line in lines if '"event": "epoch"' in line]
    start = datetime.fromisoformat(epochs[0]["time"]).timestamp() * 1e3
    end = start + epochs[1]["seconds"] * 1e3
    spans = []
    for line in lines:
        fields = line.split(",")
        if fields[0] == "onednn_verbose" and fields[3:5] == ["primitive", "exec"]:
            begin, duration = float(fields[2]), float(fields[-1])
            spans.append((max(begin, start), min(begin + duration, end)))
    return kernels_in(spans, start, end)


def kernels_in(spans: Iterable[tuple[float, float]], start: float, end: float) -> Kernels:
    """Shares of a time that (begin, end) spans cover and add up to; spans outside count nothing."""
    covered, summed, reached = 0.0, 0.0, start
    for begin, finish in sorted(span for span in spans if span[0] < span[1]):
        summed += finish - begin
        covered += max(finish - max(begin, reached), 0.0)
        reached = max(reached, finish)
    return Kernels(covered / (end - start), summed / (end - start))


def _document(
    seconds: dict[str, list[float]], kernels: dict[str, Kernels], epochs: int
) -> dict[str, Any]:
    base = statistics.median(seconds[CONVENTIONAL])
    results = {
        name: {
            "seconds_an_epoch": statistics.median(runs),
            "ratio": statistics.median(runs) / base,
            "rounds": runs,
            **(vars(kernels[name]) if name in kernels else {}),
        }
        for name, runs in seconds.items()
    }
    return {
        "time": log.utc_now(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tensorflow", "keras", "numpy")},
        "epochs_a_run": epochs,
        "results": results,
    }


def _table(document: dict[str, Any]) -> str:
    rows = ["", f"{'':<22}{'s an epoch':>11}{'ratio':>8}{'in oneDNN':>11}{'summed':>9}"]
    for name, result in document["results"].items():
        title = name if name == CONVENTIONAL else f"this job, {name}"
        kernels = (
            f"{result['covered']:>11.1%}{result['summed']:>9.1%}" if "covered" in result else ""
        )
        rows.append(
            f"{title:<22}{result['seconds_an_epoch']:>11.2f}{result['ratio']:>8.3f}{kernels}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
