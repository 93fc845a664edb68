"""The report of a run: a self-contained HTML page, and its pictures as files next to it."""

import base64
import shlex
import statistics
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from job import log
from job.config import RECIPE_OPTIONS, REMOVED, TrainConfig, describe_config, option_name
from job.environment import program
from job.log import plural
from job.report.figures import Figure, draw_figures, list_mistakes
from job.run.folder import PICTURES, REPORT, REPORT_PICTURES, OutputDir
from job.run.predictions import reliability
from job.run.record import Manifest, RunRecord

_PRECISIONS = {
    "float32": "float32 (32-bit numbers)",
    "bfloat16": "bfloat16 (16-bit numbers with the range of float32); weights and last layer "
    "stay float32",
}


def write_report(output: OutputDir) -> None:
    """Write the report of the run in an output folder, using only the files in the folder.

    Args:
        output: The folder, which receives the page and the pictures.

    Raises:
        UserError: If the folder contains no run, one of its files cannot be used, or a file cannot
            be written.
    """
    record = RunRecord.load(output.path)
    figures = draw_figures(record)
    output.make_folder(PICTURES)
    pictures = {f"{PICTURES}/{name}.png": figure.png for name, figure in figures.items()}
    for name, png in pictures.items():
        output.write_bytes(name, png)
    # Pictures of data that the folder no longer contains.
    output.remove([output.path / name for name in REPORT_PICTURES if name not in pictures])
    output.write_text(REPORT, render(record, figures))
    path = output.path / REPORT
    log.event("report", path=str(path), message=f"report in {path}")


def render(record: RunRecord, figures: dict[str, Figure]) -> str:
    """Render the page.

    It depends only on the run, so it is the same at any time and on any machine.

    Args:
        record: The run.
        figures: Its figures, by name.
    """
    environment = Environment(
        loader=PackageLoader("job", "report"),
        autoescape=True,  # paths, messages and names can contain anything
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    manifest, error = record.manifest, None
    if record.predictions:
        predicted = record.predictions
        error = reliability(predicted.labels, predicted.probabilities).expected_error
    config = manifest.config if manifest else TrainConfig()
    evaluated = ("output_dir", "data_dir", "dataset", "seed", "recipe")
    return environment.get_template("report.html.jinja").render(
        record=record,
        manifest=manifest,
        end=moment(manifest.end) if manifest else None,
        key_figures=_key_figures(record, error),
        calibration_error=error,
        figures={name: _embedded(figure) for name, figure in figures.items()},
        epochs=epoch_table(record),
        confusion=confusion_table(record),
        classes=class_table(record),
        mistakes=mistake_table(record),
        attempts=attempt_table(manifest),
        facts=facts(manifest) if manifest else [],
        evaluate=command_line("evaluate", config, *evaluated),
        resume=resume_command(config),
        rerun=rerun_command(config),
        removed=REMOVED,
    )


def command_line(command: str, config: TrainConfig, *names: str) -> str:
    """Return a shell command line that runs a command with a configuration.

    Args:
        command: Command of the program.
        config: Contains the values of the options.
        names: The options that the command accepts; by default all of them.

    Returns:
        The command with the output folder and every option whose value is not the default. If the
        recipe is not the default one, also every option for which a recipe can set a default.
    """
    values, usual = describe_config(config), describe_config(TrainConfig())
    always = {"output_dir"}
    if values["recipe"] != usual["recipe"]:
        always.update(RECIPE_OPTIONS)
    words = [command]
    for name in names or values:
        value = values[name]
        if value != usual[name] or name in always:
            words += [option_name(name)] if value is True else [option_name(name), str(value)]
    return f"{program()} {shlex.join(words)}"


def resume_command(config: TrainConfig) -> str:
    """The command that resumes a run in its folder."""
    # Without the options of a single attempt: --fresh would discard the run.
    return command_line("train", replace(config, fresh=False, stop_after=None))


def rerun_command(config: TrainConfig) -> str:
    """The command that repeats a run in a new folder."""
    folder = Path(f"{config.output_dir}-again")  # "." has no name to change
    again = replace(
        config, output_dir=folder, run_id=None, compile_cache=None, metrics_textfile=None
    )
    return resume_command(again)


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: Its caption.
        head: Names of the columns.
        rows: The cells of each row.
        kind: "numbers", or a class of the style sheet.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "numbers"


def epoch_table(record: RunRecord) -> Table:
    """Training and validation of each epoch."""
    return Table(
        "Training and validation in every epoch",
        ("Epoch", "Loss", "Accuracy", "Val. loss", "Val. accuracy", "Seconds", "Images/s"),
        [
            (
                *(str(line.epoch), f"{line.loss:.4f}", f"{line.accuracy:.2%}"),
                *(f"{line.val_loss:.4f}", f"{line.val_accuracy:.2%}"),
                *(f"{line.seconds:.2f}", f"{line.images_per_second:,.0f}"),
            )
            for line in record.epochs
        ],
    )


def confusion_table(record: RunRecord) -> Table:
    """The confusion matrix."""
    names = record.class_names
    rows = record.evaluation.confusion_matrix if record.evaluation else []
    return Table(
        "Number of test images: one row per true class, one column per predicted class",
        ("True class", *names),
        [(name, *map(str, row)) for name, row in zip(names, rows, strict=True)],
    )


def class_table(record: RunRecord) -> Table:
    """Precision, recall and support of each class."""

    def share(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.1%}"

    return Table(
        "Precision, recall and number of test images of each class",
        ("Class", "Precision", "Recall", "Images"),
        [
            (name, share(one.precision), share(one.recall), f"{one.support:,}")
            for name, one in (record.evaluation.classes if record.evaluation else {}).items()
        ],
    )


def mistake_table(record: RunRecord) -> Table:
    """The most confident mistakes; no rows if there are none or they are not known."""
    listed = list_mistakes(record.predictions, record.class_names) if record.predictions else []
    return Table(
        "The most confident mistakes; test images are numbered from 0",
        ("Test image", "True class", "Predicted class", "Probability"),
        [(str(row), true, wrong, f"{value:.2%}") for row, true, wrong, value in listed],
    )


def attempt_table(manifest: Manifest | None) -> Table:
    """The attempts of the run."""
    return Table(
        "Every attempt of this run; times are UTC",
        ("Start", "End", "Outcome", "Steps", "Host", "Reason and changes"),
        [
            (
                *(moment(one.start), moment(one.end), one.outcome),
                "none" if one.first_step is None else f"{one.first_step} to {one.last_step}",
                *(one.host, "; ".join([*filter(None, [one.reason]), *one.changes])),
            )
            for one in (manifest.attempts if manifest else ())
        ],
        kind="attempts",
    )


def facts(manifest: Manifest) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Tables of names and values: the heading, caption and rows of each."""
    options = {option_name(name): value for name, value in describe_config(manifest.config).items()}
    names = ("workers", "replicas", "threads", "precision", "xla", "deterministic")
    computed = {name: getattr(manifest, name) for name in names}
    computed["precision"] = _PRECISIONS.get(computed["precision"], computed["precision"])
    for number, device in enumerate(manifest.devices or (), 1):
        computed[f"device {number}"] = f"{device.name}, {device}"
    data = msgspec.structs.asdict(manifest.data) if manifest.data else {}
    versions = {
        **manifest.versions,
        "git_commit": manifest.git_commit,
        "recipe_fingerprint": manifest.recipe_fingerprint,
    }
    return [
        ("Configuration", "Every option of train", _rows(options)),
        ("Devices", "The devices, and the values chosen for auto", _rows(computed)),
        ("Data", "The data set, with the SHA-256 of its content", _rows(data)),
        (
            "Versions",
            "Versions of the job and of the software that its results depend on",
            _rows(versions),
        ),
    ]


def _rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _value(value)) for name, value in values.items()]


def _value(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def moment(text: str | None) -> str:
    """Convert a time from ISO 8601, as in run.json, to a readable form: 2026-01-31 12:00:00."""
    return text[:19].replace("T", " ") if text else "unknown"


def _embedded(figure: Figure) -> dict[str, object]:
    # The size is in the PNG's first chunk.
    width, height = struct.unpack(">II", figure.png[16:24])
    encoded = base64.b64encode(figure.png).decode()
    return vars(figure) | {"width": width, "height": height, "base64": encoded}


def _key_figures(record: RunRecord, calibration_error: float | None) -> list[tuple[str, str, str]]:
    figures = []
    if record.evaluation:
        examples = f"of {plural(record.evaluation.examples, 'test image')}"
        figures.append(("Test accuracy", f"{record.evaluation.accuracy:.2%}", examples))
        plain = record.evaluation.accuracy_without_tta
        if plain is not None:
            figures.append(("Accuracy, one view", f"{plain:.2%}", "each image as it is"))
        figures.append(("Test loss", f"{record.evaluation.loss:.4f}", "nats per test image"))
    if calibration_error is not None:
        figures.append(("Calibration error", f"{calibration_error:.2%}", "0% is best"))
    if record.epochs:
        best = max(record.epochs, key=lambda line: line.val_accuracy)
        figures.append(
            ("Best validation", f"{best.val_accuracy:.2%}", f"epoch {best.epoch}, on test images")
        )
    if record.steps:
        elapsed = _duration(record.elapsed_seconds)
        figures += [_progress(record), ("Time", elapsed, "in training and validation")]
    if record.epochs:
        rate = statistics.median(line.images_per_second for line in record.epochs)
        figures.append(("Throughput", f"{rate:,.0f}", "images per second, median"))
    if record.steps:
        figures.append(("Restarts", str(len(record.restarts)), "of the training"))
    return figures


def _duration(seconds: float) -> str:
    """Format a time in one or two suitable units: ``3 h 25 min``, ``2 min 47 s``, ``6.0 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _progress(record: RunRecord) -> tuple[str, str, str]:
    """The run's progress: "epoch 1 of 20", "402 of 6,240 steps"."""
    per_epoch, steps = record.steps_per_epoch, record.steps
    if record.manifest is None or record.is_done or per_epoch is None:
        return ("Epochs", f"{len(record.epochs):,}", plural(steps, "step"))
    epochs = record.manifest.config.epochs
    epoch = min(len(record.epochs) + 1, epochs)  # until it is validated, also at its last step
    done = f"{steps:,} of {plural(epochs * per_epoch, 'step')}"
    return ("Progress", f"epoch {epoch:,} of {epochs:,}", done)
