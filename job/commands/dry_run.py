"""What a training would do, found out by the training's own rules and without doing it.

Nothing is made, written or downloaded, and the holder of the output folder is not asked for it.
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
from job.registry import naming_own_code
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
    """What was found out.

    Attributes:
        report: A JSON object: the configuration, and for each of output, devices, data and batch an
            object, missing where a problem came before it; for workers, where there are several.
        lines: The same for people: pairs of label and text.
        problems: Why the training would not start.
        outcome: What the training would do, where there is no problem.
    """

    report: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[JobError] = field(default_factory=list)
    outcome: str = "nothing stands in the way"

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the body's problem, if it has one, so that the rest is found out too."""
        try:
            with naming_own_code():
                yield
        except JobError as error:
            self.problems.append(error)

    def add(self, key: str, fields: dict[str, Any], *texts: str) -> None:
        """Add an object to the report, and lines for people."""
        self.report[key] = fields
        self.lines += [(key.capitalize(), text) for text in texts]

    def as_text(self) -> str:
        """What was found out, for a person to read, the most important first."""
        verdict = [("Problem", str(problem)) for problem in self.problems]
        verdict = verdict or [("Dry run", f"{self.outcome}; nothing was written")]
        lines = [*verdict, *self.lines]
        return "\n".join(f"{label:<{_LABEL_WIDTH}}{text}" for label, text in lines)


def preview(
    config: TrainConfig, stop: StopRequest, open_devices: OpenDevices, load: LoadDataset
) -> Preview:
    """Find out what a training with this configuration would do.

    Args:
        config: Of the training.
        stop: Is told what the training would advise once it has stopped.
        open_devices: Sets the devices up, with what the attempt before had resolved "auto" to.
        load: Loads the data set where nothing has to be downloaded.
    """
    found = Preview()
    found.add("config", describe_config(config), command_line("train", config))
    attempt = None
    with found.collecting():
        attempt = _preview_output(found, config, stop)
    if attempt and attempt.is_finished:
        found.outcome = (
            "the run is finished: train would report that, do nothing and end with exit code 0; "
            "raise --epochs to resume it, start over with --fresh, or name another --output-dir"
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
            # Before a download the number of classes is not known, and any will do.
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
        state, text = "finished", "holds this run, finished"
    elif attempt.fresh:
        state, text = "fresh", "would be emptied of the run that it holds, if any; a new run begins"
    elif checkpoint:
        state, text = "resume", f"holds this run: it would resume after step {step}"
    else:
        state, text = "new", "holds no run to resume: a new one would begin"
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
        text = f"{spec.count}, of which this is {spec.name(spec.index)}; the others are not asked"
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
        text = ", once they are there"
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
        f"{log.plural(plan.global_batch_size, 'image')} a step = "
        f"{log.plural(devices.replicas, 'replica')} x {rows}",
        f"{log.plural(plan.steps_per_epoch, 'step')} an epoch"
        + (f", {log.plural(left_out, 'image')} left out, others each time" if left_out else ""),
        f"{log.plural(plan.epochs, 'epoch')} = {log.plural(plan.total_steps, 'step')}",
    )
    return dataset, plan


def print_dry_run(config: TrainConfig, stop: StopRequest) -> None:
    """Print what a training with this configuration would do.

    Raises:
        JobError: The first reason why it would not start, after everything is printed.
    """
    found = preview(config, stop, open_devices, load_dataset)
    if log.is_json():
        log.event("dry_run", **found.report, problems=[str(problem) for problem in found.problems])
    else:
        write_lines(found.as_text().splitlines())
    if found.problems:
        raise found.problems[0]
