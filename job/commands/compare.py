"""Comparison of runs: statistics over runs with equal settings, as tables and a picture."""

import json
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from job.commands.terminal import print_message, printable, write_lines, write_table
from job.config import TrainConfig, UserError, Value, describe_config, run_options
from job.log import plural
from job.report.pictures import PALETTE, SCREEN_DPI, Axes, Figure, lay_out_epochs, save_png
from job.run.folder import EVALUATION, METRICS, RUN, OutputDir
from job.run.record import Manifest, RunRecord

SETTINGS = (
    *(name for name in run_options(TrainConfig()) if name != "seed"),
    *("epochs", "precision", "replicas", "data", "recipe_fingerprint"),
)
"""The settings that determine a run's result, apart from its seed: the options that all of its
attempts share, the number of epochs, the precision, the number of replicas (each normalizes its own
rows of a batch), and the first digits of the fingerprints of its data and its recipe."""

_LAST = 5


@dataclass(frozen=True)
class Run:
    """A run as read from its output folder.

    Attributes:
        folder: Path of the output folder.
        seed: The run's seed.
        settings: The values of `SETTINGS`.
        curve: Validation accuracy after each epoch so far, 0 to 1.
        accuracy: Accuracy of the saved model on the test set, 0 to 1; None before the end.
        loss: Loss of the saved model on the test set; None before the end.
        elapsed_seconds: Time in training and validation.
        outcome: As in ``run.json``.
        problem: Why the run cannot be compared; None if it can.
    """

    folder: str
    seed: int
    settings: dict[str, Value]
    curve: tuple[float, ...]
    accuracy: float | None
    loss: float | None
    elapsed_seconds: float
    outcome: str
    problem: str | None

    @property
    def last(self) -> float | None:
        """Validation accuracy after the last epoch."""
        return self.curve[-1] if self.curve else None

    @property
    def last_mean(self) -> float | None:
        """Mean validation accuracy of the last five epochs, or of all if there are fewer."""
        return statistics.fmean(self.curve[-_LAST:]) if self.curve else None


def run_folders(folders: Iterable[str]) -> list[str]:
    """Find the output folders of runs, without duplicates.

    Args:
        folders: Output folders, and folders that contain output folders, such as the folder of a
            sweep. A folder can be both, if a sweep was started in the folder of a single run.

    Returns:
        The output folders. A given folder without any run is included unchanged.
    """
    found: dict[str, str] = {}
    for folder in folders:
        itself = [folder] if _contains_run(folder) else []
        for path in [*itself, *_runs_in(folder)] or [folder]:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _runs_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (a `Path` drops a leading ./)
    except OSError:
        return []  # the error is reported when the folder is read as a run
    return [path for name in names if _contains_run(path := str(Path(folder, name)))]


def _contains_run(folder: str) -> bool:
    return os.path.exists(Path(folder, RUN))  # noqa: PTH110 (no error for an invalid name)


def read_run(folder: str) -> Run:
    """Read a run from its folder.

    Raises:
        UserError: If the folder contains no run, or damaged files.
    """
    if not _contains_run(folder):
        exists = os.path.isdir(folder)  # noqa: PTH112 (no error for an invalid name)
        raise UserError(
            f"neither this folder nor a folder in it contains a {RUN}"
            if exists
            else "this folder does not exist"
        )
    record = RunRecord.load(Path(folder), with_predictions=False)
    manifest = record.manifest
    if manifest is None:
        raise UserError(f"its {RUN} was removed while it was read")
    problem = _problem(record, manifest)
    finished = record.evaluation if problem is None else None
    return Run(
        folder=folder,
        seed=manifest.config.seed,
        settings=_settings(manifest),
        curve=tuple(line.val_accuracy for line in record.epochs),
        accuracy=finished.accuracy if finished else None,
        loss=finished.loss if finished else None,
        elapsed_seconds=manifest.elapsed_seconds,
        outcome=manifest.outcome,
        problem=problem,
    )


def _settings(manifest: Manifest) -> dict[str, Value]:
    # Synthetic images depend only on the seed, which distinguishes the runs already.
    synthetic = manifest.config.dataset == "synthetic"
    fingerprint = manifest.data.fingerprint if manifest.data and not synthetic else None
    known = {
        **describe_config(manifest.config),
        "precision": manifest.precision,
        "replicas": manifest.replicas,
        "data": fingerprint and fingerprint[:8],
        # Missing in files of earlier versions.
        "recipe_fingerprint": (manifest.recipe_fingerprint or "")[:8] or None,
    }
    return {name: known[name] for name in SETTINGS}


def _problem(record: RunRecord, manifest: Manifest) -> str | None:
    """Return why a run cannot be compared; None if it can."""
    epochs, expected = len(record.epochs), manifest.config.epochs
    if manifest.outcome != "done":
        return f"{manifest.outcome} after {epochs} of {plural(expected, 'epoch')}"
    if epochs != expected:
        return f"its {METRICS} has {plural(epochs, 'line')}, expected {expected}"
    return None if record.evaluation else f"it contains no {EVALUATION}"


class Summary(NamedTuple):
    """Arithmetic mean and sample standard deviation (n - 1), which is None for a single run."""

    mean: float
    standard_deviation: float | None


def summarize(values: Iterable[float | None]) -> Summary:
    """Summarize the values that are not None; there must be at least one."""
    known = [value for value in values if value is not None]
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Finished runs that differ only in their seed.

    Attributes:
        label: The recipe and the settings that differ between groups.
        runs: At least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def accuracy(self) -> Summary:
        """Test accuracy of the saved models."""
        return summarize(run.accuracy for run in self.runs)

    @property
    def last_mean(self) -> Summary:
        """Mean validation accuracy of each run over its last five epochs."""
        return summarize(run.last_mean for run in self.runs)

    @property
    def elapsed_seconds(self) -> float:
        """Mean time of a run."""
        return statistics.fmean(run.elapsed_seconds for run in self.runs)

    @property
    def best(self) -> Run:
        """The run with the most accurate saved model; the first one if there are several."""
        return max(self.runs, key=lambda run: run.accuracy or 0.0)


@dataclass(frozen=True)
class Comparison:
    """Runs and their groups.

    Attributes:
        runs: All runs that could be read, sorted by settings and seed.
        groups: The finished runs, grouped by settings.
        varying: Names of the settings in which the runs differ.
        left_out: The reason for each folder whose run is not in a group.
    """

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    varying: tuple[str, ...]
    left_out: dict[str, str]


def compare_runs(folders: Iterable[str]) -> Comparison:
    """Read runs, and group those that differ only in their seed.

    Args:
        folders: Output folders of runs, and folders that contain output folders.

    Raises:
        UserError: If none of them contains a finished run.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    for folder in run_folders(folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out[folder] = str(error)
    left_out |= {run.folder: run.problem for run in runs if run.problem}
    runs.sort(key=lambda run: (_order(run), run.seed))
    varying = tuple(name for name in SETTINGS if len({run.settings[name] for run in runs}) > 1)
    by_settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if not run.problem:
            by_settings.setdefault(tuple(run.settings.values()), []).append(run)
    if not by_settings:
        reasons = "; ".join(
            f"{printable(name)}: {printable(why)}" for name, why in left_out.items()
        )
        raise UserError(
            f"received no folder with a finished run ({reasons}), expected at least one; pass the "
            f"output folders of finished runs"
        )
    groups = tuple(Group(_label(same[0], varying), tuple(same)) for same in by_settings.values())
    return Comparison(tuple(runs), groups, varying, left_out)


def _order(run: Run) -> list[tuple[bool, bool, Any]]:
    # None sorts before numbers, and numbers before strings.
    return [(value is not None, isinstance(value, str), value) for value in run.settings.values()]


def _label(run: Run, varying: Sequence[str]) -> str:
    names = [name for name in varying if name != "recipe"]
    return ", ".join([setting(run, "recipe"), *named(run, names)])


def named(run: Run, names: Iterable[str]) -> list[str]:
    """Format settings with their names."""
    return [f"{name.replace('_', ' ')} {value}" for name in names if (value := setting(run, name))]


def setting(run: Run, name: str) -> str:
    """Format a setting; empty if it has no value, such as the data of synthetic images."""
    value = run.settings[name]
    if value is None:
        return "all" if name == "limit" else ""
    return printable(str(value))


def _run_document(run: Run) -> dict[str, Any]:
    return {
        "folder": run.folder,
        "seed": run.seed,
        **run.settings,
        "epochs_done": len(run.curve),
        "val_accuracy": run.last,
        "val_accuracy_last_five": run.last_mean,
        "accuracy": run.accuracy,
        "loss": run.loss,
        "elapsed_seconds": run.elapsed_seconds,
        "outcome": run.outcome,
    }


def _group_document(group: Group) -> dict[str, Any]:
    best = group.best
    return {
        **group.runs[0].settings,
        "runs": len(group.runs),
        "seeds": [run.seed for run in group.runs],
        "val_accuracy_last_five": group.last_mean._asdict(),
        "accuracy": group.accuracy._asdict(),
        "best": {"folder": best.folder, "seed": best.seed, "accuracy": best.accuracy},
        "elapsed_seconds": group.elapsed_seconds,
    }


def print_comparison(folders: Iterable[str], *, as_json: bool, png: Path | None) -> None:
    """Compare runs: write tables or JSON to stdout, excluded runs to stderr, and draw a picture.

    Raises:
        UserError: If no folder contains a finished run, or if an output cannot be written.
    """
    comparison = compare_runs(folders)
    left_out = comparison.left_out
    if as_json:
        document = {  # docs/compare.md documents it
            "runs": [_run_document(run) for run in comparison.runs],
            "groups": [_group_document(group) for group in comparison.groups],
            "left_out": [{"folder": folder, "reason": why} for folder, why in left_out.items()],
        }
        write_lines([json.dumps(document, indent=2)])
    else:
        write_tables(comparison)
    for folder, reason in left_out.items():
        print_message(f"excluded: {printable(folder)}: {printable(reason)}")
    if png:
        with OutputDir(png.parent).atomic_write(png.name) as temporary:
            save_comparison(temporary, comparison.groups)


def write_tables(comparison: Comparison) -> None:
    """Write a table of the runs and a table of the groups to stdout.

    Raises:
        UserError: If stdout cannot be written.
    """
    varying = comparison.varying
    common = named(comparison.runs[0], [name for name in SETTINGS if name not in varying])
    titles = [name.replace("_", " ") for name in varying]
    write_lines([f"All runs: {', '.join(common)}", ""])
    write_table(
        ["run", *titles, "seed", "last", "last five", "model", "loss", "time", "outcome"],
        [_run_row(run, varying) for run in comparison.runs],
        left=("run", *titles, "outcome"),
    )
    write_lines(["", "Means over finished runs that differ only in their seed:"])
    figures = ("last five", "±", "model", "±", "best", "seed", "time")
    write_table(
        [*titles, "runs", "seeds", *figures, "best run"],
        [_group_row(group, varying) for group in comparison.groups],
        left=(*titles, "best run"),
    )


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.2%}"


def _run_row(run: Run, varying: Sequence[str]) -> list[str]:
    return [
        run.folder,
        *(setting(run, name) for name in varying),
        str(run.seed),
        _percent(run.last),
        _percent(run.last_mean),
        _percent(run.accuracy),
        "" if run.loss is None else f"{run.loss:.4f}",
        f"{run.elapsed_seconds:,.0f} s",
        run.outcome
        if run.outcome == "done"
        else f"{run.outcome}, {plural(len(run.curve), 'epoch')}",
    ]


def _group_row(group: Group, varying: Sequence[str]) -> list[str]:
    best, last_mean, accuracy = group.best, group.last_mean, group.accuracy
    return [
        *(setting(best, name) for name in varying),
        str(len(group.runs)),
        str(len({run.seed for run in group.runs})),
        _percent(last_mean.mean),
        _percent(last_mean.standard_deviation),
        _percent(accuracy.mean),
        _percent(accuracy.standard_deviation),
        _percent(best.accuracy),
        str(best.seed),
        f"{group.elapsed_seconds:,.0f} s",
        best.folder,
    ]


# Line styles and markers distinguish the groups in greyscale. The combinations of seven colours,
# five line styles and six markers repeat only after 210 groups.
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LEGEND_COLUMNS = 130
_BELOW: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9}


def save_comparison(path: Path, groups: Sequence[Group]) -> None:
    """Draw the runs' validation accuracies by epoch, and the accuracies of their saved models.

    Args:
        path: PNG file to write.
        groups: At least one; the curves of a group have equal lengths.
    """
    names = [str(number + 1) if len(groups) > 1 else "" for number in range(len(groups))]
    legend = [_legend_text(*one) for one in zip(names, groups, strict=True)]
    lines = sum(text.count("\n") + 1 for text in legend)
    height = max(3.9, 1.6 + 0.5 * len(groups)) + 0.4 + 0.19 * lines
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    handles = []
    for number, group in enumerate(groups):
        colour = PALETTE[number % len(PALETTE)]
        line = _LINES[number % len(_LINES)]
        marker = _MARKERS[number % len(_MARKERS)]
        curves = np.array([run.curve for run in group.runs])
        mean = curves.mean(axis=0)
        epochs = np.arange(len(mean)) + 1
        for curve in curves:
            left.plot(epochs, 100 * curve, color=colour, linewidth=0.8, alpha=0.45)
        # The curve of a single epoch consists of its marker only.
        style: dict[str, Any] = {"linestyle": line, "linewidth": 2.2, "marker": marker}
        style |= {"markevery": max(1, len(mean) // 8), "clip_on": False}
        handles += left.plot(epochs, 100 * mean, color=colour, **style)
        _draw_accuracies(right, number, group, colour, marker)
    left.set_title("Validation accuracy of each run, and the mean")
    left.set_ylabel("Validation accuracy (%)")
    lay_out_epochs(left, max(len(group.runs[0].curve) for group in groups))
    left.grid(alpha=0.3)
    right.set_title("Saved model of each run")
    deviates = any(group.accuracy.standard_deviation is not None for group in groups)
    below = "\nbelow the points: mean ± standard deviation" if deviates else ""
    right.set_xlabel(f"Test accuracy (%){below}")
    right.set_yticks(range(len(groups)) if len(groups) > 1 else [])
    right.set_yticklabels(names if len(groups) > 1 else [], weight="bold")
    right.margins(x=0.15)  # for the text below a mean
    # Margins can extend below 0% or above 100%.
    right.set_xlim(*np.clip(right.get_xlim(), 0, 100))
    left.set_ylim(*np.clip(left.get_ylim(), 0, 100))
    right.set_ylim(len(groups) - 0.4, -0.6)
    right.grid(axis="x", alpha=0.3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    below_both = figure.legend(
        handles, legend, loc="outside lower center", fontsize=9, handlelength=4
    )
    for text in below_both.get_texts():
        text.set_parse_math(False)
    save_png(figure, path, SCREEN_DPI)


def _legend_text(name: str, group: Group) -> str:
    text = f"{group.label} ({plural(len(group.runs), 'run')})"
    return textwrap.fill(
        f"{name}: {text}" if name else text, _LEGEND_COLUMNS, break_on_hyphens=False
    )


def _draw_accuracies(axis: Axes, row: int, group: Group, colour: str, marker: str) -> None:
    """Draw runs as points, and below them their mean with the standard deviation."""
    values = [100 * run.accuracy for run in group.runs if run.accuracy is not None]
    axis.plot(
        values, np.full(len(values), row - 0.12), marker, color=colour, alpha=0.6, clip_on=False
    )
    if group.accuracy.standard_deviation is not None:
        mean, deviation = 100 * group.accuracy.mean, 100 * group.accuracy.standard_deviation
        axis.errorbar(mean, row + 0.12, xerr=deviation, fmt="|", color="black", capsize=4, ms=14)
        text = f"{mean:.2f} ± {deviation:.2f}"
        axis.annotate(text, (mean, row + 0.12), (0, -9), textcoords="offset points", **_BELOW)
