"""The report's page: what stands beside the figures, and all of it as one HTML file."""

import base64
import statistics
import struct
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from job import report_tables
from job.addresses import REMOVED
from job.calibration import reliability
from job.quantities import duration, percent
from job.report_figures import Figure
from job.rerun import evaluate_command, resume_command, train_command
from job.run_record import RunRecord


def render(record: RunRecord, figures: dict[str, Figure]) -> str:
    """Write the page.

    It is a function of the run alone, the same at any time and in any place.

    Args:
        record: The run.
        figures: Its figures, by name.
    """
    environment = Environment(
        loader=PackageLoader("job", "."),
        autoescape=True,  # paths, messages and names are anybody's
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    config = record.manifest.get("config")
    error = _calibration_error(record)
    return environment.get_template("report.html.jinja").render(
        record=record,
        title=_title(record),
        status=_status(record),
        notes=_notes(record),
        key_figures=_key_figures(record, error),
        calibration_error=error,
        figures={name: _embedded(figure) for name, figure in figures.items()},
        epochs=report_tables.epochs(record),
        confusion=report_tables.confusion(record),
        classes=report_tables.classes(record),
        mistakes=report_tables.mistakes(record),
        attempts=report_tables.attempts(record),
        facts=report_tables.facts(record.manifest),
        resume=config and not _is_done(record) and resume_command(config),
        rerun=config and train_command(config, f"{config['output_dir']}-again"),
        rerun_note=config and _rerun_note(record.manifest),
        address_note=config and _address_note(config),
    )


def _embedded(figure: Figure) -> dict[str, Any]:
    # The size stands in the PNG's first chunk.
    width, height = struct.unpack(">II", figure.png[16:24])
    encoded = base64.b64encode(figure.png).decode()
    return vars(figure) | {"width": width, "height": height, "base64": encoded}


def _title(record: RunRecord) -> str:
    config = record.manifest.get("config")
    return f"Training of {config['recipe']} on {config['dataset']}" if config else "Training"


def _status(record: RunRecord) -> str:
    """One sentence on whether the run is finished."""
    manifest = record.manifest
    if not manifest:
        return "There is no run.json, so it is not known what ran and how it ended."
    end = f"on {report_tables.moment(manifest['end'])} UTC"
    done = f"{len(record.epochs)} of {manifest['config']['epochs']} epochs are done"
    error, reason = (
        f" ({text})" if text else ""
        for text in (manifest["error"], manifest["attempts"][-1]["reason"])
    )
    return {
        "done": f"Finished {end}.",
        "failed": f"Not finished: it failed {end}{error}; {done}.",
        "stopped": f"Not finished: it was stopped {end}{reason}; {done}, and the same command "
        f"goes on.",
        "running": f"Not finished: its last attempt has left no word of its end; {done}, and the "
        f"same command goes on.",
    }[manifest["outcome"]]


def _notes(record: RunRecord) -> list[str]:
    """What the reader has to know of what is missing."""
    config = record.manifest.get("config")
    notes = []
    if not record.evaluation:
        notes.append(
            "There is no evaluation of the saved model yet, which is the end of a training; so "
            "everything about classes and single images is missing."
        )
    elif not record.predictions:
        command = evaluate_command(config) if config else "python -m job evaluate"
        notes.append(
            f"There is no predictions.npz in the folder, so calibration, mistakes and augmented "
            f"images are missing. This writes it and the report anew: {command}"
        )
    if record.evaluation and not _is_done(record):
        notes.append(
            "The evaluation is of the model that an earlier attempt saved, not of the last epoch."
        )
    return notes


def _calibration_error(record: RunRecord) -> float | None:
    predictions = record.predictions
    if predictions is None:
        return None
    return reliability(predictions.labels, predictions.probabilities).expected_error


def _key_figures(record: RunRecord, calibration_error: float | None) -> list[tuple[str, str, str]]:
    figures = []
    if record.evaluation:
        examples = f"of {record.evaluation['examples']:,} test images"
        figures.append(("Test accuracy", percent(record.evaluation["accuracy"]), examples))
        figures.append(("Test loss", f"{record.evaluation['loss']:.4f}", "nats a test image"))
    if calibration_error is not None:
        figures.append(("Calibration error", percent(calibration_error), "expected; 0% is best"))
    if record.epochs:
        best = max(record.epochs, key=lambda line: float(line["val_accuracy"]))
        detail = f"in epoch {best['epoch']}"
        figures.append(("Best validation", percent(best["val_accuracy"]), detail))
    if record.steps:
        elapsed = duration(record.elapsed_seconds)
        figures += [_progress(record), ("Time", elapsed, "in training and validation")]
    if record.epochs:
        rate = statistics.median(line["images_per_second"] for line in record.epochs)
        figures.append(("Throughput", f"{rate:,.0f}", "images a second, median"))
    if record.steps:
        figures.append(("Restarts", str(len(record.restarts)), "of the training"))
    return figures


def _progress(record: RunRecord) -> tuple[str, str, str]:
    """How far the run is: "epoch 1 of 20", "402 of 6,240 steps"."""
    per_epoch, steps = record.steps_per_epoch, record.steps
    if _is_done(record) or per_epoch is None:
        return ("Epochs", f"{len(record.epochs):,}", f"{steps:,} steps")
    epochs = record.manifest["config"]["epochs"]
    epoch = min(steps // per_epoch + 1, epochs)
    return (
        *("Progress", f"epoch {epoch:,} of {epochs:,}"),
        f"{steps:,} of {epochs * per_epoch:,} steps",
    )


def _is_done(record: RunRecord) -> bool:
    return bool(record.manifest.get("outcome", "done") == "done")


def _address_note(config: dict[str, Any]) -> str | None:
    if REMOVED not in config.get("cifar10_url", ""):
        return None
    return (
        f"The address of the data had a user's name, a password or a query, which are not kept: "
        f"put them back where --cifar10-url has {REMOVED}."
    )


def _rerun_note(manifest: dict[str, Any]) -> str:
    commit = manifest["git_commit"]
    where = f"commit {commit}" if commit else f"version {manifest['versions']['job']} of the job"
    return (
        f"It takes {where} with the versions below, and the defaults of all options that the "
        f"command does not name. If deterministic is true below, devices of the same kind give the "
        f"same bits, else they give similar figures."
    )
