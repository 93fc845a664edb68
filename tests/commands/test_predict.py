import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from job.commands import predict
from job.commands.cli import cli
from job.commands.options import is_own, mark_as_own
from job.commands.predict import Classifier, Prediction, Predictor, predict_batches, predict_images
from job.config import TrainConfig, UserError
from job.data import Dataset
from job.data.image_files import Decoded, ImageFile, find_images
from job.run.folder import MODEL, OutputDir
from job.run.stop import StopRequest
from tests.conftest import CLASS_NAMES, MakeDevices

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
    """Predict the photos; the devices of this process are set up already."""
    monkeypatch.setattr(predict, "open_promised_devices", lambda config: make_devices(1))
    monkeypatch.chdir(photos.parent)

    def run(top: int = 3, names: Sequence[str] = (photos.name,), **options: Any) -> None:
        sources = find_images(names)
        predict_images(TrainConfig(), model_output.path / MODEL, sources, top, **options)

    return run


def test_every_batch_is_one_traced_function(
    model: keras.Model, photos: Path, make_devices: MakeDevices
) -> None:
    traced = []

    def view(images: Any) -> Any:
        traced.append(images.shape)
        return images

    classifier = Classifier(model, CLASS_NAMES, (view,))
    predictor = Predictor(classifier, make_devices(1), 4)
    batches = list(predict_batches(classifier, predictor, find_images([str(photos)]), 2))
    assert [len(batch) for batch in batches] == [4, 2]
    assert traced == [(4, 32, 32, 3)]


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
        assert [received[name] for name in CLASS_NAMES] == pytest.approx(probabilities, abs=1e-6)


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


def test_the_picture_of_grey_images_is_grey(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    shown = [Prediction(Decoded(ImageFile("a.png"), pixels), (("oak", 0.5),))]
    predict._save_picture(tmp_path / "grid.png", shown, 1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=-1).max() == 0


def test_a_single_image_that_cannot_be_read_is_one_line(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        run(names=["photos/2a.png"])
    assert str(error.value) == (
        "cannot read photos/2a.png: no image of a known format; name an image, or a folder that "
        "has some"
    )
    assert capsys.readouterr() == ("", "")


def test_an_empty_folder_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read empty: no file in this folder has the suffix"):
        run(names=["empty"])
    assert capsys.readouterr() == ("", "")


def test_the_end_says_where_broken_images_are_named(run: Any) -> None:
    with pytest.raises(UserError, match="1 of 6 images could not be read; each is named above;"):
        run()
    with pytest.raises(UserError, match="; each has its line with an error on stdout;"):
        run(as_json=True)


def refusal_of(*arguments: str) -> str:
    """What the command line says against arguments, before it computes anything."""
    command = ["predict", *arguments, "--output-dir", "output"]
    result = CliRunner().invoke(cli, command, obj=StopRequest(), standalone_mode=False)
    assert isinstance(result.exception, UserError | click.ClickException)
    return " ".join(str(result.exception).split())


@pytest.fixture
def nothing_is_computed(
    model_output: OutputDir, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr("job.commands.cli._load_tensorflow", pytest.fail)


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("content", [b"a list", "0.png", b""], ids=["text", "photo", "empty"])
def test_a_picture_never_replaces_what_the_command_did_not_draw(
    photos: Path, content: bytes | str
) -> None:
    if isinstance(content, str):
        content = (photos / content).read_bytes()
    Path("mine.png").write_bytes(content)
    assert "received mine.png, which this program did not draw" in refusal_of(
        "photos/0.png", "--png", "mine.png"
    )
    assert Path("mine.png").read_bytes() == content
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("nowhere.png")
    for name in ("pipe.png", "link.png"):
        assert "did not draw" in refusal_of("photos/0.png", "--png", name)


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("named", ["photos", "photos/0.png"])
def test_a_picture_that_is_to_be_predicted_is_not_replaced(photos: Path, named: str) -> None:
    mark_as_own(photos / "0.png")  # as if someone predicted an earlier picture
    content = (photos / "0.png").read_bytes()
    assert refusal_of("--png", "photos/0.png", named, "photos/1.png").startswith(
        "received --png photos/0.png, which is the image photos/0.png"
    )
    assert (photos / "0.png").read_bytes() == content


def test_an_earlier_picture_is_replaced(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.commands.cli._load_tensorflow", lambda: None)
    names = ("photos/0.png", "photos/1.png")
    for name in names:
        arguments = ["predict", name, "--png", "grid.png", "--output-dir", "output"]
        result = CliRunner().invoke(cli, arguments, obj=StopRequest(), standalone_mode=False)
        assert result.exception is None
        assert is_own(tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as picture:
            picture.load()
