"""A whole training run: from a configuration to the artifacts in the output folder."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job import artifacts, log, plots
from job.config import TrainConfig, UserError
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
    try:
        engine = Engine(recipe, devices, dataset, plan, config.learning_rate)
        _train(engine, devices, dataset, config)
        artifacts.save_model(engine.export(), config.output_dir / artifacts.MODEL)
        evaluation = evaluate_saved(config.output_dir, recipe, devices, dataset, config.seed)
    except tf.errors.ResourceExhaustedError as error:
        reason = (
            f"out of memory on the devices with --batch-size {config.global_batch_size} "
            f"({plan.global_batch_size // devices.replicas} images a replica); lower --batch-size"
        )
        manifest.finish("failed", reason)
        raise UserError(reason) from error
    except KeyboardInterrupt:
        manifest.finish("interrupted", "interrupted from the keyboard")
        raise
    except Exception as error:
        manifest.finish("failed", f"{type(error).__name__}: {error}")
        raise
    manifest.finish("done")
    return evaluation


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
    artifacts.prepare_output_dir(config.output_dir)
    devices = _open_devices(config)
    dataset = load_dataset(config.data)
    recipe = get_recipe(config.recipe)
    return evaluate_saved(config.output_dir, recipe, devices, dataset, config.seed)


def evaluate_saved(
    output_dir: Path, recipe: Recipe, devices: Devices, dataset: Dataset, seed: int
) -> Evaluation:
    """Load the saved model back, evaluate it, and write the evaluation and the prediction picture.

    Args:
        output_dir: Holds the model and receives the two artifacts.
        recipe: The recipe that trained it.
        devices: Where to evaluate.
        dataset: Its test images are evaluated.
        seed: Picks the test image of the picture.

    Raises:
        UserError: If there is no model that fits the data, or a file cannot be written.
    """
    path = output_dir / artifacts.MODEL
    with devices.strategy.scope():
        model = artifacts.load_model(path)
    _check_fits(model, dataset, path)
    evaluation = Evaluator(model, recipe, devices, dataset.test_images, dataset.test_labels)()
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


def _train(engine: Engine, devices: Devices, dataset: Dataset, config: TrainConfig) -> None:
    """Run the epochs, each followed by a validation on all test images."""
    plan = engine.plan
    evaluator = Evaluator(
        engine.model, engine.recipe, devices, dataset.test_images, dataset.test_labels
    )
    watchdog = Watchdog(config.stall_timeout_seconds)
    metrics = artifacts.MetricsFile(config.output_dir / artifacts.METRICS)
    with EpochBar(plan.epochs, plan.steps_per_epoch, enabled=not log.is_json()) as bar:
        for epoch in range(plan.epochs):
            start = time.perf_counter()
            progress = Progress()
            for progress in _watched(engine.train_epoch(epoch), watchdog, compiled=epoch > 0):
                images = progress.steps * plan.global_batch_size
                bar.update(epoch + 1, progress.steps, f"loss {progress.loss / images:.4f}")
            seconds = time.perf_counter() - start
            if epoch == 0:
                validation = evaluator()
            else:
                with watchdog.watch("validation"):
                    validation = evaluator()
            record = _epoch_record(engine, epoch, progress, validation, seconds)
            metrics.append(record)
            log.event("epoch", **record, message=_epoch_line(record, plan.epochs))


def _watched(
    spans: Iterator[Progress], watchdog: Watchdog, *, compiled: bool
) -> Iterator[Progress]:
    """Pass spans on under the watchdog, all but a run's first: that one is compiled."""
    if not compiled:
        yield next(spans)
    while True:
        with watchdog.watch("a span of training steps"):
            progress = next(spans, None)
        if progress is None:
            return
        yield progress


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
            "train_examples": len(dataset.train_images),
            "test_examples": len(dataset.test_images),
        },
    }


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
