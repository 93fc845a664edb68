"""Measure the stages of a short run: its start, its first steps and its end.

Each run is the program as a user starts it, on the real data, for two epochs of 60 steps. One
execution is 15 steps. With --baseline, another checkout of this project runs in turn with this one,
with the same Python.

The program is not instrumented. A stage ends when the program has

1. ``command line``: recorded its attempt in run.json; options and output folder are valid.
2. ``TensorFlow, devices, data``: logged ``start``; the network is built, but nothing is computed.
3. ``first 15 steps, compiled``: computed the loss of these steps. Earlier versions log no event for
   this, so it is calculated back from ``epoch``: minus the epoch's time outside of training, and
   minus the other steps at the second epoch's speed. The result is 0.01 s late, because the epoch's
   lines are written in between.
4. ``105 steps more, validation``: computed the loss of the last step, which is the time of the last
   event before the second ``epoch`` plus that epoch's ``seconds``.
5. ``validation, checkpoints``: logged ``epoch`` and the last ``checkpoint``.
6. ``saved model evaluated``: logged ``evaluation`` of the model that was saved and loaded.
7. ``report``: logged ``report``.
8. ``exit``: exited.

The clock starts before the process does. If a version does the work of a stage early, in parallel
with other work, the stage has zero length. Each figure is the median over interleaved rounds; the
picture shows the run of median length.
"""

import statistics
from collections.abc import Iterable
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path

import click

from tests.benchmarks.harness import (
    REPOSITORY,
    Record,
    Training,
    interleave,
    json_lines,
    options,
    table,
    train,
    write_results,
)

OPTIONS = "--limit 15360 --epochs 2"
LATER_STEPS = 45 / 60  # fraction of an epoch's steps after its first execution
START = ("command line", "TensorFlow, devices, data", "first 15 steps, compiled")
MIDDLE = ("105 steps more, validation",)
END = ("validation, checkpoints", "saved model evaluated", "report", "exit")
TOTALS = {
    "process start to the end of the first steps": START,
    "last step to exit": END,
    "whole run": START + MIDDLE + END,
}
STAGES = TOTALS["whole run"]


@click.command()
@options
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Another checkout of this project to compare with.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw stacked bars into this PNG file.",
)
def main(
    data_dir: Path, output_dir: Path, rounds: int, baseline: Path | None, picture: Path | None
) -> None:
    """Print a table and write bench_start.json."""
    checkouts = {"this checkout": REPOSITORY}
    if baseline:
        if not (baseline / "job" / "__main__.py").is_file():
            raise click.BadParameter(
                f"received {baseline}, expected a checkout of this project, with job/; pass "
                f"the folder of a git clone or worktree",
                param_hint="--baseline",
            )
        checkouts = {"baseline": baseline, **checkouts}
    runs = interleave(
        rounds,
        checkouts,
        lambda name: train(data_dir, OPTIONS, checkout=checkouts[name]),
        lambda name, run: f"{name:<14} {run.ended - run.began:6.2f} s from start to exit",
    )
    results = {f"{name} ({_commit(own[0])})": _summary(own) for name, own in runs.items()}
    write_results(output_dir, "bench_start", {"options": OPTIONS, "results": results})
    click.echo(f"\n{_table(results)}")
    if picture:
        _draw(results, picture)


def stages_of(run: Training) -> dict[str, float]:
    """Compute the seconds of each stage of a run.

    Raises:
        ClickException: If an event that ends a stage is missing from its log.
    """
    events = json_lines(run.lines)
    names = ("start", "epoch", "checkpoint", "evaluation", "report")
    if missing := {*names} - {event["event"] for event in events}:
        raise click.ClickException(f"a run logged no event {', '.join(sorted(missing))}")
    last = {event["event"]: _time(event["time"]) for event in events}
    first, second = (event for event in events if event["event"] == "epoch")
    before_second = events[events.index(second) - 1]
    moments = (
        run.began,
        _time(run.manifest["attempts"][0]["start"]),
        last["start"],
        _time(first["time"])
        - (first["elapsed_seconds"] - first["seconds"])
        - LATER_STEPS * second["seconds"],
        _time(before_second["time"]) + second["seconds"],
        max(last["epoch"], last["checkpoint"]),
        last["evaluation"],
        last["report"],
        run.ended,
    )
    reached = accumulate(moments, max)
    lengths = (end - begin for begin, end in pairwise(reached))
    return dict(zip(STAGES, lengths, strict=True))


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _commit(run: Training) -> str:
    return (run.manifest["git_commit"] or "no commit")[:9]


def _summary(runs: Iterable[Training]) -> Record:
    """Compute the medians of stages and totals; keep the stages of each round."""
    rounds = [stages_of(run) for run in runs]
    parts = {**{stage: (stage,) for stage in STAGES}, **TOTALS}
    medians = {
        name: statistics.median(sum(stages[stage] for stage in part) for stages in rounds)
        for name, part in parts.items()
    }
    return {"seconds": medians, "rounds": rounds}


def _table(results: dict[str, Record]) -> str:
    sides = [result["seconds"] for result in results.values()]
    rows = []
    for name in (*STAGES, *TOTALS):
        seconds = [side[name] for side in sides]
        ratio = [f"{seconds[1] / seconds[0]:.2f}"] if len(sides) > 1 else []
        rows.append((name, *(f"{value:.2f}" for value in seconds), *ratio))
    return table(("seconds", *results, *(["ratio"] if len(sides) > 1 else [])), rows)


def middle_run(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Select the run of median length. Unlike medians of stages, its stages add up to a run."""
    ordered = sorted(rounds, key=lambda stages: sum(stages.values()))
    return ordered[len(ordered) // 2]


def _draw(results: dict[str, Record], path: Path) -> None:
    """Draw the stages of each side's middle run as a stacked bar."""
    from job.report.pictures import GREY, PALETTE, SCREEN_DPI, Figure, save_png

    *colours, black = PALETTE
    figure = Figure(figsize=(9, 1.9 + 0.6 * len(results)), layout="constrained")
    axes = figure.subplots()
    names = [name.replace(" (", "\n(") for name in results]
    sides = [middle_run(result["rounds"]) for result in results.values()]
    longest = max(sum(side.values()) for side in sides)
    left = [0.0 for _ in sides]
    for stage, colour in zip(STAGES, (*colours, GREY, black), strict=True):
        widths = [side[stage] for side in sides]
        bars = axes.barh(names, widths, 0.6, left, color=colour, edgecolor="white", label=stage)
        axes.bar_label(
            bars,
            [f"{width:.1f}" if width > 0.04 * longest else "" for width in widths],
            label_type="center",
            color="white" if colour == GREY else "black",
        )
        left = [bar.get_x() + bar.get_width() for bar in bars]
    axes.bar_label(bars, [f"{end:.1f} s" for end in left], padding=4, weight="bold")
    axes.set(title="A run of two epochs of 60 steps, from start to exit", xlabel="Seconds")
    axes.set_xlim(0, 1.08 * longest)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4)
    save_png(figure, path, SCREEN_DPI)


if __name__ == "__main__":
    main()
