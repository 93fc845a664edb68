import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from job import classic, predict
from job.cli import cli
from job.config import TrainConfig, UserError
from job.dataset import Dataset
from job.devices import Compilation, Devices
from job.images import Source, find_images
from job.model_file import save_model
from job.output import EVALUATION, MODEL, OutputDir, sha256_of
from job.predict import Classifier, Predictor, load_classifier, predict_batches, predict_images
from job.preemption import StopRequest
from job.recipe import unchanged
from tests.conftest import MakeDevices

STEMS = ("0", "1", "2", "345", "6")
NAMES = tuple(f"kind {label}" for label in range(10))


@pytest.fixture
def model() -> keras.Model:
    model = classic.build_model(1, 10)
    classic.RECIPE.compile(model, 1e-4, 1)
    return model


@pytest.fixture
def output(tmp_path: Path, model: keras.Model) -> OutputDir:
    """A folder with a model file and its evaluation."""
    folder = tmp_path / "output"
    folder.mkdir()
    output = OutputDir(folder)
    save_model(model, output, MODEL)
    digest = sha256_of(folder / MODEL)
    output.write_json(EVALUATION, {"classes": dict.fromkeys(NAMES), "model_sha256": digest})
    return output


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
    output: OutputDir, photos: Path, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Predict the photos; the devices of this process are set up already."""
    monkeypatch.setattr(predict, "open_promised_devices", lambda config: make_devices(1))
    monkeypatch.chdir(photos.parent)

    def run(top: int = 3, **options: Any) -> None:
        sources = find_images([photos.name])
        predict_images(TrainConfig(), output.path / MODEL, sources, top, **options)

    return run


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
    predictor = Predictor(Classifier(model, NAMES, (unchanged,)), devices, 40 // replicas)
    assert predictor.batch_size == 40
    pixels = small_dataset.test_images[:images]
    received = predictor(pixels)
    expected = model.predict(pixels / np.float32(255), verbose=0)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_every_batch_is_one_traced_function(
    model: keras.Model, photos: Path, make_devices: MakeDevices
) -> None:
    traced = []

    def view(images: Any) -> Any:
        traced.append(images.shape)
        return images

    classifier = Classifier(model, NAMES, (view,))
    predictor = Predictor(classifier, make_devices(1), 4)
    batches = list(predict_batches(classifier, predictor, find_images([str(photos)]), 2))
    assert [len(batch) for batch in batches] == [4, 2]
    assert traced == [(4, 32, 32, 3)]


def test_views_are_averaged(
    model: keras.Model, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    views = (unchanged, lambda images: images[:, :, ::-1])
    predictor = Predictor(Classifier(model, NAMES, views), make_devices(1), 8)
    images = small_dataset.test_images[:8] / np.float32(255)
    expected = [model.predict(view(images), verbose=0) for view in views]
    received = predictor(small_dataset.test_images[:8])
    np.testing.assert_allclose(received, np.mean(expected, axis=0), atol=1e-6)


def test_lines_for_people_are_aligned_and_broken_images_told_on_stderr(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="1 of 6 images could not be read"):
        run()
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == [f"photos/{name}.png" for name in STEMS]
    assert len({line.index("%  (kind ") for line in lines}) == 1
    assert all(line.endswith("%)") and line.count("kind ") == 3 for line in lines)
    broken, summary = errors.splitlines()
    assert broken == "cifar10-job: photos/2a.png: no image of a known format"
    assert summary.startswith("cifar10-job: 5 images in ")


def test_json_lines_have_every_image_in_order(
    run: Any,
    model: keras.Model,
    small_dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match="1 of 6 images"):
        run(top=99, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).stem for line in lines] == [*STEMS[:3], "2a", *STEMS[3:]]
    assert lines.pop(3) == {"path": "photos/2a.png", "error": "no image of a known format"}
    expected = model.predict(small_dataset.test_images[:5] / np.float32(255), verbose=0)
    for line, probabilities in zip(lines, expected, strict=True):
        assert line.keys() == {"path", "predictions"}
        values = [one["probability"] for one in line["predictions"]]
        assert values == sorted(values, reverse=True)
        received = {one["class"]: one["probability"] for one in line["predictions"]}
        assert [received[name] for name in NAMES] == pytest.approx(probabilities, abs=1e-6)


def test_one_class_needs_no_brackets(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        run(top=1)
    assert "(" not in capsys.readouterr().out


def test_the_picture_tells_how_many_are_left_out(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "PICTURES", 4)
    with pytest.raises(UserError, match="1 of 6 images"):
        run(png=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"cifar10-job: picture {tmp_path}/grid.png of the first 4; 1 left out"


def test_without_its_evaluation_a_models_classes_are_numbers(
    output: OutputDir, make_devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    path = output.path / MODEL
    assert load_classifier(path, make_devices(1)).class_names == NAMES
    assert capsys.readouterr().err == ""
    for document in (
        {"classes": dict.fromkeys(NAMES), "model_sha256": "of another file"},
        {"classes": dict.fromkeys(NAMES[:9]), "model_sha256": sha256_of(path)},
        {},
    ):
        output.write_json(EVALUATION, document)
        names = load_classifier(path, make_devices(1)).class_names
        assert names == tuple(f"class {label}" for label in range(10))
        assert "its classes go by numbers" in capsys.readouterr().err


def test_the_views_are_those_of_the_recipe_that_trained_the_model(
    output: OutputDir, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, views = output.path / MODEL, (unchanged, unchanged)
    recipe = replace(classic.RECIPE, evaluation_views=views)
    monkeypatch.setattr(predict, "get_recipe", {"classic": recipe}.__getitem__)
    assert load_classifier(path, make_devices(1)).views == (unchanged,)
    output.write_json("run.json", {"config": {"recipe": "classic"}})
    assert load_classifier(path, make_devices(1)).views == views
    output.write_json("run.json", {"config": {"recipe": "of another version"}})
    assert load_classifier(path, make_devices(1)).views == (unchanged,)


def test_a_model_of_other_inputs_is_refused(
    tmp_path: Path, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = keras.layers
    grey = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)])
    grey.compile("adam", "categorical_crossentropy")
    grey.optimizer.build(grey.trainable_variables)
    save_model(grey, OutputDir(tmp_path), MODEL)
    devices: Devices = make_devices(1)
    monkeypatch.setattr(predict, "open_promised_devices", lambda config: devices)
    with pytest.raises(UserError, match=r"expected \(None, height, width, 3\)"):
        predict_images(TrainConfig(), tmp_path / MODEL, [Source("a.png")], 3)


@pytest.mark.parametrize("named", ["photos", "photos/0.png"])
def test_a_picture_that_would_replace_a_photo_is_refused_before_anything_is_computed(
    output: OutputDir, photos: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr("job.cli._load_tensorflow", pytest.fail)
    content = (photos / "0.png").read_bytes()
    arguments = ["predict", "--png", "photos/0.png", named, "photos/1.png"]
    result = CliRunner().invoke(cli, [*arguments, "--output-dir", "output"], obj=StopRequest())
    assert isinstance(result.exception, UserError)
    assert result.exception.exit_code == 2
    assert str(result.exception).startswith(
        "received --png photos/0.png, which is the image photos/0.png"
    )
    assert (photos / "0.png").read_bytes() == content
