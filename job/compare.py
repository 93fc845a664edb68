"""Several runs side by side: statistics over those of like settings, as tables and a picture."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config import UserError
from job.output import OutputDir
from job.own_picture import mark_as_own
from job.runs import SETTINGS, Run, read_run, run_folders
from job.terminal import printable


@dataclass(frozen=True)
class Summary:
    """Statistics of one figure over runs.

    Attributes:
        mean: Arithmetic mean.
        deviation: Sample standard deviation, with n - 1; None for one run.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarize at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation)

    def document(self) -> dict[str, float | None]:
        """These statistics as a JSON object."""
        return {"mean": self.mean, "standard_deviation": self.deviation}


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in nothing but their seed.

    Attributes:
        label: Names their settings as far as other runs have other ones.
        runs: At least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def accuracy(self) -> Summary:
        """Of the saved models."""
        return Summary.of([run.accuracy for run in self.runs if run.accuracy is not None])

    @property
    def last_mean(self) -> Summary:
        """Of the runs' mean validation accuracy in the last five epochs."""
        return Summary.of([run.last_mean for run in self.runs if run.last_mean is not None])

    @property
    def elapsed_seconds(self) -> float:
        """Mean time of a run."""
        return statistics.fmean(run.elapsed_seconds for run in self.runs)

    @property
    def repeats(self) -> int:
        """How many runs repeat the seed of another one."""
        return len(self.runs) - len({run.seed for run in self.runs})

    @property
    def best(self) -> Run:
        """The run whose saved model is the most accurate, the first among equals."""
        return max(self.runs, key=lambda run: run.accuracy or 0.0)


@dataclass(frozen=True)
class Comparison:
    """Runs and their groups.

    Attributes:
        runs: Every run of which it can be told which it is, by settings and seed.
        groups: The finished ones among them, by settings.
        varying: Names of the settings that tell them apart.
        left_out: For each folder whose run is in no group the reason.
    """

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    varying: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def common(self) -> list[str]:
        """Names of the settings that are the same in every run."""
        return [name for name in SETTINGS if len({run.settings[name] for run in self.runs}) == 1]

    def document(self) -> dict[str, Any]:
        """This comparison as a JSON object; the README documents it."""
        return {
            "runs": [_run_document(run) for run in self.runs],
            "groups": [_group_document(group) for group in self.groups],
            "left_out": [{"folder": name, "reason": why} for name, why in self.left_out.items()],
        }


def compare_runs(folders: Iterable[str]) -> Comparison:
    """Read runs, and group those that differ in nothing but their seed.

    Args:
        folders: Output folders of runs, and folders that have such in them.

    Raises:
        UserError: If none of them holds a finished run.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    for folder in run_folders(folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out[folder] = str(error)
    runs = _without_copies(runs, left_out)
    left_out |= {run.folder: run.problem for run in runs if run.problem}
    runs.sort(key=lambda run: (_order(run), run.seed))
    varying = tuple(name for name in SETTINGS if _tells_apart(runs, name))
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if not run.problem:
            alike.setdefault(tuple(run.settings.values()), []).append(run)
    if not alike:
        reasons = "; ".join(
            f"{printable(name)}: {printable(why)}" for name, why in left_out.items()
        )
        raise UserError(f"received no folder of a finished run ({reasons}); name some")
    groups = tuple(Group(_label(same[0], varying), tuple(same)) for same in alike.values())
    return Comparison(tuple(runs), groups, varying, left_out)


def _without_copies(runs: list[Run], left_out: dict[str, str]) -> list[Run]:
    """The runs without finished ones that are there again; `left_out` is told of these."""
    originals: dict[Any, Run] = {}
    for run in runs:
        if not run.problem and originals.setdefault(run.identity, run) is not run:
            left_out[run.folder] = f"a copy of {originals[run.identity].folder}"
    return [run for run in runs if run.folder not in left_out]


def _tells_apart(runs: Sequence[Run], name: str) -> bool:
    """Whether runs differ in a setting.

    Another learning rate, for one, is another recipe's fingerprint too: that one is worth a word
    only where nothing else tells.
    """
    values: dict[tuple[Any, ...], set[Any]] = {}
    for run in runs:
        others = [run.settings[other] for other in SETTINGS if other != name]
        key = tuple(others) if name == "recipe_fingerprint" else ()
        values.setdefault(key, set()).add(run.settings[name])
    return any(len(one) > 1 for one in values.values())


def _order(run: Run) -> list[tuple[bool, bool, Any]]:
    # None before numbers before texts.
    return [(value is not None, isinstance(value, str), value) for value in run.settings.values()]


def _label(run: Run, varying: Sequence[str]) -> str:
    names = [name for name in varying if name != "recipe"]
    return ", ".join([setting(run, "recipe"), *named(run, names)])


def named(run: Run, names: Iterable[str]) -> list[str]:
    """Settings with their names, in words."""
    return [f"{title(name)} {value}" for name in names if (value := setting(run, name))]


def setting(run: Run, name: str) -> str:
    """A setting in words; empty where there is none, as synthetic images have no data."""
    value = run.settings[name]
    if value is None:
        return "all" if name == "limit" else ""
    return printable(str(value))


def title(name: str) -> str:
    """A setting's name in words."""
    return name.replace("_", " ")


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
        "val_accuracy_last_five": group.last_mean.document(),
        "accuracy": group.accuracy.document(),
        "best": {"folder": best.folder, "seed": best.seed, "accuracy": best.accuracy},
        "elapsed_seconds": group.elapsed_seconds,
    }


def save_picture(png: Path, comparison: Comparison) -> None:
    """Draw the runs' validation curves and their models' accuracies.

    Args:
        png: The file, in a folder that there is.
        comparison: What to draw of it is its groups.

    Raises:
        UserError: If it cannot be written.
    """
    from job import plots  # matplotlib takes a second

    with OutputDir(png.parent).replacing(png.name) as temporary:
        plots.save_comparison(temporary, comparison.groups)
        mark_as_own(temporary)
