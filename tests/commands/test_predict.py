import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import keras
import msgspec
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from PIL import Image

from job.cluster.devices import Compilation
from job.cluster.scheduler import NO_RUN
from job.commands import predict
from job.commands.cli import cli
from job.commands.predict import (
    Predictor,
    load_predictor,
    predict_batches,
    predict_images,
)
from job.config import TrainConfig, UserError
from job.data import Dataset
from job.data.image_files import find_images
from job.recipes import classic, unchanged
from job.run.folder import EVALUATION, MODEL, OutputDir
from job.run.manifest import RunManifest
from job.run.record import EvaluationRecord, decode, encode
from job.run.stop import StopRequest
from job.training.saved_model import save_model
from tests.conftest import CLASS_NAMES, MakeDevices
from tests.run_folders import change

NAN = keras.initializers.Constant(np.nan)
STEMS = ("0", "1", "2", "345", "6")


@pytest.fixture
def photos(tmp_path: Path, small_dataset: Dataset) -> Path:
    """Five test images as PNG files, and a broken one between them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, pixels in zip(STEMS, small_dataset.test_images[:5], strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "2a.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def run(
    model_output: OutputDir,
    photos: Path,
    make_devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Predict the photos."""
    monkeypatch.chdir(photos.parent)

    def run(top: int = 3, names: Sequence[str] = (photos.name,), **options: Any) -> None:
        sources = find_images(names)
        predict_images(make_devices(1), model_output.path / MODEL, sources, top, **options)

    return run


@pytest.mark.parametrize(
    ("replicas", "compilation"),
    [(1, None), (1, Compilation(True, True, loops=True)), (4, None)],
    ids=["1", "1-compiled", "4"],
)
def test_probabilities_do_not_depend_on_replicas_and_padding(
    model: keras.Model,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    replicas: int,
    compilation: Compilation | None,
) -> None:
    devices = make_devices(replicas, compilation=compilation)
    predictor = Predictor(model, CLASS_NAMES, (unchanged,), devices, 40 // replicas)
    assert predictor.batch_size == 40
    expected = model.predict(small_dataset.test_images[:40] / np.float32(255), verbose=0)
    for images in (1, 17, 40):
        received = predictor(small_dataset.test_images[:images])
        np.testing.assert_allclose(received, expected[:images], rtol=0, atol=1e-6)


def test_views_are_averaged(
    model: keras.Model, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    views = (unchanged, lambda images: images[:, :, ::-1])
    predictor = Predictor(model, CLASS_NAMES, views, make_devices(1), 8)
    images = small_dataset.test_images[:8] / np.float32(255)
    expected = [model.predict(view(images), verbose=0) for view in views]
    received = predictor(small_dataset.test_images[:8])
    np.testing.assert_allclose(received, np.mean(expected, axis=0), atol=1e-6)


def test_classes_are_numbers_without_an_evaluation_of_the_model(
    model_output: OutputDir, make_devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_output.path / MODEL
    assert load_predictor(path, make_devices(1)).class_names == CLASS_NAMES
    assert capsys.readouterr().err == ""
    whole = decode((model_output.path / EVALUATION).read_bytes(), EvaluationRecord)
    nine = {
        "classes": {name: whole.classes[name] for name in CLASS_NAMES[:9]},
        "confusion_matrix": [row[:9] for row in whole.confusion_matrix[:9]],
        "examples": 9,
    }
    for document in (
        encode(msgspec.structs.replace(whole, model_sha256="of another file")),
        encode(msgspec.structs.replace(whole, **nine)),
        b"{}",
    ):
        model_output.write_bytes(EVALUATION, document)
        names = load_predictor(path, make_devices(1)).class_names
        assert names == tuple(f"class {label}" for label in range(10))
        assert "its classes are shown as numbers" in capsys.readouterr().err


def test_views_come_from_the_recipe_that_trained_the_model(
    model: keras.Model,
    small_dataset: Dataset,
    model_output: OutputDir,
    make_devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, views = model_output.path / MODEL, (unchanged, tf.zeros_like)
    recipe = replace(classic.RECIPE, tta_views=views, tta_weights=(0.75, 0.25))
    monkeypatch.setattr(classic, "RECIPE", recipe)
    assert load_predictor(path, make_devices(1)).views == (unchanged,)
    RunManifest(model_output, NO_RUN).begin(TrainConfig())
    predictor = load_predictor(path, make_devices(1))
    assert predictor.views == views
    image = small_dataset.test_images[:1]
    plain, dark = (model.predict(one / np.float32(255), verbose=0) for one in (image, image * 0))
    np.testing.assert_allclose(predictor(image), 0.75 * plain + 0.25 * dark, atol=1e-6)
    change(model_output.path, recipe="of another version")
    assert load_predictor(path, make_devices(1)).views == (unchanged,)


def save_model_of(folder: Path, *shape: int | None) -> Path:
    """Save a model with inputs of this shape."""
    layers = keras.layers
    first = layers.GlobalAveragePooling2D() if len(shape) == 3 else layers.Flatten()
    model = keras.Sequential([keras.Input(shape), first, layers.Dense(10, "softmax")])
    model.compile("adam", "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    save_model(model, OutputDir(folder), MODEL)
    return folder / MODEL


def test_a_model_of_grey_images_predicts_them(tmp_path: Path, make_devices: MakeDevices) -> None:
    path = save_model_of(tmp_path, 24, 20, 1)
    predictor = load_predictor(path, make_devices(1), 4)
    assert predictor.image_shape == (24, 20, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 24, 20, 1), np.uint8)
    expected = keras.models.load_model(path).predict(pixels / np.float32(255), verbose=0)
    np.testing.assert_allclose(predictor(pixels), expected, rtol=0, atol=1e-6)

    Image.fromarray(pixels[0, ..., 0]).save(tmp_path / "a.png")
    sources = find_images([str(tmp_path / "a.png")])
    predict_images(make_devices(1), path, sources, 1, png=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=-1).max() == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((24, 24, 4), r"requires images with 4 channels, expected 1 \(grey\) or 3 \(RGB\)"),
        ((None, None, 3), r"expected \(None, height, width, channels\); begin it with keras"),
        ((7, 3), r"has inputs of shape \(None, 7, 3\), expected \(None, height, width, channels"),
    ],
)
def test_a_model_of_other_inputs_is_rejected(
    tmp_path: Path, make_devices: MakeDevices, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_predictor(save_model_of(tmp_path, *shape), make_devices(1))


def classifier(*ends: Any) -> keras.Model:
    """Make a network of 8x8 images with one output per given layer."""
    images = keras.Input((8, 8, 3))
    features = keras.layers.Flatten()(images)
    return keras.Model(images, [end(features) for end in ends])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda dense: classifier(dense(10)), "in rows that sum to"),
        (lambda dense: classifier(dense(10, "sigmoid")), "in rows that sum to"),
        (lambda dense: classifier(dense(10, "softmax", bias_initializer=NAN)), "from nan to nan"),
        (lambda dense: classifier(dense(1, "sigmoid")), r"has outputs of shape \(None, 1\)"),
        (lambda dense: classifier(dense(2), dense(3)), r"of shape \[\(None, 2\), \(None, 3\)\]"),
        (
            lambda dense: keras.Sequential([keras.Input((8, 8, 3)), dense(10, "softmax")]),
            r"has outputs of shape \(None, 8, 8, 10\)",
        ),
    ],
    ids=["logits", "sigmoids", "nan", "one", "several", "map"],
)
def test_a_model_whose_outputs_are_not_probabilities_is_rejected(
    photos: Path,
    make_devices: MakeDevices,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Any], keras.Model],
    problem: str,
) -> None:
    make(keras.layers.Dense).save(photos.parent / MODEL)
    with pytest.raises(UserError, match=problem):
        predict_images(make_devices(1), photos.parent / MODEL, find_images([str(photos)]), 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_saved_by_keras_can_predict(
    tmp_path: Path, make_devices: MakeDevices, compiled: bool
) -> None:
    model = classifier(keras.layers.Dense(3, "softmax", dtype="mixed_bfloat16"))
    if compiled:
        model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
        model.train_on_batch(np.ones((2, 8, 8, 3)), np.ones((2, 3)))
    model.save(tmp_path / MODEL)
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    received = load_predictor(tmp_path / MODEL, make_devices(1))(images)
    expected = model(images / np.float32(255)).numpy()
    np.testing.assert_allclose(received, expected.astype(np.float32), atol=0.01)


def test_all_batches_use_one_traced_function(
    model: keras.Model, photos: Path, make_devices: MakeDevices
) -> None:
    traced = []

    def view(images: Any) -> Any:
        traced.append(images.shape)
        return images

    predictor = Predictor(model, CLASS_NAMES, (view,), make_devices(1), 4)
    batches = list(predict_batches(predictor, find_images([str(photos)]), 2))
    assert [len(batch) for batch in batches] == [4, 2]
    assert traced == [(4, 32, 32, 3)]


def test_text_lines_are_aligned_and_broken_images_reported_on_stderr(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "1 of 6 images could not be read; each is named above;"
    with pytest.raises(UserError, match=message):
        run()
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == [f"photos/{name}.png" for name in STEMS]
    assert len({line.index("%  (kind ") for line in lines}) == 1
    assert all(line.endswith("%)") and line.count("kind ") == 3 for line in lines)
    broken, summary = errors.splitlines()
    assert broken == "cifar10-job: photos/2a.png: unknown image format"
    assert summary.startswith("cifar10-job: 5 images in ")


def test_json_lines_contain_every_image_in_order(
    run: Any,
    model: keras.Model,
    small_dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "1 of 6 images could not be read; each has an error line on stdout;"
    with pytest.raises(UserError, match=message):
        run(top=99, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).stem for line in lines] == [*STEMS[:3], "2a", *STEMS[3:]]
    assert lines.pop(3) == {"path": "photos/2a.png", "error": "unknown image format"}
    expected = model.predict(small_dataset.test_images[:5] / np.float32(255), verbose=0)
    for line, probabilities in zip(lines, expected, strict=True):
        assert line.keys() == {"path", "predictions"}
        values = [one["probability"] for one in line["predictions"]]
        assert values == sorted(values, reverse=True)
        received = {one["class"]: one["probability"] for one in line["predictions"]}
        assert [received[name] for name in CLASS_NAMES] == pytest.approx(probabilities, abs=1e-6)


def test_a_single_class_is_printed_without_brackets(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        run(top=1)
    assert "(" not in capsys.readouterr().out


def test_the_message_about_the_picture_counts_the_images_left_out(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "PICTURES", 4)
    (tmp_path / "grid.png").write_text("an earlier file")
    with pytest.raises(UserError, match="1 of 6 images"):
        run(png=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"cifar10-job: wrote {tmp_path}/grid.png with the first 4 images; 1 left out"


def test_a_single_unreadable_image_causes_one_error_line(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        run(names=["photos/2a.png"])
    assert str(error.value) == (
        "cannot read photos/2a.png: unknown image format; pass an image, or a folder with images"
    )
    assert capsys.readouterr() == ("", "")


def test_an_empty_folder_causes_one_error_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read empty: no file in this folder has the suffix"):
        run(names=["empty"])
    assert capsys.readouterr() == ("", "")


def test_invalid_arguments_are_rejected_before_anything_is_computed(
    model_output: OutputDir, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr("job.commands.cli.load_tensorflow", pytest.fail)
    before = (photos / "0.png").read_bytes()
    for arguments, message in (
        ("", "Missing argument 'IMAGE...'"),
        ("photos --top 0", "'--top'"),
        ("photos --model nowhere.h5", "no model file nowhere.h5"),
        ("photos --model .", "received '.', expected a file that can be read"),
        ("photos --png grid.jpg", "expected a name that ends in .png"),
        ("photos --png no/grid.png", "create no, or use another folder"),
        ("photos --png photos/0.png", "received --png photos/0.png, which is one of the images"),
        ("photos/0.png --png ./photos/0.png", "which is one of the images to predict"),
    ):
        command = ["predict", *arguments.split(), "--output-dir", "output"]
        result = CliRunner().invoke(cli, command, obj=StopRequest(), standalone_mode=False)
        assert isinstance(result.exception, UserError | click.ClickException), arguments
        received = getattr(result.exception, "format_message", result.exception.__str__)()
        assert message in " ".join(received.split())
    assert (photos / "0.png").read_bytes() == before
