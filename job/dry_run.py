"""What a training would do, found out by the rules of the training itself and without doing it.

Nothing is made, written or downloaded, and nobody who holds the output folder is asked for it.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import log
from job.attempt import Attempt, look_at
from job.cluster import RunIdentity, cluster_spec, run_identity
from job.config import JobError, TrainConfig
from job.dataset import Dataset, Finding, get_source, load_dataset, require_limit
from job.devices import Devices, open_promised_devices, require_promised_gpus
from job.engine import Plan
from job.findings import LABEL_WIDTH, Findings
from job.fingerprint import require_same_run, take_fingerprint
from job.folders import prepare_output_dir
from job.lease import Holder
from job.manifest import describe_config
from job.output import OutputDir
from job.placement import place_replicas
from job.preemption import StopRequest
from job.recipe import get_recipe
from job.takeover import find_holder, refusal
from job.terminal import write_lines
from job.textfile import require_folder
from job.train import make_plan, previous_of, require_fitting
from job.workers import Workers


def examine(config: TrainConfig, stop: StopRequest) -> Findings:
    """Find out what a training with this configuration would do."""
    found = Findings()
    found.add("config", describe_config(config))
    attempt = None
    with found.collecting():
        attempt = _examine_output(found, config, stop)
    if attempt and attempt.is_finished:
        found.outcome = (
            "the run is finished: train would say so, do nothing and end with exit code 0; raise "
            "--epochs to go on with it, start over with --fresh, or name another --output-dir"
        )
        return found
    devices, finding, dataset = None, None, None
    with found.collecting():
        if config.metrics_textfile:
            require_folder(config.metrics_textfile)
    with found.collecting():
        devices = _examine_devices(found, config, attempt)
    with found.collecting():
        finding = get_source(config.data.dataset).find(config.data)
        dataset = None if finding.download else load_dataset(config.data)
        examples = _examine_data(found, config, finding, dataset)
        plan = make_plan(config, examples)
        if devices:
            _examine_batch(found, devices, plan, examples)
        if dataset:
            _examine_network(found, config, attempt, devices, dataset, plan)
    return found


def _examine_output(found: Findings, config: TrainConfig, stop: StopRequest) -> Attempt:
    path = config.output_dir
    prepare_output_dir(path, make=False)
    identity = run_identity(os.environ, config.run_id)
    holder = find_holder(path)
    fields = {"path": str(path), "held_by": str(holder) if holder else None}
    try:
        attempt = look_at(config, identity, OutputDir(path), stop)
    except JobError:
        text = "holds what this command would not go on with"
        found.add("output", {**fields, "state": "refused", "step": 0}, f"{path}/ {text}")
        raise
    checkpoint = attempt.checkpoint
    if attempt.is_finished:
        state, text = "finished", "holds this run, finished"
    elif attempt.fresh:
        state, text = "fresh", "would be emptied of the run that it holds, if any; a new run begins"
    elif checkpoint:
        state, text = "resume", f"holds this run: it would go on after step {checkpoint.step}"
    else:
        state, text = "new", "holds no run to go on with: a new one would begin"
    step = checkpoint.step if checkpoint else 0
    found.add("output", {**fields, "state": state, "step": step}, f"{path}/ {text}")
    if holder:
        _examine_holder(found, path, identity, holder)
    return attempt


def _examine_holder(found: Findings, path: Path, identity: RunIdentity, holder: Holder) -> None:
    found.lines.append(("", f"held by {holder}"))
    if holder.brief:
        found.lines.append(("", "which this run would wait for"))
    elif not identity.replaces(holder.run, holder.attempt):
        found.problems.append(refusal(path, identity, holder))
    else:
        found.lines.append(("", "which would be asked to stop, and this run would go on"))


def _examine_devices(found: Findings, config: TrainConfig, attempt: Attempt | None) -> Devices:
    checkpoint = attempt.checkpoint if attempt else None
    previous = previous_of(checkpoint) if checkpoint else None
    spec = cluster_spec(os.environ)
    placement = None
    if spec.count > 1:
        found.add(
            "workers",
            {"addresses": list(spec.workers), "index": spec.index},
            f"{spec.count}, of which this is {spec.name(spec.index)}; the others are not asked",
        )
        require_promised_gpus(config)
        placement = replace(place_replicas(config.devices), workers=Workers(spec))
    devices = open_promised_devices(config, previous, placement)
    compiled = devices.compilation
    parts = {"network": compiled.network, "augmentation and optimizer": compiled.elementwise}
    by_xla = " and ".join(part for part, is_compiled in parts.items() if is_compiled) or "nothing"
    found.add(
        "devices",
        {
            "kind": devices.kind,
            "replicas": list(devices.descriptions),
            "precision": devices.precision,
            "xla": compiled.network,
            "deterministic": devices.deterministic,
            "threads": devices.threads,
        },
        *(
            ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in d.items())
            for d in devices.descriptions
        ),
        f"{devices.precision}; XLA compiles {by_xla}; "
        f"{'only deterministic operations' if devices.deterministic else 'not deterministic'}",
    )
    devices.rows_per_replica(config.global_batch_size)
    return devices


def _examine_data(
    found: Findings, config: TrainConfig, finding: Finding, dataset: Dataset | None
) -> int:
    """Report the data and return the number of training images."""
    name, limit = config.data.dataset, config.data.limit
    if dataset:
        train, test = len(dataset.train_images), len(dataset.test_images)
        shape = list(dataset.train_images.shape[1:])
        classes = list(dataset.class_names)
        text = f"; {'x'.join(map(str, shape))}, {len(classes)} classes"
    else:
        train, test = finding.download or (0, 0)
        shape, classes, text = None, None, ", once they are there"
        if limit is not None:
            require_limit(limit, train, name)
            train = limit
    found.add(
        "data",
        {
            "name": name,
            "found": finding.description,
            "download": finding.download is not None,
            "train_examples": train,
            "test_examples": test,
            "image_shape": shape,
            "classes": classes,
            "fingerprint": dataset.fingerprint if dataset else None,
        },
        f"{name}: {finding.description}",
        f"{train:,} training and {test:,} test images{text}",
    )
    return train


def _examine_batch(found: Findings, devices: Devices, plan: Plan, examples: int) -> None:
    rows = devices.rows_per_replica(plan.global_batch_size)
    left_out = examples - plan.steps_per_epoch * plan.global_batch_size
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
        f"{plan.global_batch_size} images a step = {devices.replicas} replica(s) x {rows}",
        f"{plan.steps_per_epoch:,} steps an epoch"
        + (f", {left_out:,} images left out, others each time" if left_out else ""),
        f"{plan.epochs:,} epochs = {plan.total_steps:,} steps",
    )


def _examine_network(
    found: Findings,
    config: TrainConfig,
    attempt: Attempt | None,
    devices: Devices | None,
    dataset: Dataset,
    plan: Plan,
) -> None:
    recipe = get_recipe(config.recipe)
    model = recipe.build_model(plan.seed, len(dataset.class_names))
    require_fitting(model, dataset, recipe)
    recipe.compile(model, config.learning_rate, plan.total_steps)
    parameters = model.count_params()
    fields: dict[str, Any] = {"recipe": recipe.name, "parameters": parameters, "changes": []}
    texts = [f"{recipe.name}: {parameters:,} parameters"]
    if attempt and attempt.checkpoint and devices:
        saved = attempt.checkpoint.metadata["fingerprint"]
        fingerprint = take_fingerprint(config, devices, dataset, model)
        require_same_run(saved["run"], fingerprint.run, config.output_dir)
        fields["changes"] = fingerprint.changes_since(saved["environment"])
        texts.append(f"data and network are those of the run in {config.output_dir}/")
        texts += [f"other bits than uninterrupted: {change}" for change in fields["changes"]]
    found.add("network", fields, *texts)


def print_dry_run(config: TrainConfig, stop: StopRequest) -> None:
    """Print what a training with this configuration would do.

    Raises:
        JobError: The first reason why it would not start, after everything is printed.
    """
    found = examine(config, stop)
    if log.is_json():
        log.event("dry_run", **found.report, problems=[str(problem) for problem in found.problems])
    else:
        text = found.as_text()
        write_lines((log.wrapped(text, LABEL_WIDTH) if log.on_terminal() else text).splitlines())
    if found.problems:
        raise found.problems[0]
