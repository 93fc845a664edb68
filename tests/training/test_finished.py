import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from job.commands.cli import cli
from job.config import TrainConfig, run_options
from job.run import folder
from job.run.attempt import open_attempt
from job.run.checkpoint import Checkpoint, History
from job.run.stop import StopRequest
from tests.run_folders import DETAILS, lines
from tests.test_textfile import samples


@pytest.fixture
def finished(tmp_path: Path) -> TrainConfig:
    """A run of three epochs that is finished, and its textfile as a killed process leaves it."""
    config = TrainConfig(output_dir=tmp_path / "output", epochs=3)
    metadata = {
        "fingerprint": {"run": run_options(config)},
        "history": History(lines(3)).document(),
    }
    with open_attempt(config, StopRequest()) as attempt:
        attempt.manifest.start_training(config, DETAILS, 0, [])
        attempt.checkpoints.save(Checkpoint(30, {"network/0000": np.zeros(3)}, metadata))
        for name in (folder.MODEL, folder.PREDICTION, folder.PREDICTIONS, folder.REPORT):
            attempt.output.write_text(name, "whole")
        digest = folder.sha256_of(config.output_dir / folder.MODEL)
        attempt.output.write_json(folder.EVALUATION, {"model_sha256": digest})
    return replace(config, metrics_textfile=tmp_path / "job.prom")


def train(config: TrainConfig, *options: str) -> list[dict[str, str]]:
    words = ["train", "--epochs", "3", "--output-dir", str(config.output_dir), *options]
    result = CliRunner().invoke(
        cli, [*words, "--log-format", "json"], obj=StopRequest(), catch_exceptions=False
    )
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_finished_run_says_so_and_nothing_else(finished: TrainConfig) -> None:
    before = (finished.output_dir / "run.json").read_bytes()
    (event,) = train(finished)
    assert event["event"] == "finished"
    assert "raise --epochs to go on with it" in event["message"]
    assert (finished.output_dir / "run.json").read_bytes() == before


def test_its_textfile_says_done_with_the_runs_figures(finished: TrainConfig) -> None:
    path = finished.metrics_textfile
    assert path
    path.write_text("what a killed process left")
    train(finished, "--metrics-textfile", str(path))
    values = samples(path)
    assert (values["cifar10_job_statedone"], values["cifar10_job_staterunning"]) == (1, 0)
    assert values["cifar10_job_finished_steps"] == values["cifar10_job_planned_steps"] == 30
    assert values["cifar10_job_finished_epochs"] == 3
    assert values["cifar10_job_validation_accuracy_ratio"] == pytest.approx(0.5)
    assert values["cifar10_job_remaining_seconds"] == 0
    assert 'devices="1 x a processor"' in path.read_text()


def test_it_needs_no_checkpoint_to_say_done(finished: TrainConfig) -> None:
    for path in (finished.output_dir / "checkpoints").iterdir():
        path.unlink()
    train(finished, "--metrics-textfile", str(finished.metrics_textfile))
    assert finished.metrics_textfile
    assert samples(finished.metrics_textfile)["cifar10_job_statedone"] == 1
