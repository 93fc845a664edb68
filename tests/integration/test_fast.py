"""The recipe `fast` with a quarter of its widths, on real images and in separate processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config import TrainConfig
from job.data.cifar10 import SOURCE
from tests.conftest import REPOSITORY, Job
from tests.integration.chaos import compare, metrics, state_of_checkpoint
from tests.integration.team import Team
from tests.integration.test_job import STOCK_KERAS

NARROW = """
from dataclasses import replace
from functools import partial

from job.recipes import fast

DEFAULTS = {"epochs": 2, "batch_size": 250, "learning_rate": 0.24}

build_model = partial(fast.build_model, widths=[width // 4 for width in fast.WIDTHS])
RECIPE = replace(fast.RECIPE, build_model=build_model)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with a narrow version of the recipe."""
    folder = tmp_path_factory.mktemp("program")
    shutil.copytree(REPOSITORY / "job", folder / "job")
    (folder / "job" / "recipes" / "narrow.py").write_text(NARROW)
    return folder


def command(cifar10_dir: Path, output: Path) -> list[str]:
    words = f"train --recipe narrow --limit 5000 --data-dir {cifar10_dir}".split()
    return [*words, "--output-dir", str(output)]


def start(program: Path, cifar10_dir: Path, output: Path, *options: str) -> Job:
    words = [*command(cifar10_dir, output), *options]
    return Job(program, *words, env={"PYTHONPATH": str(program)})


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("replicas", [1, 2])
def test_accuracy_climbs_and_a_killed_run_ends_with_the_same_bits(
    program: Path, cifar10_dir: Path, tmp_path: Path, replicas: int
) -> None:
    device = ("--devices", f"cpu:{replicas}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = start(program, cifar10_dir, whole, *device).finish()
    assert result.returncode == 0, result.stderr
    first, last = metrics(whole)
    assert first["step"] == 20
    assert last["loss"] < first["loss"] - 0.1
    assert last["val_accuracy"] > 0.45
    config = read(whole / "run.json")["config"]
    assert [config[name] for name in ("epochs", "batch_size", "learning_rate")] == [2, 250, 0.24]

    attempt = start(program, cifar10_dir, killed, *device)
    assert attempt.wait_for("checkpoint")["step"] == 5
    attempt.end()
    result = start(program, cifar10_dir, killed, *device).finish()
    assert result.returncode == 0, result.stderr
    assert compare(whole, killed) == []
    assert [one["first_step"] for one in read(killed / "run.json")["attempts"]] == [0, 5]
    if replicas == 1:
        check_evaluation(program, whole, cifar10_dir)
        return
    several = tmp_path / "several"
    team = Team(program, 2, *command(cifar10_dir, several), "--devices", "cpu:1")
    try:
        # A single process always uses oneDNN.
        team.start(env={"PYTHONPATH": str(program), "TF_ENABLE_ONEDNN_OPTS": "1"})
        assert team.finish() == [0, 0], team.errors
    finally:
        team.kill()
    one, two = state_of_checkpoint(whole), state_of_checkpoint(several)
    assert one.keys() == two.keys()
    assert not [name for name in one if not np.array_equal(one[name], two[name])]


def check_evaluation(program: Path, output: Path, cifar10_dir: Path) -> None:
    """Check that stock Keras and `predict` reproduce the metrics of the evaluation."""
    evaluation = read(output / "evaluation.json")
    assert 0.45 < evaluation["accuracy_without_tta"] != evaluation["accuracy"]
    model, test_batch = output / "cifar10_model.h5", cifar10_dir / "cifar-10-batches-py/test_batch"
    command: list[Any] = [sys.executable, "-W", "ignore", "-c", STOCK_KERAS, model, test_batch]
    stock = subprocess.run(command, cwd=output, capture_output=True, text=True, check=True)
    figures = json.loads(stock.stdout.splitlines()[-1])
    assert figures["accuracy"] == pytest.approx(evaluation["accuracy_without_tta"], abs=1e-6)
    assert figures["sums"] == pytest.approx([1.0] * 100, abs=1e-5)
    assert (figures["optimizer"], figures["policies"]) == ("sgd", ["float32"])

    # `predict` averages over the same views as the evaluation.
    pictures = output / "pictures"
    pictures.mkdir()
    environ = {**os.environ, "PYTHONPATH": str(program)}
    images = SOURCE.load(TrainConfig(data_dir=cifar10_dir)).test_images[:500]
    for number, image in enumerate(images):
        Image.fromarray(image).save(pictures / f"{number:03}.png")
    command = [sys.executable, "-m", "job", "predict", pictures, "--output-dir", output, "--json"]
    predicted = subprocess.run(
        command, check=True, env=environ, cwd=program, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in predicted.stdout.splitlines()]
    received = [line["predictions"][0] for line in lines]
    with np.load(output / "predictions.npz") as file:
        probabilities = file["probabilities"][:500]
    names = list(evaluation["classes"])
    assert [one["class"] for one in received] == [names[row.argmax()] for row in probabilities]
    largest = [row.max() for row in probabilities]
    assert [one["probability"] for one in received] == pytest.approx(largest, abs=1e-5)
