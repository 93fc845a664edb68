"""The tables of a comparison of runs."""

from collections.abc import Sequence

from job.compare import Comparison, Group, named, setting, title
from job.quantities import percent, whole_seconds
from job.runs import Run
from job.terminal import write_lines, write_table


def write_tables(comparison: Comparison) -> None:
    """Write a table of the runs and one of their groups to stdout.

    Raises:
        UserError: If it cannot be written.
    """
    varying = comparison.varying
    common = named(comparison.runs[0], comparison.common)
    titles = [title(name) for name in varying]
    write_lines([f"Every run: {', '.join(common)}", ""])
    write_table(
        ["run", *titles, "seed", "last", "last five", "model", "loss", "time", "outcome"],
        [_run_row(run, varying) for run in comparison.runs],
        left=("run", *titles, "outcome"),
    )
    write_lines(["", "Means over the finished runs that differ in nothing but their seed:"])
    figures = ("last five", "±", "model", "±", "best", "seed", "time")
    write_table(
        [*titles, "runs", "seeds", *figures, "best run"],
        [_group_row(group, varying) for group in comparison.groups],
        left=(*titles, "best run"),
    )
    if any(group.repeats for group in comparison.groups):
        write_lines(
            [
                "",
                "More runs than seeds: a seed was repeated. Such runs may be equal to the last "
                "bit, so that ± is less than between seeds.",
            ]
        )


def _run_row(run: Run, varying: Sequence[str]) -> list[str]:
    return [
        run.folder,
        *(setting(run, name) for name in varying),
        str(run.seed),
        percent(run.last),
        percent(run.last_mean),
        percent(run.accuracy),
        "" if run.loss is None else f"{run.loss:.4f}",
        whole_seconds(run.elapsed_seconds),
        run.outcome if run.outcome == "done" else f"{run.outcome}, {len(run.curve)} epochs",
    ]


def _group_row(group: Group, varying: Sequence[str]) -> list[str]:
    best, last_mean, accuracy = group.best, group.last_mean, group.accuracy
    return [
        *(setting(best, name) for name in varying),
        str(len(group.runs)),
        str(len({run.seed for run in group.runs})),
        percent(last_mean.mean),
        percent(last_mean.deviation),
        percent(accuracy.mean),
        percent(accuracy.deviation),
        percent(best.accuracy),
        str(best.seed),
        whole_seconds(group.elapsed_seconds),
        best.folder,
    ]
