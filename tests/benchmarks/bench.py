"""Compare the speed of this job and the conventional Keras script, and profile this job.

The result of a run is its fastest epoch after the first. Each figure is the median over
interleaved rounds.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from tests.benchmarks.harness import (
    Record,
    interleave,
    json_lines,
    options,
    run_python,
    table,
    train,
    write_results,
)

JOB_PRECISIONS = ("float32", "auto")
CONVENTIONAL = "conventional"


@dataclass(frozen=True)
class Kernels:
    """Share of oneDNN's kernels in the training time of an epoch.

    Attributes:
        covered: Fraction of the time in which at least one kernel was running.
        summed: Sum of the kernels' durations as a fraction of the time; above 1 if they overlap.
    """

    covered: float
    summed: float


@click.command()
@options
@click.option("--epochs", type=click.IntRange(min=2), default=3, show_default=True)
def main(data_dir: Path, output_dir: Path, rounds: int, epochs: int) -> None:
    """Print a table and write bench.json."""
    seconds = interleave(
        rounds,
        (CONVENTIONAL, *JOB_PRECISIONS),
        lambda name: _fastest_epoch(name, data_dir, epochs),
        lambda name, result: f"{name:<14} {result:7.2f} s per epoch",
    )
    kernels = {name: _measure_kernels(name, data_dir) for name in JOB_PRECISIONS}
    results = _results(seconds, kernels)
    write_results(output_dir, "bench", {"epochs_a_run": epochs, "results": results})
    click.echo(f"\n{_table(results)}")


def _fastest_epoch(name: str, data_dir: Path, epochs: int) -> float:
    """Seconds of the fastest training epoch after the first, without validation."""
    if name == CONVENTIONAL:
        lines = run_python([Path(__file__).with_name("conventional.py"), data_dir, epochs])
    else:
        lines = train(data_dir, f"--epochs {epochs} --precision {name}").lines
    return min(float(record["seconds"]) for record in _epochs(lines)[1:])


def _epochs(lines: Iterable[str]) -> list[Record]:
    return [record for record in json_lines(lines) if "epoch" in record]


def _measure_kernels(precision: str, data_dir: Path) -> Kernels:
    """Time oneDNN's kernels over the training part of a run's second epoch.

    Each kernel prints a line when it ends. Printing takes time itself, so the shares are
    underestimated.
    """
    env = {"ONEDNN_VERBOSE": "profile_exec", "ONEDNN_VERBOSE_TIMESTAMP": "1"}
    lines = train(data_dir, f"--epochs 2 --precision {precision}", env=env).lines
    first, second = _epochs(lines)
    start = datetime.fromisoformat(first["time"]).timestamp() * 1e3
    end = start + second["seconds"] * 1e3
    spans = []
    for line in lines:
        fields = line.split(",")
        if fields[0] == "onednn_verbose" and fields[3:5] == ["primitive", "exec"]:
            begin, duration = float(fields[2]), float(fields[-1])
            spans.append((max(begin, start), min(begin + duration, end)))
    return kernels_in(spans, start, end)


def kernels_in(spans: Iterable[tuple[float, float]], start: float, end: float) -> Kernels:
    """Compute the share of kernels, given as (begin, end) spans, between two times.

    Spans outside of these times do not count.
    """
    covered, summed, reached = 0.0, 0.0, start
    for begin, finish in sorted(span for span in spans if span[0] < span[1]):
        summed += finish - begin
        covered += max(finish - max(begin, reached), 0.0)
        reached = max(reached, finish)
    return Kernels(covered / (end - start), summed / (end - start))


def _results(seconds: dict[str, list[float]], kernels: dict[str, Kernels]) -> dict[str, Record]:
    base = statistics.median(seconds[CONVENTIONAL])
    return {
        name: {
            "seconds_an_epoch": statistics.median(runs),
            "ratio": statistics.median(runs) / base,
            "rounds": runs,
            **(vars(kernels[name]) if name in kernels else {}),
        }
        for name, runs in seconds.items()
    }


def _table(results: dict[str, Record]) -> str:
    return table(
        ("", "s per epoch", "ratio", "in oneDNN", "summed"),
        [
            (
                name if name == CONVENTIONAL else f"this job, {name}",
                f"{result['seconds_an_epoch']:.2f}",
                f"{result['ratio']:.3f}",
                *(f"{result[key]:.1%}" if key in result else "" for key in ("covered", "summed")),
            )
            for name, result in results.items()
        ],
    )


if __name__ == "__main__":
    main()
