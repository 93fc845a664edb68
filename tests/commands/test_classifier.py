from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from job.cluster.devices import Compilation
from job.commands import predict
from job.commands.predict import Classifier, Predictor, load_classifier
from job.config import UserError
from job.data import Dataset
from job.recipes import classic, unchanged
from job.run.folder import EVALUATION, MODEL, OutputDir, sha256_of
from job.training.saved_model import save_model
from tests.conftest import CLASS_NAMES, MakeDevices


@pytest.mark.parametrize(
    ("replicas", "compilation"),
    [(1, None), (1, Compilation(True, True, loops=True)), (4, None)],
    ids=["1", "1-compiled", "4"],
)
@pytest.mark.parametrize("images", [1, 17, 40])
def test_probabilities_are_the_models_whatever_the_replicas_and_the_padding(
    model: keras.Model,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    replicas: int,
    compilation: Compilation | None,
    images: int,
) -> None:
    devices = make_devices(replicas, compilation=compilation)
    predictor = Predictor(Classifier(model, CLASS_NAMES, (unchanged,)), devices, 40 // replicas)
    assert predictor.batch_size == 40
    pixels = small_dataset.test_images[:images]
    received = predictor(pixels)
    expected = model.predict(pixels / np.float32(255), verbose=0)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_views_are_averaged(
    model: keras.Model, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    views = (unchanged, lambda images: images[:, :, ::-1])
    predictor = Predictor(Classifier(model, CLASS_NAMES, views), make_devices(1), 8)
    images = small_dataset.test_images[:8] / np.float32(255)
    expected = [model.predict(view(images), verbose=0) for view in views]
    received = predictor(small_dataset.test_images[:8])
    np.testing.assert_allclose(received, np.mean(expected, axis=0), atol=1e-6)


def test_without_its_evaluation_a_models_classes_are_numbers(
    model_output: OutputDir, make_devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_output.path / MODEL
    assert load_classifier(path, make_devices(1)).class_names == CLASS_NAMES
    assert capsys.readouterr().err == ""
    for document in (
        {"classes": dict.fromkeys(CLASS_NAMES), "model_sha256": "of another file"},
        {"classes": dict.fromkeys(CLASS_NAMES[:9]), "model_sha256": sha256_of(path)},
        {},
    ):
        model_output.write_json(EVALUATION, document)
        names = load_classifier(path, make_devices(1)).class_names
        assert names == tuple(f"class {label}" for label in range(10))
        assert "its classes go by numbers" in capsys.readouterr().err


def test_the_views_are_those_of_the_recipe_that_trained_the_model(
    model_output: OutputDir, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, views = model_output.path / MODEL, (unchanged, unchanged)
    recipe = replace(classic.RECIPE, tta_views=views)
    monkeypatch.setattr(predict, "get_recipe", {"classic": recipe}.__getitem__)
    assert load_classifier(path, make_devices(1)).views == (unchanged,)
    model_output.write_json("run.json", {"config": {"recipe": "classic"}})
    assert load_classifier(path, make_devices(1)).views == views
    model_output.write_json("run.json", {"config": {"recipe": "of another version"}})
    assert load_classifier(path, make_devices(1)).views == (unchanged,)


def save_model_of(folder: Path, *shape: int | None) -> Path:
    """Save a model of inputs of this shape."""
    layers = keras.layers
    first = layers.GlobalAveragePooling2D() if len(shape) == 3 else layers.Flatten()
    model = keras.Sequential([keras.Input(shape), first, layers.Dense(10)])
    model.compile("adam", "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    save_model(model, OutputDir(folder), MODEL)
    return folder / MODEL


def test_a_model_of_grey_images_computes_them(tmp_path: Path, make_devices: MakeDevices) -> None:
    loaded = load_classifier(save_model_of(tmp_path, 24, 20, 1), make_devices(1))
    assert loaded.image_shape == (24, 20, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 24, 20, 1), np.uint8)
    received = Predictor(loaded, make_devices(1), 4)(pixels)
    expected = loaded.model.predict(pixels / np.float32(255), verbose=0)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((24, 24, 4), r"takes images of 4 channels, expected 1 \(grey\) or 3 \(RGB\)"),
        ((None, None, 3), r"expected \(None, height, width, channels\); name a model of images"),
        ((7, 3), r"takes inputs of shape \(None, 7, 3\), expected \(None, height, width, channels"),
    ],
)
def test_a_model_of_other_inputs_is_refused(
    tmp_path: Path, make_devices: MakeDevices, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_classifier(save_model_of(tmp_path, *shape), make_devices(1))
