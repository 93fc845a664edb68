"""The saved model: loaded back from its file, evaluated, and looked at."""

from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import log, plots
from job.augment import resample_by_op
from job.config import TrainConfig, UserError
from job.dataset import Dataset, load_dataset
from job.devices import Devices, open_promised_devices
from job.evaluate import Evaluation, Evaluator
from job.manifest import earlier_manifest
from job.model_file import load_model
from job.output import EVALUATION, MODEL, PREDICTION, OutputDir, sha256_of
from job.predictions import Predictions, most_confident_mistakes
from job.recipe import Recipe, get_recipe
from job.report import try_to_write_report
from job.watchdog import Watchdog

# What the report has room for.
_MISTAKES = 16
_SAMPLES = 6
_SAMPLE_EPOCHS = 5


def evaluate_output_dir(config: TrainConfig, output: OutputDir) -> Evaluation:
    """Evaluate the model of an output folder again.

    Args:
        config: Says which data, recipe, seed and devices.
        output: The folder.

    Raises:
        UserError: If there is no model that fits the data, or a folder must be changed first.
        GpuMissingError: If a promised or required GPU cannot be used.
    """
    _check_same_name(config, output.path)
    devices = open_promised_devices(config)
    dataset = load_dataset(config.data)
    _check_same_data(output.path, dataset)
    recipe = get_recipe(config.recipe)
    watchdog = Watchdog(config.stall_timeout_seconds)
    evaluation = evaluate_saved(output, recipe, devices, dataset, config.seed, watchdog)
    try_to_write_report(output)
    return evaluation


def evaluate_saved(
    output: OutputDir,
    recipe: Recipe,
    devices: Devices,
    dataset: Dataset,
    seed: int,
    watchdog: Watchdog,
) -> Evaluation:
    """Load the saved model back, evaluate it, and write what is found and a picture.

    Args:
        output: Holds the model and receives evaluation, predictions and prediction picture.
        recipe: The recipe that trained it.
        devices: Where to evaluate.
        dataset: Its test images are evaluated.
        seed: Picks the test image of the picture.
        watchdog: Ends the process if the evaluation hangs.

    Raises:
        UserError: If there is no model that fits the data, or a file cannot be written.
    """
    path = output.path / MODEL
    # The file is float32 and so are its figures, also where GPUs round float32 to TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = load_model(path)
    _check_fits(model, dataset, path)
    evaluator = Evaluator(model, recipe, devices, dataset.test_images, dataset.test_labels)
    with watchdog.watch("the evaluation of the saved model", compiling=True):
        evaluation, probabilities = evaluator.predict()
    _save_prediction(output, model, dataset, seed)
    _keep_for_report(output, recipe, dataset, probabilities, seed)
    # Last, because it tells which model file everything belongs to.
    output.write_json(
        EVALUATION,
        {
            **evaluation.document(dataset.class_names),
            "model": MODEL,
            "model_sha256": sha256_of(path),
        },
    )
    log.event(
        "evaluation",
        loss=evaluation.loss,
        accuracy=evaluation.accuracy,
        examples=evaluation.examples,
        output_dir=str(output.path),
        message=f"saved model: test loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.2%} "
        f"of {evaluation.examples} images; artifacts in {output.path}/",
    )
    return evaluation


def _check_same_name(config: TrainConfig, output_dir: Path) -> None:
    """Refuse another data set than the run's by its name, before anything is downloaded."""
    trained_on = earlier_manifest(output_dir).get("data")
    if trained_on and trained_on["name"] != config.data.dataset:
        raise UserError(
            f"--dataset received {config.data.dataset}, expected {trained_on['name']}, which the "
            f"run in {output_dir} was trained on; add --dataset {trained_on['name']}"
        )


def _check_same_data(output_dir: Path, dataset: Dataset) -> None:
    """Refuse to judge a model by other test images than those its run was validated on."""
    trained_on = earlier_manifest(output_dir).get("data")
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


def _save_prediction(output: OutputDir, model: keras.Model, dataset: Dataset, seed: int) -> None:
    """Draw what the model makes of one test image, picked from the seed."""
    index = int(np.random.default_rng(seed).integers(len(dataset.test_images)))
    image = dataset.test_images[index]
    images = image[np.newaxis].astype(np.float32) * np.float32(1.0 / 255.0)
    probabilities = keras.ops.convert_to_numpy(model(images, training=False))[0]
    true_label = int(dataset.test_labels[index])
    with output.replacing(PREDICTION) as temporary:
        plots.save_prediction(temporary, image, probabilities, dataset.class_names, true_label)


def _keep_for_report(
    output: OutputDir,
    recipe: Recipe,
    dataset: Dataset,
    probabilities: npt.NDArray[np.float32],
    seed: int,
) -> None:
    """Write ``predictions.npz``."""
    run = earlier_manifest(output.path)
    seed = run["config"]["seed"] if run else seed
    epochs = min(run["config"]["epochs"], _SAMPLE_EPOCHS) if run else _SAMPLE_EPOCHS
    mistakes = most_confident_mistakes(dataset.test_labels, probabilities, _MISTAKES)
    # The first image of each class.
    _, rows = np.unique(dataset.train_labels, return_index=True)
    rows = rows[:_SAMPLES]
    originals = dataset.train_images[rows]
    Predictions(
        labels=dataset.test_labels,
        probabilities=probabilities,
        mistakes=mistakes,
        mistake_images=dataset.test_images[mistakes],
        originals=originals,
        original_labels=dataset.train_labels[rows],
        augmented=augmented_sample(recipe, originals, seed, epochs),
    ).save(output)


def augmented_sample(
    recipe: Recipe, images: npt.NDArray[np.uint8], seed: int, epochs: int
) -> npt.NDArray[np.uint8]:
    """Augment images as a training from this seed augments those at the start of each epoch.

    Args:
        recipe: Says how.
        images: [images, height, width, channels] uint8.
        seed: The run's seed.
        epochs: How many of the first epochs.

    Returns:
        [images, epochs, height, width, channels] uint8.
    """
    scaled = tf.cast(images, tf.float32) * (1.0 / 255.0)
    augmented = [
        recipe.augment(
            scaled,
            recipe.draw_augmentation(seed, tf.constant(epoch), 1, len(images))[0],
            resample_by_op,
        )
        for epoch in range(epochs)
    ]
    pixels = np.rint(np.stack([one.numpy() for one in augmented], axis=1) * 255.0)
    return np.clip(pixels, 0, 255).astype(np.uint8)
