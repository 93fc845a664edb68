import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.commands.cli import evaluate, train
from job.commands.options import train_config
from job.config import DataConfig, DeviceRequest, TrainConfig, describe_config
from job.report.page import evaluate_command, resume_command, train_command

EVERYTHING = TrainConfig(
    output_dir=Path("out put/$HOME; rm -rf 'x' \"y\" `z`"),
    data=DataConfig(
        data_dir=Path("-data\\dir\nwith a line"), cifar10_url="https://x/?a&b#c", seed=7, limit=5120
    ),
    epochs=3,
    global_batch_size=64,
    learning_rate=0.1 + 0.2,
    seed=7,
    precision="bfloat16",
    jit="off",
    deterministic="off",
    devices=DeviceRequest("cpu", 2),
    require_gpus=4,
    stall_timeout_seconds=1e-3,
    checkpoint_every_seconds=1e6,
    tensorboard=True,
)
# As one attempt at it may have been started.
ATTEMPT = replace(
    EVERYTHING,
    fresh=True,
    run_id="mine",
    stop_after_seconds=5.0,
    metrics_textfile=Path("one.prom"),
)


def parse(command: str) -> dict[str, Any]:
    """The configuration that the program makes of a command line."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "job", "train"]
    options = train.make_context("train", words[4:]).params
    del options["log_format"], options["expect_mount"], options["dry_run"]
    return describe_config(train_config(options))


def as_recorded(config: TrainConfig) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(describe_config(config)))
    return document


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        EVERYTHING,
        TrainConfig(data=DataConfig(dataset="synthetic", seed=3), seed=3),
    ],
    ids=["defaults", "everything", "synthetic"],
)
def test_the_command_gives_the_runs_configuration_in_another_folder(config: TrainConfig) -> None:
    again = config.output_dir.with_name("again")
    command = train_command(as_recorded(config), str(again))
    assert parse(command) == describe_config(replace(config, output_dir=again))


def test_what_was_said_to_one_attempt_is_not_repeated() -> None:
    assert train_command(as_recorded(ATTEMPT), "again") == train_command(
        as_recorded(EVERYTHING), "again"
    )


def test_going_on_keeps_folder_name_and_textfile_and_does_not_start_over() -> None:
    expected = replace(ATTEMPT, fresh=False, stop_after_seconds=None)
    assert parse(resume_command(as_recorded(ATTEMPT))) == describe_config(expected)


def test_only_options_that_differ_from_the_defaults_are_named_besides_the_folders() -> None:
    config = as_recorded(TrainConfig(epochs=5))
    assert train_command(config, "again") == (
        "python -m job train --output-dir again --data-dir data --epochs 5"
    )
    synthetic = as_recorded(TrainConfig(data=DataConfig(dataset="synthetic")))
    assert train_command(synthetic, "again") == (
        "python -m job train --output-dir again --dataset synthetic"
    )


def test_the_command_of_another_version_leaves_out_what_this_one_does_not_know() -> None:
    assert "--colour" not in train_command(as_recorded(TrainConfig()) | {"colour": 1}, "again")


def test_the_evaluation_is_of_the_runs_folder_and_data() -> None:
    words = shlex.split(evaluate_command(as_recorded(EVERYTHING)))
    options = evaluate.make_context("evaluate", words[4:]).params
    assert options["output_dir"] == EVERYTHING.output_dir
    assert options["data_dir"] == EVERYTHING.data.data_dir
    assert options["seed"] == 7
