"""`predict` and `compare` as a user runs them: trained model, real images, separate processes."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from job.run.folder import MODEL
from tests.conftest import REPOSITORY, RunJob, StartJob
from tests.data.test_image_files import broken_files

# How a user without this package predicts an image of the model's size: with stock Keras only.
STOCK_KERAS = """
import json, sys
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
images = np.load(sys.argv[2]) / 255.0
print(json.dumps(model.predict(images, verbose=0).tolist()))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cifar10_dir: Path) -> Path:
    """The output folder of a small training on the real images."""
    folder = tmp_path_factory.mktemp("trained") / "seed-42"
    options = ["--epochs", "1", "--limit", "2560", "--learning-rate", "1e-3"]
    folders = ["--data-dir", str(cifar10_dir), "--output-dir", str(folder)]
    command = [sys.executable, "-m", "job", "train", *options, *folders]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def test_images(cifar10_dir: Path) -> npt.NDArray[np.uint8]:
    """The real test images, [10000, 32, 32, 3]."""
    with (cifar10_dir / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        batch = pickle.load(file, encoding="latin1")
    images: npt.NDArray[np.uint8] = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images


@pytest.fixture(scope="module")
def test_labels(cifar10_dir: Path) -> list[int]:
    with (cifar10_dir / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        labels: list[int] = pickle.load(file, encoding="latin1")["labels"]
    return labels


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory, test_images: npt.NDArray[np.uint8]) -> Path:
    """The real test images as PNG files, in their original order."""
    folder = tmp_path_factory.mktemp("pngs")
    for number, pixels in enumerate(test_images):
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=1)
    return folder


def lines_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_predicting_the_test_set_from_png_files_matches_the_evaluation(
    run_job: RunJob,
    trained: Path,
    pngs: Path,
    test_images: npt.NDArray[np.uint8],
    test_labels: list[int],
    tmp_path: Path,
) -> None:
    result = run_job("predict", pngs, "--output-dir", trained, "--json", "--top", "10")
    assert result.returncode == 0, result.stderr
    lines = lines_of(result.stdout)
    assert [Path(line["path"]).stem for line in lines] == [f"{n:05}" for n in range(10_000)]
    evaluation = json.loads((trained / "evaluation.json").read_text())
    names = list(evaluation["classes"])
    received = [{one["class"]: one["probability"] for one in line["predictions"]} for line in lines]
    probabilities = np.array([[one[name] for name in names] for one in received])
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (test_labels, probabilities.argmax(axis=1)), 1)
    assert confusion.tolist() == evaluation["confusion_matrix"]
    loss = -np.log(probabilities[np.arange(10_000), test_labels]).mean()
    assert loss == pytest.approx(evaluation["loss"], abs=1e-5)

    np.save(tmp_path / "images.npy", test_images[:500])
    command = [sys.executable, "-W", "ignore", "-c", STOCK_KERAS]
    files = [trained / MODEL, tmp_path / "images.npy"]
    stock = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    expected = json.loads(stock.stdout.splitlines()[-1])
    np.testing.assert_allclose(probabilities[:500], expected, rtol=0, atol=1e-6)


def test_images_of_every_format_are_predicted_and_broken_ones_reported(
    run_job: RunJob, trained: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    broken = broken_files(photos)
    noise = np.random.default_rng(3).integers(0, 256, (300, 400, 3), np.uint8)
    image = Image.fromarray(noise)
    for name in ("a.jpg", "b.webp", "c.gif", "d.bmp", "e.tiff", "f.ppm", "g.ico", "h.jp2"):
        image.save(photos / name)
    image.convert("CMYK").save(photos / "i.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(photos / "j.tiff")
    image.resize((4000, 3000)).save(photos / "k.jpg")
    image.resize((1, 1)).save(photos / "l.png")
    odd = [b"m\n\x1b[31m.png", "n größe.png".encode(), b"o\xff.png"]
    odd_paths = [f"{photos}/{os.fsdecode(name)}" for name in odd]
    for path in odd_paths:
        image.save(path)
    good = [*"abcdefghijkl", r"m\n\x1b[31m", "n größe", r"o\xff"]

    places = (photos, "nowhere.png", "--output-dir", trained)
    result = run_job("predict", *places, "--png", "grid.png")
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    shown = [line.split(".")[0].removeprefix(f"{photos}/") for line in lines]
    assert shown == good
    errors = result.stderr.splitlines()
    assert len(errors) == len(broken) + 4
    for name in broken:
        assert any(line.startswith(f"cifar10-job: {photos}/{name}: ") for line in errors), name
    assert "cifar10-job: nowhere.png: No such file or directory" in errors
    count = len(broken) + 1
    assert errors[-1].startswith(
        f"cifar10-job: error: {count} of {len(good) + count} images could not be read"
    )
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size[0] > 4 * 150

    result = run_job("predict", *places, "--json")
    assert result.returncode == 2
    entries = {line["path"]: line for line in lines_of(result.stdout)}
    assert {*odd_paths} < entries.keys()
    assert sum("error" in line for line in entries.values()) == count


def test_standard_input_and_a_model_in_another_folder(
    start_job: StartJob, trained: Path, tmp_path: Path, test_images: npt.NDArray[np.uint8]
) -> None:
    (tmp_path / "mine.h5").write_bytes((trained / MODEL).read_bytes())
    Image.fromarray(test_images[0]).save(content := io.BytesIO(), "PNG")
    (tmp_path / "image").write_bytes(content.getvalue())
    command = f"cat image | {sys.executable} -m job predict - image --json --top 1"
    result = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JOB_MODEL": "mine.h5"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    piped, named = lines_of(result.stdout)
    assert (piped["path"], named["path"]) == ("-", "image")
    assert piped["predictions"] == named["predictions"]
    assert piped["predictions"][0]["class"].startswith("class ")
    assert "its classes are shown as numbers" in result.stderr


def test_a_closed_pipe_ends_predict_silently(
    start_job: StartJob, trained: Path, pngs: Path
) -> None:
    job = start_job("predict", pngs, "--output-dir", trained)
    assert job.stdout is not None
    assert job.stdout.readline()
    job.stdout.close()
    assert job.stderr is not None
    assert job.stderr.read() == ""
    assert job.wait(60) == 0


def test_a_signal_ends_predict_at_once(start_job: StartJob, trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never.png")
    job = start_job("predict", "never.png", "--output-dir", trained)
    # This open returns when the job opens the FIFO; nothing is written to it.
    with (tmp_path / "never.png").open("wb"):
        job.send_signal(signal.SIGTERM)
        assert job.wait(10) == 75
    assert job.stderr is not None
    assert job.stderr.read() == "cifar10-job: stopped: SIGTERM; run the same command again\n"


def test_missing_devices_are_reported_in_one_line(run_job: RunJob, trained: Path) -> None:
    folder, promised = {"JOB_OUTPUT_DIR": str(trained)}, {"SLURM_GPUS_ON_NODE": "99"}
    cases: list[tuple[list[str], dict[str, str], int, str]] = [
        (["--devices", "gpu:99"], {}, 2, "received gpu:99, expected at most"),
        (["--require-gpus", "99"], {}, 3, "--require-gpus expected 99 GPUs"),
        ([], promised, 3, "expected 99 GPUs ("),
    ]
    for arguments, env, exit_code, message in cases:
        result = run_job("predict", "a.png", *arguments, env={**folder, **env})
        assert result.returncode == exit_code
        (line,) = result.stderr.splitlines()
        assert message in line


def test_predict_does_not_change_the_output_folder(
    run_job: RunJob, trained: Path, tmp_path: Path
) -> None:
    def digests() -> dict[str, str]:
        files = [path for path in sorted(trained.rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    result = run_job("predict", "a.png", "--output-dir", trained, "--devices", "cpu:2")
    assert result.returncode == 0, result.stderr
    assert digests() == before


def test_compare_reads_the_output_of_train(run_job: RunJob, trained: Path) -> None:
    result = run_job("compare", trained.parent, "--json")
    assert result.returncode == 0, result.stderr
    (run,) = json.loads(result.stdout)["runs"]
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert (run["accuracy"], run["loss"]) == (evaluation["accuracy"], evaluation["loss"])
    assert (run["seed"], run["epochs"], run["outcome"]) == (42, 1, "done")
    assert run_job("compare", "nowhere").returncode == 2


def test_compare_does_not_import_tensorflow(trained: Path) -> None:
    script = (
        "import sys\nfrom job.commands.cli import cli\n"
        f"cli(['compare', {str(trained)!r}], standalone_mode=False)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, capture_output=True)
