"""A whole training run: from a configuration to the artifacts in the output folder."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from job import log
from job.attempt import Attempt
from job.checkpoint import Checkpoint
from job.config import TrainConfig, UserError
from job.dataset import Dataset, load_dataset
from job.devices import Devices, open_promised_devices
from job.engine import Engine, Plan
from job.evaluate import Evaluation, Evaluator
from job.fingerprint import Fingerprint, require_same_run, take_fingerprint
from job.history import History
from job.model_file import save_model
from job.observer import Observer
from job.output import EVALUATION, MODEL, PREDICTION, PREDICTIONS, REPORT, REPORT_PICTURES
from job.placement import Placement, Previous
from job.recipe import Recipe, get_recipe
from job.report import try_to_write_report
from job.saved_model import evaluate_saved
from job.tensorboard import EventFile
from job.textfile import MetricsTextfile, open_textfile
from job.trainer import Trainer
from job.watchdog import Watchdog


def train_and_evaluate(
    config: TrainConfig, attempt: Attempt, placement: Placement | None = None
) -> Evaluation | None:
    """Train from where the attempt goes on, save the model, and evaluate what was saved.

    Args:
        config: What to train and how.
        attempt: The folder for its artifacts, and what an earlier attempt has done.
        placement: Replicas that are in their places already; None places them on this process's
            devices.

    Returns:
        The evaluation of the saved model, as in ``evaluation.json``; None on a worker that is not
        the chief, whose part is over with the training.

    Raises:
        UserError: If the configuration, the data or a folder must be changed first.
        GpuMissingError: If a promised or required GPU cannot be used.
        StoppedError: If the run was told to stop; its state is in a checkpoint.
        JobError: If the loss is no finite number any more.
    """
    with open_textfile(config, attempt) as textfile:
        evaluation = _train_and_evaluate(config, attempt, placement, textfile)
        # First, because the report tells how the run ended.
        attempt.manifest.finish("done")
    # The textfile says done by now, as run.json does, whatever becomes of the report.
    if evaluation:
        try_to_write_report(attempt.output)
    return evaluation


def _train_and_evaluate(
    config: TrainConfig,
    attempt: Attempt,
    placement: Placement | None,
    textfile: MetricsTextfile | None,
) -> Evaluation | None:
    checkpoint = attempt.checkpoint
    previous = previous_of(checkpoint) if checkpoint else None
    devices = open_promised_devices(config, previous, placement)
    devices.rows_per_replica(config.global_batch_size)
    dataset = load_dataset(config.data)
    plan = make_plan(config, len(dataset.train_images))
    recipe = get_recipe(config.recipe)
    watchdog = Watchdog(config.stall_timeout_seconds, _end_hung_process(attempt, textfile))
    with _naming_batch_size(config.global_batch_size, devices.replicas):
        engine = Engine(recipe, devices, dataset, plan, config.learning_rate)
        require_fitting(engine.original, dataset, recipe)
        fingerprint = take_fingerprint(config, devices, dataset, engine.original)
        # By these each worker computes its part of the same bits.
        devices.workers.require_equal(
            {**fingerprint.run, "variables": fingerprint.environment["variables"]}
        )
        history = _go_on(engine, fingerprint, attempt)
        _record_start(config, attempt, history, fingerprint, devices, dataset, plan)
        evaluator = Evaluator(
            engine.model, recipe, devices, dataset.test_images, dataset.test_labels
        )
        observers = _observers(config, attempt, history, devices, plan, textfile)
        trainer = Trainer(engine, evaluator, attempt, history, fingerprint, watchdog, observers)
        trainer.train(config.checkpoint_every_seconds)
    if not attempt.is_chief:
        return None
    if textfile:
        textfile.enter("evaluating")
    save_model(engine.export(), attempt.output, MODEL)
    evaluation = evaluate_saved(
        attempt.output,
        recipe,
        devices.without_other_workers(),
        dataset,
        config.seed,
        watchdog,
    )
    # Without it the run is not finished. One that is there tells of an earlier end.
    attempt.output.remove([attempt.output.path / REPORT])
    return evaluation


def make_plan(config: TrainConfig, examples: int) -> Plan:
    """Work out the arithmetic of a run.

    Raises:
        UserError: If a batch is larger than the training set.
    """
    steps_per_epoch = examples // config.global_batch_size
    if not steps_per_epoch:
        limited = config.data.limit is not None
        raise UserError(
            f"--batch-size received {config.global_batch_size}, expected at most the {examples} "
            f"training images; lower --batch-size{' or raise --limit' if limited else ''}"
        )
    return Plan(config.global_batch_size, steps_per_epoch, config.epochs, config.seed)


def require_fitting(model: keras.Model, dataset: Dataset, recipe: Recipe) -> None:
    """Refuse to train a network on images that it does not take.

    Raises:
        UserError: If the shapes differ.
    """
    received, expected = dataset.train_images.shape[1:], tuple(model.input_shape[1:])
    if received != expected:
        raise UserError(
            f"--dataset {dataset.name} has images of shape {received}, expected {expected}, which "
            f"--recipe {recipe.name} takes; name another --dataset or --recipe"
        )


def _end_hung_process(attempt: Attempt, textfile: MetricsTextfile | None) -> Callable[[], None]:
    words = [partial(textfile.finish, "failed")] if textfile else []
    return partial(attempt.end_hung_process, *words)


def _observers(
    config: TrainConfig,
    attempt: Attempt,
    history: History,
    devices: Devices,
    plan: Plan,
    textfile: MetricsTextfile | None,
) -> list[Observer]:
    observers: list[Observer] = []
    if config.tensorboard and attempt.is_chief:
        observers.append(EventFile(attempt.output, history))
    if textfile:
        model = devices.descriptions[0].get("model")
        name = f"{devices.replicas} x {model}"
        textfile.begin(devices.precision, name, plan.steps_per_epoch, history)
        observers.append(textfile)
    return observers


@contextlib.contextmanager
def _naming_batch_size(global_batch_size: int, replicas: int) -> Iterator[None]:
    """Turn the body's running out of device memory into advice on the batch size."""
    try:
        yield
    except tf.errors.OpError as error:
        # Inside of cuDNN, NCCL and XLA the same comes as other types.
        signs = ("out of memory", "RESOURCE_EXHAUSTED", "OOM when allocating")
        exhausted = isinstance(error, tf.errors.ResourceExhaustedError)
        if not exhausted and not any(sign in str(error) for sign in signs):
            raise
        raise UserError(
            f"out of memory on the devices with --batch-size {global_batch_size} "
            f"({global_batch_size // replicas} images a replica); lower --batch-size"
        ) from error


def previous_of(checkpoint: Checkpoint) -> Previous:
    """What the attempt that left a checkpoint was computing with."""
    fingerprint = checkpoint.metadata["fingerprint"]
    environment = fingerprint["environment"]
    return Previous(
        kind=environment["device_kind"],
        replicas=environment["replicas"],
        precision=environment["precision"],
        jit=environment["jit"],
        deterministic=environment["deterministic"],
        global_batch_size=fingerprint["run"]["batch_size"],
    )


def _go_on(engine: Engine, fingerprint: Fingerprint, attempt: Attempt) -> History:
    """Bring the engine to where the attempt goes on, and its files with it."""
    checkpoint = attempt.checkpoint
    history = History()
    if attempt.fresh:
        log.event(
            "fresh",
            message=f"--fresh: starting over, without what was in {attempt.output.path}/",
        )
        attempt.output.discard()
    elif checkpoint is None:
        # Pictures and figures of a model that is no more.
        stale = (EVALUATION, PREDICTION, PREDICTIONS, REPORT, *REPORT_PICTURES)
        attempt.output.remove([attempt.output.path / name for name in stale])
    else:
        saved = checkpoint.metadata["fingerprint"]
        require_same_run(saved["run"], fingerprint.run, attempt.output.path)
        engine.restore(checkpoint.arrays)
        history = History.from_document(checkpoint.metadata["history"])
    # Epochs that were reported after the checkpoint are trained again.
    history.write_metrics(attempt.output)
    return history


def _record_start(
    config: TrainConfig,
    attempt: Attempt,
    history: History,
    fingerprint: Fingerprint,
    devices: Devices,
    dataset: Dataset,
    plan: Plan,
) -> None:
    checkpoint = attempt.checkpoint
    changes: list[str] = []
    if checkpoint:
        changes = fingerprint.changes_since(checkpoint.metadata["fingerprint"]["environment"])
    step = checkpoint.step if checkpoint else 0
    details = _describe(devices, dataset) | {"recipe_fingerprint": fingerprint.recipe}
    attempt.manifest.start_training(config, details, step, changes)
    attempt.manifest.progress(step, history.best, history.elapsed_seconds)
    _log_start(plan, devices, dataset, step)
    if changes and attempt.is_chief:
        log.event(
            "changed",
            logging.WARNING,
            changes=changes,
            message=f"goes on with other bits than an uninterrupted run, because of a change in "
            f"{'; '.join(changes)}",
        )


def _log_start(plan: Plan, devices: Devices, dataset: Dataset, step: int) -> None:
    rows = devices.rows_per_replica(plan.global_batch_size)
    log.event(
        "start",
        dataset=dataset.name,
        train_examples=len(dataset.train_images),
        test_examples=len(dataset.test_images),
        workers=devices.workers.count,
        replicas=devices.replicas,
        device_kind=devices.kind,
        precision=devices.precision,
        xla=devices.compilation.network,
        deterministic=devices.deterministic,
        batch_size=plan.global_batch_size,
        rows_per_replica=rows,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.epochs,
        step=step,
        message=f"{dataset.name}: {len(dataset.train_images):,} training and "
        f"{len(dataset.test_images):,} test images; {devices.replicas} {devices.kind.upper()} "
        f"replica(s) in {devices.precision}; batch {plan.global_batch_size} = "
        f"{devices.replicas} x {rows}; {plan.epochs} epochs of {plan.steps_per_epoch} steps"
        + (f"; going on after step {step}" if step else ""),
    )


def _describe(devices: Devices, dataset: Dataset) -> dict[str, Any]:
    """What the manifest says of devices and data."""
    return {
        "devices": list(devices.descriptions),
        "workers": devices.workers.count,
        "replicas": devices.replicas,
        "threads": devices.threads,
        "precision": devices.precision,
        "xla": devices.compilation.network,
        "deterministic": devices.deterministic,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "test_fingerprint": dataset.test_fingerprint,
            "train_examples": len(dataset.train_images),
            "test_examples": len(dataset.test_images),
        },
    }
