"""A whole training run: from a configuration to the artifacts in the output folder."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job import artifacts, log, plots
from job.config import JobError, TrainConfig, UserError
from job.dataset import Dataset, load_dataset
from job.devices import (
    Devices,
    Promise,
    check_promised_gpus,
    open_devices,
    promised_gpus,
    visible_gpus,
)
from job.engine import Engine, Plan, Progress
from job.evaluate import Evaluation, Evaluator
from job.progress import EpochBar
from job.recipe import Recipe, get_recipe
from job.watchdog import Watchdog


def train_and_evaluate(config: TrainConfig) -> Evaluation:
    """Train, save the model, and evaluate what was saved.

    Args:
        config: What to train, how, and where its artifacts go.

    Returns:
        The evaluation of the saved model, as in ``evaluation.json``.

    Raises:
        UserError: If the configuration, the data or a folder must be changed first.
        GpuMissingError: If a promised or required GPU cannot be used.
    """
    artifacts.prepare_output_dir(config.output_dir)
    devices = _open_devices(config)
    devices.rows_per_replica(config.global_batch_size)
    dataset = load_dataset(config.data)
    plan = make_plan(config, len(dataset.train_images))
    _log_start(plan, devices, dataset)
    recipe = get_recipe(config.recipe)
    manifest = artifacts.RunManifest(
        config.output_dir / artifacts.RUN, config, _describe_run(devices, dataset)
    )
    watchdog = Watchdog(config.stall_timeout_seconds)
    try:
        with _naming_batch_size(config.global_batch_size, devices.replicas):
            engine = Engine(recipe, devices, dataset, plan, config.learning_rate)
            _train(engine, devices, dataset, config.output_dir, watchdog)
        artifacts.save_model(engine.export(), config.output_dir / artifacts.MODEL)
        evaluation = evaluate_saved(
            config.output_dir, recipe, devices, dataset, config.seed, watchdog
        )
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        # What went wrong first is what the user must hear of.
        with contextlib.suppress(UserError):
            manifest.finish(
                "interrupted" if interrupted else "failed", f"{type(error).__name__}: {error}"
            )
        raise
    manifest.finish("done")
    return evaluation


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


def make_plan(config: TrainConfig, examples: int) -> Plan:
    """Work out the arithmetic of a run.

    Raises:
        UserError: If a batch is larger than the training set.
    """
    steps_per_epoch = examples // config.global_batch_size
    if not steps_per_epoch:
        raise UserError(
            f"--batch-size received {config.global_batch_size}, expected at most the {examples} "
            f"training images; lower --batch-size or raise --limit"
        )
    return Plan(config.global_batch_size, steps_per_epoch, config.epochs, config.seed)


def evaluate_output_dir(config: TrainConfig) -> Evaluation:
    """Evaluate the model of an output folder again.

    Args:
        config: Says which folder, data, recipe, seed and devices.

    Raises:
        UserError: If there is no model that fits the data, or a folder must be changed first.
        GpuMissingError: If a promised or required GPU cannot be used.
    """
    artifacts.require_model(config.output_dir / artifacts.MODEL)
    artifacts.prepare_output_dir(config.output_dir)
    _check_same_name(config)
    devices = _open_devices(config)
    dataset = load_dataset(config.data)
    _check_same_data(config.output_dir, dataset)
    recipe = get_recipe(config.recipe)
    watchdog = Watchdog(config.stall_timeout_seconds)
    return evaluate_saved(config.output_dir, recipe, devices, dataset, config.seed, watchdog)


def evaluate_saved(
    output_dir: Path,
    recipe: Recipe,
    devices: Devices,
    dataset: Dataset,
    seed: int,
    watchdog: Watchdog,
) -> Evaluation:
    """Load the saved model back, evaluate it, and write the evaluation and the prediction picture.

    Args:
        output_dir: Holds the model and receives the two artifacts.
        recipe: The recipe that trained it.
        devices: Where to evaluate.
        dataset: Its test images are evaluated.
        seed: Picks the test image of the picture.
        watchdog: Ends the process if the evaluation hangs.

    Raises:
        UserError: If there is no model that fits the data, or a file cannot be written.
    """
    path = output_dir / artifacts.MODEL
    # The file is float32 and so are its figures, also where GPUs round float32 to TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = artifacts.load_model(path)
    _check_fits(model, dataset, path)
    evaluator = Evaluator(model, recipe, devices, dataset.test_images, dataset.test_labels)
    with watchdog.watch("the evaluation of the saved model", compiling=True):
        evaluation = evaluator()
    artifacts.write_json(
        output_dir / artifacts.EVALUATION,
        {
            **evaluation.document(dataset.class_names),
            "model": artifacts.MODEL,
            "model_sha256": artifacts.sha256_of(path),
        },
    )
    _save_prediction(output_dir / artifacts.PREDICTION, model, dataset, seed)
    log.event(
        "evaluation",
        loss=evaluation.loss,
        accuracy=evaluation.accuracy,
        examples=evaluation.examples,
        output_dir=str(output_dir),
        message=f"saved model: test loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.2%} "
        f"of {evaluation.examples} images; artifacts in {output_dir}/",
    )
    return evaluation


def _open_devices(config: TrainConfig) -> Devices:
    gpus = len(visible_gpus())
    asked_for_cpu = config.devices.kind == "cpu"
    promise = Promise(0, "") if asked_for_cpu else promised_gpus(os.environ)
    check_promised_gpus(promise, gpus, config.require_gpus)
    return open_devices(config.devices, config.precision, config.jit)


def _train(
    engine: Engine, devices: Devices, dataset: Dataset, output_dir: Path, watchdog: Watchdog
) -> None:
    """Run the epochs, each followed by a validation on all test images."""
    plan = engine.plan
    evaluator = Evaluator(
        engine.model, engine.recipe, devices, dataset.test_images, dataset.test_labels
    )
    metrics = artifacts.MetricsFile(output_dir / artifacts.METRICS)
    with EpochBar(plan.epochs, plan.steps_per_epoch, enabled=not log.is_json()) as bar:
        for epoch in range(plan.epochs):
            start = time.perf_counter()
            progress = Progress()
            for progress in _watched(engine.train_epoch(epoch), watchdog, first=epoch == 0):
                _check_finite(progress, epoch)
                images = progress.steps * plan.global_batch_size
                bar.update(epoch + 1, progress.steps, f"loss {progress.loss / images:.4f}")
            seconds = time.perf_counter() - start
            with watchdog.watch("a validation", compiling=epoch == 0):
                validation = evaluator()
            record = _epoch_record(engine, epoch, progress, validation, seconds)
            metrics.append(record)
            log.event("epoch", **record, message=_epoch_line(record, plan.epochs))


def _watched(spans: Iterator[Progress], watchdog: Watchdog, *, first: bool) -> Iterator[Progress]:
    """Pass an epoch's spans on under the watchdog; a run's first span is compiled."""
    while True:
        with watchdog.watch("a span of training steps", compiling=first):
            progress = next(spans, None)
        if progress is None:
            return
        yield progress
        first = False


def _check_finite(progress: Progress, epoch: int) -> None:
    if not math.isfinite(progress.loss):
        raise JobError(
            f"the training loss became {progress.loss} in epoch {epoch + 1}, by step "
            f"{progress.steps} of it; lower --learning-rate, or try --precision float32"
        )


def _epoch_record(
    engine: Engine, epoch: int, progress: Progress, validation: Evaluation, seconds: float
) -> dict[str, Any]:
    images = progress.steps * engine.plan.global_batch_size
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * engine.plan.steps_per_epoch,
        "loss": progress.loss / images,
        "accuracy": progress.correct / images,
        "val_loss": validation.loss,
        "val_accuracy": validation.accuracy,
        "learning_rate": engine.learning_rate,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
    }


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['loss']:.4f}  "
        f"acc {record['accuracy']:.1%}  val_loss {record['val_loss']:.4f}  "
        f"val_acc {record['val_accuracy']:.1%}  {record['seconds']:.1f} s  "
        f"{record['images_per_second']:,.0f} img/s"
    )


def _log_start(plan: Plan, devices: Devices, dataset: Dataset) -> None:
    rows = devices.rows_per_replica(plan.global_batch_size)
    log.event(
        "start",
        dataset=dataset.name,
        train_examples=len(dataset.train_images),
        test_examples=len(dataset.test_images),
        replicas=devices.replicas,
        device_kind=devices.kind,
        precision=devices.precision,
        xla=devices.compilation.network,
        batch_size=plan.global_batch_size,
        rows_per_replica=rows,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.epochs,
        message=f"{dataset.name}: {len(dataset.train_images):,} training and "
        f"{len(dataset.test_images):,} test images; {devices.replicas} {devices.kind.upper()} "
        f"replica(s) in {devices.precision}; batch {plan.global_batch_size} = "
        f"{devices.replicas} x {rows}; {plan.epochs} epochs of {plan.steps_per_epoch} steps",
    )


def _describe_run(devices: Devices, dataset: Dataset) -> dict[str, Any]:
    return {
        "devices": list(devices.descriptions),
        "replicas": devices.replicas,
        "precision": devices.precision,
        "xla": devices.compilation.network,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "test_fingerprint": dataset.test_fingerprint,
            "train_examples": len(dataset.train_images),
            "test_examples": len(dataset.test_images),
        },
    }


def _check_same_name(config: TrainConfig) -> None:
    """Refuse another data set than the run's by its name, before anything is downloaded."""
    trained_on = artifacts.read_run(config.output_dir / artifacts.RUN).get("data")
    if trained_on and trained_on["name"] != config.data.dataset:
        raise UserError(
            f"--dataset received {config.data.dataset}, expected {trained_on['name']}, which the "
            f"run in {config.output_dir} was trained on; add --dataset {trained_on['name']}"
        )


def _check_same_data(output_dir: Path, dataset: Dataset) -> None:
    """Refuse to judge a model by other test images than those its run was validated on."""
    trained_on = artifacts.read_run(output_dir / artifacts.RUN).get("data")
    if trained_on and trained_on["test_fingerprint"] != dataset.test_fingerprint:
        raise UserError(
            f"received the test images of {dataset.name}, expected those that the run in "
            f"{output_dir} was validated on ({trained_on['name']}); give that run's --dataset, "
            f"--data-dir and --seed"
        )


def _check_fits(model: keras.Model, dataset: Dataset, path: Path) -> None:
    received = (*model.input_shape[1:], model.output_shape[-1])
    expected = (*dataset.test_images.shape[1:], len(dataset.class_names))
    if received != expected:
        raise UserError(
            f"{path} maps images and classes of shape {received}, expected {expected} for "
            f"{dataset.name}; name the --dataset that it was trained on"
        )


def _save_prediction(path: Path, model: keras.Model, dataset: Dataset, seed: int) -> None:
    """Draw what the model makes of one test image, picked from the seed."""
    index = int(np.random.default_rng(seed).integers(len(dataset.test_images)))
    image = dataset.test_images[index]
    images = image[np.newaxis].astype(np.float32) * np.float32(1.0 / 255.0)
    probabilities = keras.ops.convert_to_numpy(model(images, training=False))[0]
    true_label = int(dataset.test_labels[index])
    with artifacts.replacing(path) as temporary:
        plots.save_prediction(temporary, image, probabilities, dataset.class_names, true_label)
