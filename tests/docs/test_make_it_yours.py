"""The page about one's own images and networks, executed exactly as written."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "make-it-yours.md").read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with the page's two files, and pictures of leaves."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "job", folder / "job")
    names = re.findall(r"Save (?:it|the code) as `(job/\w+/\w+\.py)`", PAGE)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert names == ["job/data/leaves.py", "job/recipes/leafnet.py"]
    for name, code in zip(names, blocks, strict=True):
        (folder / name).write_text(code)
    rng = np.random.default_rng(0)
    for part, count in (("train", 48), ("test", 10)):
        for label, name in enumerate(("birch", "maple", "oak")):
            draw_leaves(folder / "data" / "leaves" / part / name, count, label, rng)
        leave_what_systems_leave(folder / "data" / "leaves" / part)
    return folder


def leave_what_systems_leave(folder: Path) -> None:
    """Files next to the classes and next to the pictures of a class, and a hidden folder."""
    for name in (".DS_Store", "Thumbs.db", "oak/.DS_Store", "oak/Thumbs.db", "oak/._0.png"):
        (folder / name).write_bytes(b"no picture")
    (folder / ".thumbnails").mkdir()


def draw_leaves(folder: Path, count: int, label: int, rng: np.random.Generator) -> None:
    """Pictures of 40x30: an ellipse, a triangle or a cross, somewhere."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture = Image.new("RGB", (40, 30), (230, 240, 220))
        draw = ImageDraw.Draw(picture)
        x, y = (int(value) for value in rng.integers((4, 2), (14, 8)))
        if label == 0:
            draw.ellipse((x, y, x + 20, y + 18), fill=(30, 90, 40))
        elif label == 1:
            draw.polygon([(x + 10, y), (x, y + 18), (x + 20, y + 18)], fill=(30, 90, 40))
        else:
            draw.line((x, y, x + 20, y + 18), fill=(30, 90, 40), width=3)
            draw.line((x + 20, y, x, y + 18), fill=(30, 90, 40), width=3)
        picture.save(folder / f"{number}{SUFFIXES[number % len(SUFFIXES)]}", quality=90)


# As they come from cameras and phones.
SUFFIXES = (".png", ".JPG", ".jpeg", ".PNG")


def job(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "job", *arguments], cwd=copy, capture_output=True, text=True
    )


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_the_pages_commands_train_its_example_to_the_end(copy: Path) -> None:
    dry, train, evaluate, predict = commands()
    looked = job(copy, *dry)
    assert looked.returncode == 0, looked.stderr
    report = json.loads(looked.stdout)
    assert report["data"]["image_shape"] == [24, 24, 1]
    assert report["data"]["found"] == "pictures in data/leaves/train and data/leaves/test"
    assert report["batch"]["images_left_out"] == 144 - 4 * 32
    assert not (copy / "output").exists()

    trained = job(copy, *train)
    assert trained.returncode == 0, trained.stderr
    output = copy / "output" / "leaves"
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    assert names >= {"cifar10_model.h5", "evaluation.json", "metrics.jsonl", "prediction.png"}
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert list(evaluation["classes"]) == ["birch", "maple", "oak"]
    assert evaluation["examples"] == 30
    assert evaluation["accuracy"] > 0.8
    model = keras.models.load_model(output / "cifar10_model.h5")
    assert (model.input_shape, model.output_shape) == ((None, 24, 24, 1), (None, 3))

    (output / "evaluation.json").unlink()
    again = job(copy, *evaluate)
    assert again.returncode == 0, again.stderr
    assert json.loads((output / "evaluation.json").read_text()) == evaluation

    predicted = job(copy, *predict)
    assert predicted.returncode == 0, predicted.stderr
    lines = predicted.stdout.splitlines()
    assert len(lines) == 10
    # The pictures are read as the training read them, so the evaluation counts the same.
    _, _, oaks = evaluation["confusion_matrix"]
    counts = [sum(line.split()[1] == name for line in lines) for name in evaluation["classes"]]
    assert counts == oaks
    assert (output / "oaks.png").is_file()


def test_both_names_are_choices_of_the_command_line(copy: Path) -> None:
    help_text = job(copy, "train", "--help").stdout
    assert "[cifar10|leaves|synthetic]" in help_text
    assert "[classic|fast|leafnet]" in help_text


# All settings of the page's table, and an optimizer of the user's own.
OWN = """
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from job.recipes.leafnet import RECIPE as LEAFNET

DEFAULTS = {"epochs": 4, "batch_size": 16, "learning_rate": 0.05}


class Plain(keras.optimizers.Optimizer):
    assigns_through_keras = True

    def __init__(self, rate, factor):
        super().__init__(learning_rate=rate, name="plain")
        self._factor = factor

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, variable - self._factor * learning_rate * gradient)


def draw_augmentation(seed, epoch, steps, batch_size, rows):
    return tf.cast((rows + tf.cast(epoch, tf.int64)) % 2, tf.float32)[..., None]


def augment(images, draws, resample):
    return tf.where(draws[:, :, None, None] > 0, tf.reverse(images, axis=[2]), images)


def look(images):
    mean = np.float32(images.mean() / 255)
    return {"conv1/kernel": np.full((3, 3, 1, 16), mean, np.float32)}


RECIPE = replace(
    LEAFNET,
    build_optimizer=lambda rate, steps: Plain(rate, 0.5),
    draw_augmentation=draw_augmentation,
    augment=augment,
    tta_weights=(0.75, 0.25),
    label_smoothing=0.1,
    loss_reduction="sum",
    fixed_weights=look,
    early_variables={"conv1/bias": 0.375},
    steps_per_execution=3,
)
"""


def test_all_settings_of_a_recipe_train(copy: Path) -> None:
    rows = re.findall(
        r"^\| `(\w+)", PAGE.split("### More settings")[1].split("\n## ")[0], re.MULTILINE
    )
    assert len(rows) == 8
    assert all(name in OWN for name in rows)
    (copy / "job" / "recipes" / "own.py").write_text(OWN)
    words = "train --dataset leaves --recipe own --data-dir data/leaves --output-dir output/own"
    looked = job(copy, *words.split(), "--dry-run")
    assert looked.returncode == 0, looked.stderr
    trained = job(copy, *words.split())
    assert trained.returncode == 0, trained.stderr
    output = copy / "output" / "own"
    assert json.loads((output / "run.json").read_text())["config"]["batch_size"] == 16
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["accuracy_without_tta"] is not None
    kernel = keras.models.load_model(output / "cifar10_model.h5").get_layer("conv1").kernel
    assert np.unique(kernel).size == 1
    # The dry run detects the same problem as the training.
    code = OWN.replace("conv1/bias", "conv1/bais")
    (copy / "job" / "recipes" / "own.py").write_text(code)
    looked = job(copy, *words.split(), "--fresh", "--dry-run")
    (copy / "job" / "recipes" / "own.py").unlink()
    assert looked.returncode == 2
    problem = "job/recipes/own.py: ValueError: early_variables has 'conv1/bais', expected some of"
    assert problem in looked.stderr


RECIPE, DATA = Path("job/recipes/leafnet.py"), Path("job/data/leaves.py")
OAK = Path("data/leaves/test/oak")

# The edit that causes each mistake of the page's last table: file, old text, new text.
CODE_MISTAKES = {
    "a misspelt name": (RECIPE, 'MaxPooling2D(name="pool1")', 'MaxPool(name="pool1")'),
    "no `activation": (RECIPE, ', activation="softmax"', ""),
    "no `return`": (RECIPE, "return keras.optimizers.SGD", "keras.optimizers.SGD"),
    "`if tf.reduce_sum": (
        RECIPE,
        "return resample(images, draws)",
        "return images if tf.reduce_sum(draws) > 0 else resample(images, draws)",
    ),
    "images divided": (DATA, "np.stack(images)", "np.stack(images) / 255"),
}


def mistakes() -> dict[str, str]:
    """The message of each mistake in the page's last table."""
    table = PAGE.split("| mistake | message |\n", 1)[1]
    return dict(re.findall(r"^\| (.+?) \| `(.*)` \|$", table, re.MULTILINE))


@pytest.mark.parametrize("mistake", mistakes())
def test_each_mistake_has_the_documented_message(copy: Path, mistake: str, tmp_path: Path) -> None:
    changed = tmp_path / "copy"
    shutil.copytree(copy, changed, ignore=shutil.ignore_patterns("output"))
    look, options = commands()[0], []
    if edit := [edit for start, edit in CODE_MISTAKES.items() if mistake.startswith(start)]:
        ((file, old, new),) = edit
        code = (changed / file).read_text()
        assert code.count(old) == 1
        (changed / file).write_text(code.replace(old, new))
    elif mistake.startswith("a class without"):
        (changed / OAK).rename(changed / OAK.with_name("Oak"))
    elif mistake.startswith("a damaged picture"):
        (changed / OAK / "3.PNG").write_bytes(b"no picture")
    else:
        assert "--recipe classic" in mistake
        options = ["--recipe", "classic"]
    result = job(changed, *look, *options)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    expected = re.escape(f"cifar10-job: error: {mistakes()[mistake]}").replace("…", ".+")
    assert re.fullmatch(expected, line), line
    assert not (changed / "output").exists()


def test_every_file_named_is_in_the_repository_or_made_by_the_page(copy: Path) -> None:
    named = set(re.findall(r"`(job/[\w/.]+)`", PAGE))
    assert len(named) == 10
    for name in named:
        assert (copy / name).exists(), name


def test_the_pages_code_is_formatted_and_clean(copy: Path) -> None:
    files = [str(copy / "job" / name) for name in ("data/leaves.py", "recipes/leafnet.py")]
    for check in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", "pyproject.toml", *files]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
