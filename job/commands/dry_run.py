"""Preview of a training, based on the same rules as the training itself.

Nothing is created, written or downloaded, and the holder of the output folder is not asked to
release it.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from job import log
from job.cluster.devices import Devices, open_devices
from job.cluster.scheduler import cluster_spec, run_identity
from job.cluster.workers import Workers
from job.commands.terminal import write_lines
from job.config import JobError, TrainConfig, describe_config
from job.data import Dataset, find_dataset, load_dataset, require_limit
from job.recipes import get_recipe
from job.registry import explaining_user_code
from job.report.page import command_line
from job.run.attempt import Attempt, inspect_output_dir
from job.run.fingerprint import require_same_run, take_fingerprint
from job.run.folder import OutputDir, prepare_output_dir
from job.run.lease import read_holder, refusal
from job.run.stop import StopRequest
from job.training.engine import Plan
from job.training.network import build_network
from job.training.prometheus import require_folder
from job.training.saved_model import require_savable
from job.training.train import LoadDataset, OpenDevices, make_plan

_LABEL_WIDTH = 13


@dataclass
class Preview:
    """The result of a dry run.

    Attributes:
        report: A JSON object. It contains one object each for the configuration, output, devices,
            data and batch, and for workers if there are several. An object is missing if a problem
            prevented it.
        lines: The same as text: pairs of label and text.
        problems: The reasons why the training would not start.
        outcome: What the training would do if there are no problems.
    """

    report: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[JobError] = field(default_factory=list)
    outcome: str = "no problems found"

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect a problem that the body raises, and continue with the next checks."""
        try:
            with explaining_user_code():
                yield
        except JobError as error:
            self.problems.append(error)

    def add(self, key: str, fields: dict[str, Any], *texts: str) -> None:
        """Add an object to the report, and its lines of text."""
        self.report[key] = fields
        self.lines += [(key.capitalize(), text) for text in texts]

    def as_text(self) -> str:
        """Format the result as text, the most important lines first."""
        verdict = [("Problem", str(problem)) for problem in self.problems]
        verdict = verdict or [("Dry run", f"{self.outcome}; nothing was written")]
        lines = [*verdict, *self.lines]
        return "\n".join(f"{label:<{_LABEL_WIDTH}}{text}" for label, text in lines)


def preview(
    config: TrainConfig, stop: StopRequest, open_devices: OpenDevices, load: LoadDataset
) -> Preview:
    """Preview a training with this configuration.

    Args:
        config: The configuration of the training.
        stop: Receives the advice that the training would give after a stop.
        open_devices: Sets up the devices, with the values that the previous attempt resolved "auto"
            to.
        load: Loads the data set; called only if nothing must be downloaded.
    """
    found = Preview()
    found.add("config", describe_config(config), command_line("train", config))
    attempt = None
    with found.collecting():
        attempt = _preview_output(found, config, stop)
    if attempt and attempt.is_finished:
        found.outcome = (
            "the run is finished: train would report that, do nothing and end with exit code 0; "
            "raise --epochs to resume it, pass --fresh to start over, or use another --output-dir"
        )
        return found
    devices = None
    with found.collecting():
        if config.metrics_textfile:
            require_folder(config.metrics_textfile)
    with found.collecting():
        devices = _preview_devices(found, config, attempt, open_devices)
    dataset, plan = None, None
    with found.collecting():
        dataset, plan = _preview_data(found, config, devices, load)
    with found.collecting():
        recipe = get_recipe(config.recipe)
        if plan:
            # The number of classes is unknown before the download, and does not matter here.
            classes = len(dataset.class_names) if dataset else 2
            model, fixed_weights = build_network(
                *(recipe, config.seed, classes, config.learning_rate, plan.total_steps), dataset
            )
            require_savable(model, recipe)
            if dataset and devices and attempt and attempt.checkpoint:
                current = take_fingerprint(config, devices, dataset, model, recipe, fixed_weights)
                saved = attempt.checkpoint.fingerprint
                require_same_run(saved.run, current.run, config.output_dir)
    return found


def _preview_output(found: Preview, config: TrainConfig, stop: StopRequest) -> Attempt:
    path = config.output_dir
    prepare_output_dir(path, make=False)
    identity = run_identity(os.environ, config.run_id)
    holder = read_holder(path)
    attempt = inspect_output_dir(config, identity, OutputDir(path), stop)
    checkpoint = attempt.checkpoint
    step = checkpoint.step if checkpoint else 0
    if attempt.is_finished:
        state, text = "finished", "contains this run, which is finished"
    elif attempt.fresh:
        state, text = "fresh", "would receive a new run; an earlier one would be discarded"
    elif checkpoint:
        state, text = "resume", f"contains this run: it would resume at step {step}"
    else:
        state, text = "new", "contains no run to resume: a new run would begin"
    held_by = str(holder) if holder else None
    fields = {"path": str(path), "held_by": held_by, "state": state, "step": step}
    found.add("output", fields, f"{path}/ {text}", *([f"held by {holder}"] if holder else []))
    if holder and not identity.replaces(holder.run, holder.attempt):
        found.problems.append(refusal(path, identity, holder))
    return attempt


def _preview_devices(
    found: Preview, config: TrainConfig, attempt: Attempt | None, open_devices: OpenDevices
) -> Devices:
    spec = cluster_spec(os.environ)
    if spec.count > 1:
        text = f"{spec.count}; this is {spec.name(spec.index)}, and the others are not contacted"
        found.add("workers", {"addresses": list(spec.workers), "index": spec.index}, text)
    checkpoint = attempt.checkpoint if attempt else None
    own = open_devices(config, checkpoint.fingerprint.environment if checkpoint else None)
    devices = replace(own, workers=Workers(spec))
    network = "the network, " if devices.compilation.network else ""
    compiled = f"{network}augmentation and optimizer" if devices.compilation.elementwise else "none"
    found.add(
        "devices",
        {
            "kind": devices.kind,
            "replicas": [msgspec.to_builtins(device) for device in devices.descriptions],
            "precision": devices.precision,
            "xla": devices.compilation.network,
            "deterministic": devices.deterministic,
            "threads": devices.threads,
        },
        *(f"{device.name}, {device}" for device in devices.descriptions),
        f"{devices.precision}; compiled by XLA: {compiled}; "
        f"{'only deterministic operations' if devices.deterministic else 'not deterministic'}",
    )
    devices.rows_per_replica(config.batch_size)
    return devices


def _preview_data(
    found: Preview, config: TrainConfig, devices: Devices | None, load: LoadDataset
) -> tuple[Dataset | None, Plan]:
    dataset, name, location = None, config.dataset, find_dataset(config)
    if location.download:
        (train, test), shape, classes = location.download, None, None
        if config.limit is not None:
            require_limit(config.limit, train, name)
            train = config.limit
        text = ", after the download"
    else:
        dataset = load(config)
        train, test = len(dataset.train_images), len(dataset.test_images)
        shape, classes = list(dataset.train_images.shape[1:]), list(dataset.class_names)
        text = f"; {'x'.join(map(str, shape))}, {len(classes)} classes"
    found.add(
        "data",
        {
            "name": name,
            "found": location.description,
            "download": location.download is not None,
            "train_examples": train,
            "test_examples": test,
            "image_shape": shape,
            "classes": classes,
        },
        f"{name}: {location.description}",
        f"{train:,} training and {log.plural(test, 'test image')}{text}",
    )
    plan = make_plan(config, train)
    if devices is None:
        return dataset, plan
    rows = devices.rows_per_replica(plan.global_batch_size)
    left_out = train - plan.steps_per_epoch * plan.global_batch_size
    found.add(
        "batch",
        {
            "batch_size": plan.global_batch_size,
            "rows_per_replica": rows,
            "steps_per_epoch": plan.steps_per_epoch,
            "images_left_out": left_out,
            "epochs": plan.epochs,
            "total_steps": plan.total_steps,
        },
        f"{log.plural(plan.global_batch_size, 'image')} per step = "
        f"{log.plural(devices.replicas, 'replica')} x {rows}",
        f"{log.plural(plan.steps_per_epoch, 'step')} per epoch"
        + (
            f", {log.plural(left_out, 'image')} left out, different ones in each epoch"
            if left_out
            else ""
        ),
        f"{log.plural(plan.epochs, 'epoch')} = {log.plural(plan.total_steps, 'step')}",
    )
    return dataset, plan


def print_dry_run(config: TrainConfig, stop: StopRequest) -> None:
    """Print a preview of a training with this configuration.

    Raises:
        JobError: The first problem, after everything is printed.
    """
    found = preview(config, stop, open_devices, load_dataset)
    if log.is_json():
        log.event("dry_run", **found.report, problems=[str(problem) for problem in found.problems])
    else:
        write_lines(found.as_text().splitlines())
    if found.problems:
        raise found.problems[0]
