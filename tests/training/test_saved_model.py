import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from msgspec.structs import replace

from job import log
from job.cluster.scheduler import RunIdentity
from job.config import TrainConfig, UserError
from job.data import Dataset
from job.recipes import classic
from job.recipes._augment import resample_by_gather
from job.run.folder import MODEL, PREDICTIONS, OutputDir, sha256_of
from job.run.manifest import RunManifest
from job.run.predictions import Predictions
from job.run.record import DataRecord
from job.run.stop import Watchdog
from job.training import saved_model
from job.training.engine import Engine, Plan
from job.training.evaluate import Evaluator
from job.training.network import build_network
from job.training.saved_model import load_model, save_model
from tests.conftest import MakeDevices
from tests.run_folders import TRAINING


def test_a_loaded_model_has_the_same_bits_and_can_be_trained_further(
    tmp_path: Path, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    plan = Plan(global_batch_size=64, steps_per_epoch=4, epochs=1, seed=42)
    engine = Engine(classic.RECIPE, make_devices(2), small_dataset, plan, 1e-3)
    list(engine.train_epoch(0))
    saved = engine.export()
    save_model(saved, OutputDir(tmp_path), "model.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["model.h5"]

    loaded = load_model(tmp_path / "model.h5")
    assert len(loaded.optimizer.variables) == 2 + 2 * len(saved.trainable_variables)
    for received, expected in (
        (loaded.weights, saved.weights),
        (loaded.optimizer.variables, saved.optimizer.variables),
    ):
        for one, two in zip(received, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert any(np.abs(v.numpy()).max() > 0 for v in loaded.optimizer.variables[2:])

    images = small_dataset.train_images[:64] / np.float32(255)
    labels = np.eye(10, dtype=np.float32)[small_dataset.train_labels[:64]]
    for model in (saved, loaded):
        model.get_layer("dropout").rate = 0.0
        model.train_on_batch(images, labels)
    for one, two in zip(loaded.weights, saved.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=0, atol=1e-7)


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model file"):
        load_model(tmp_path / "model.h5")
    (tmp_path / "notes.txt").write_bytes(b"no HDF5")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "notes.txt")
    assert str(error.value) == (
        f"received {tmp_path}/notes.txt, which cannot be used as a model (Unable to synchronously "
        f"open file (file signature not found)), expected an HDF5 file that train wrote "
        f"(cifar10_model.h5); use such a file, or the --output-dir that contains one; if the model "
        f"file of a run is damaged, run its train command again to rewrite it"
    )
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["values"] = [1, 2]
    with pytest.raises(UserError, match="cannot be used as a model"):
        load_model(tmp_path / "other.h5")


def test_a_volume_that_refuses_locks_does_not_matter(model_output: OutputDir) -> None:
    path = model_output.path / MODEL
    with path.open("rb") as holder:
        # A lock of another process also stops HDF5, like a volume that refuses locks.
        fcntl.flock(holder, fcntl.LOCK_EX)
        load_model(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MODEL, lambda folder: load_model(folder / MODEL)),
        (MODEL, lambda folder: sha256_of(folder / MODEL)),
        (PREDICTIONS, Predictions.load),
    ],
    ids=["model", "checksum", "predictions"],
)
@pytest.mark.parametrize(
    ("target", "cause"),
    [
        # Reading from the start of this file is an input/output error: nothing is mapped there.
        ("/proc/self/mem", "Input/output error; fix the volume"),
        ("loop", "Too many levels of symbolic links; fix the path or the volume"),
    ],
)
def test_a_system_error_is_not_reported_as_damage(
    tmp_path: Path, name: str, read: Callable[[Path], object], target: str, cause: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value) == f"cannot read {tmp_path / name}: {cause}, then run again"


def test_the_name_of_a_model_file_does_not_matter(tmp_path: Path, model: keras.Model) -> None:
    save_model(model, OutputDir(tmp_path), "mine")
    for one, two in zip(load_model(tmp_path / "mine").weights, model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_an_impossible_path_is_reported_as_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model file"):
        load_model(tmp_path / ("x" * 300))


@pytest.fixture
def trained(model_output: OutputDir, small_dataset: Dataset) -> TrainConfig:
    """The folder of a run on the small data set, with an untrained model."""
    config = TrainConfig(output_dir=model_output.path, dataset="synthetic", epochs=3)
    data = DataRecord(small_dataset.name, small_dataset.fingerprint, small_dataset.test_fingerprint)
    manifest = RunManifest(model_output, RunIdentity(None))
    manifest.begin(config)
    manifest.start_training(config, replace(TRAINING, data=data), 0, [])
    manifest.finish("done")
    return config


def test_a_model_is_evaluated_only_on_the_data_of_its_run(
    trained: TrainConfig, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    devices, watchdog = make_devices(1), Watchdog(600, lambda: None)

    def evaluate(config: TrainConfig, load: Callable[[TrainConfig], Dataset]) -> None:
        output = OutputDir(config.output_dir)
        saved_model.evaluate_output_dir(config, output, devices, load, watchdog)

    path = trained.output_dir / "evaluation.json"
    before = path.read_bytes()
    reversed_images = small_dataset.test_images[::-1]
    other = dataclasses.replace(small_dataset, test_images=reversed_images)
    with pytest.raises(UserError, match=r"received test images of synthetic that differ"):
        evaluate(trained, lambda config: other)
    other_recipe = dataclasses.replace(trained, recipe="fast")
    advice = "--recipe received fast, expected classic, which .*; pass --recipe classic"
    with pytest.raises(UserError, match=advice):
        evaluate(other_recipe, lambda config: small_dataset)
    with pytest.raises(UserError, match="received cifar10, expected synthetic"):
        evaluate(
            dataclasses.replace(trained, dataset="cifar10"),
            lambda config: pytest.fail("it was loaded"),
        )
    # Without run.json, only the model itself shows which images it accepts.
    (trained.output_dir / "run.json").unlink()
    grey = dataclasses.replace(
        small_dataset,
        train_images=small_dataset.train_images[..., :1],
        test_images=small_dataset.test_images[..., :1],
    )
    with pytest.raises(UserError, match=r"\(32, 32, 3, 10\), expected \(32, 32, 1, 10\)"):
        evaluate(trained, lambda config: grey)
    assert path.read_bytes() == before
    evaluate(trained, lambda config: small_dataset)
    assert path.read_bytes() != before


def test_an_evaluation_compiled_ahead_evaluates_the_file(
    trained: TrainConfig,
    model: keras.Model,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, devices = OutputDir(trained.output_dir), make_devices(1)
    path = trained.output_dir / "evaluation.json"

    def evaluate(prepared: Evaluator | None) -> tuple[bytes, list[keras.Model]]:
        evaluated = []
        predict = Evaluator.predict

        def note(evaluator: Evaluator) -> Any:
            evaluated.append(evaluator.model)
            return predict(evaluator)

        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "predict", note)
            saved_model.evaluate_saved(output, classic.RECIPE, devices, small_dataset, 0, prepared)
        return path.read_bytes(), evaluated

    def prepare(network: keras.Model) -> Evaluator:
        return saved_model.prepare_evaluation(network, classic.RECIPE, devices, small_dataset)

    expected, _ = evaluate(None)
    prepared = prepare(model)
    assert prepared.predict()[0].loss != json.loads(expected)["loss"]  # it has its own weights
    assert evaluate(prepared) == (expected, [prepared.model])
    layers = [*model.layers[:-1], keras.layers.Dense(10, "sigmoid")]
    other = prepare(keras.Sequential([keras.Input((32, 32, 3)), *layers]))
    content, evaluated = evaluate(other)
    assert content == expected
    assert evaluated != [other.model]


def test_a_picture_that_cannot_be_drawn_does_not_prevent_the_evaluation(
    trained: TrainConfig,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = OutputDir(trained.output_dir)
    output.write_text("prediction.png", "of an earlier model")
    output.remove([output.path / "evaluation.json"])

    def break_off(*_arguments: Any) -> None:
        raise OSError("no font")

    monkeypatch.setattr("job.report.pictures.save_prediction", break_off)
    log.configure("json")
    saved_model.evaluate_saved(output, classic.RECIPE, make_devices(1), small_dataset, 0)
    warning, evaluation = map(json.loads, capsys.readouterr().out.splitlines())
    assert (warning["event"], warning["level"]) == ("not_drawn", "warning")
    assert evaluation["event"] == "evaluation"
    names = {path.name for path in output.path.iterdir()}
    assert names == {"cifar10_model.h5", "evaluation.json", "predictions.npz", "run.json"}


class Own(keras.optimizers.SGD):  # type: ignore[misc]
    """A custom optimizer, which Keras cannot load."""


def test_stock_keras_loads_the_file_of_a_model_with_a_custom_optimizer(
    tmp_path: Path, small_dataset: Dataset
) -> None:
    recipe = dataclasses.replace(
        classic.RECIPE, build_optimizer=lambda rate, steps: Own(rate, momentum=0.9)
    )
    weights = {"conv1/kernel": np.ones((3, 3, 3, 32), np.float32)}
    recipe = dataclasses.replace(recipe, fixed_weights=lambda images: weights)
    model, _ = build_network(recipe, 1, 10, 0.1, 5, small_dataset)
    # The optimizer has no variables for fixed weights, but the file contains the fixed weights.
    assert len(model.optimizer.variables) == 2 + len(model.trainable_variables) - 1
    save_model(model, OutputDir(tmp_path), "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    images = small_dataset.test_images[:64] / np.float32(255)
    one_hot = keras.utils.to_categorical(small_dataset.test_labels[:64], 10)
    np.testing.assert_allclose(
        loaded.evaluate(images, one_hot, verbose=0), model.evaluate(images, one_hot, verbose=0)
    )
    assert type(loaded.optimizer) is keras.optimizers.SGD
    np.testing.assert_array_equal(loaded.layers[0].kernel, weights["conv1/kernel"])
    # The file does not contain the momentums.
    assert (tmp_path / "model.h5").stat().st_size < 1.1 * 4 * model.count_params()
    with pytest.raises(UserError, match=r"model.h5 has no optimizer state, because its optimizer"):
        load_model(tmp_path / "model.h5")


def test_the_augmented_sample_equals_the_augmentation_of_a_training(small_dataset: Dataset) -> None:
    images, recipe = small_dataset.train_images[:4], classic.RECIPE
    sample = saved_model.augmented_sample(recipe, images, 9, 5)
    for epoch in range(5):
        draws = recipe.draw_augmentation(9, tf.constant(epoch), 8, 64)[0, :4]
        scaled = tf.constant(images / np.float32(255))
        expected = recipe.augment(scaled, draws, resample_by_gather).numpy() * 255
        assert np.abs(expected - sample[:, epoch]).max() <= 0.51
