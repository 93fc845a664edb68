"""The report's tables, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.manifest import DETAILS
from job.report_figures import list_mistakes
from job.run_record import RunRecord

_PRECISIONS: dict[str | None, str] = {
    "float32": "float32, numbers of 32 bits",
    "bfloat16": "bfloat16, numbers of 16 bits with the range of float32; weights and last layer "
    "stay float32",
}


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: The cells of each row.
        kind: "numbers", or a class of the style sheet.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "numbers"


def epochs(record: RunRecord) -> Table:
    """What training and validation came to in each epoch."""
    return Table(
        "Every epoch: training and validation",
        *(
            ("Epoch", "Loss", "Accuracy", "Val. loss", "Val. accuracy", "Seconds", "Images/s"),
            [
                (
                    *(str(line["epoch"]), f"{line['loss']:.4f}", f"{line['accuracy']:.2%}"),
                    *(f"{line['val_loss']:.4f}", f"{line['val_accuracy']:.2%}"),
                    *(f"{line['seconds']:.2f}", f"{line['images_per_second']:,.0f}"),
                )
                for line in record.epochs
            ],
        ),
    )


def confusion(record: RunRecord) -> Table:
    """The confusion matrix."""
    names = record.class_names
    rows = record.evaluation.get("confusion_matrix", [])
    return Table(
        "Test images: a row for each true class, a column for each predicted one",
        ("True class", *names),
        [(name, *map(str, row)) for name, row in zip(names, rows, strict=True)],
    )


def classes(record: RunRecord) -> Table:
    """Precision, recall and support of each class."""

    def share(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.1%}"

    return Table(
        "Precision and recall of each class, and its test images",
        ("Class", "Precision", "Recall", "Images"),
        [
            (name, share(one["precision"]), share(one["recall"]), f"{one['support']:,}")
            for name, one in record.evaluation.get("classes", {}).items()
        ],
    )


def mistakes(record: RunRecord) -> Table:
    """The most confident mistakes; no rows where there is none or they are not known."""
    listed = list_mistakes(record.predictions, record.class_names) if record.predictions else []
    return Table(
        "The most confident mistakes; test images are numbered from 0",
        ("Test image", "Is", "Taken for", "Probability"),
        [(str(row), true, wrong, f"{value:.2%}") for row, true, wrong, value in listed],
    )


def attempts(record: RunRecord) -> Table:
    """The attempts at the run."""
    return Table(
        "Every attempt at this run; times are UTC",
        ("Start", "End", "Outcome", "Steps", "Host", "Reason and changes"),
        [
            (
                *(moment(one["start"]), moment(one["end"]), one["outcome"]),
                "none"
                if one["first_step"] is None
                else f"{one['first_step']} to {one['last_step']}",
                *(one["host"], "; ".join([*filter(None, [one["reason"]]), *one["changes"]])),
            )
            for one in record.manifest.get("attempts", [])
        ],
        kind="attempts",
    )


def facts(manifest: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Tables of names and values: heading, caption and rows of each."""
    if not manifest:
        return []
    elsewhere = ("devices", "data", "recipe_fingerprint")
    computed = {name: manifest.get(name) for name in DETAILS if name not in elsewhere}
    precision = computed["precision"]
    computed["precision"] = _PRECISIONS.get(precision, precision)
    for number, device in enumerate(manifest.get("devices") or [], 1):
        computed[f"device {number}"] = ", ".join(_described(*item) for item in device.items())
    options = {f"--{name.replace('_', '-')}": value for name, value in manifest["config"].items()}
    versions = manifest["versions"] | {
        name: manifest.get(name) for name in ("git_commit", "recipe_fingerprint")
    }
    return [
        ("Configuration", "Every option of train", _rows(options)),
        ("Devices", "What it was computed on, and what auto came to", _rows(computed)),
        ("Data", "The data set, with SHA-256 of its content", _rows(manifest.get("data") or {})),
        ("Versions", "Of the job and of what decides its numbers", _rows(versions)),
    ]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(_words(name), _value(value)) for name, value in values.items()]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _described(name: str, value: Any) -> str:
    unit = " GiB" if name.endswith("_gib") else ""
    return f"{_words(name.removesuffix('_gib'))} {_value(value)}{unit}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def moment(text: str | None) -> str:
    """From ISO 8601 as in run.json to what people read: 2026-01-31 12:00:00."""
    return text[:19].replace("T", " ") if text else "not known"
