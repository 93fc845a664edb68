"""The command line that repeats a run."""

import shlex
from collections.abc import Collection
from typing import Any

from job.config import TrainConfig
from job.manifest import describe_config

# The folders stand in front. The others were said to one attempt and do not change what the run
# computes; --fresh would discard the very run that is to be repeated, and a textfile is of one run.
_NOT_RESUMED = ("output_dir", "data_dir", "fresh", "stop_after")
_NOT_REPEATED = (*_NOT_RESUMED, "run_id", "metrics_textfile")


def train_command(config: dict[str, Any], output_dir: str) -> str:
    """The command that trains with a run's options.

    Args:
        config: The run's ``config`` in ``run.json``.
        output_dir: The folder that is to receive the artifacts.

    Returns:
        A line for a shell, with the folders of artifacts and data and every option whose value is
        not the default.
    """
    return _train_command(config, output_dir, _NOT_REPEATED)


def resume_command(config: dict[str, Any]) -> str:
    """The command that goes on with a run in its folder, from its ``config`` in ``run.json``."""
    return _train_command(config, config["output_dir"], _NOT_RESUMED)


def _train_command(config: dict[str, Any], output_dir: str, left_out: Collection[str]) -> str:
    defaults = describe_config(TrainConfig())
    options: dict[str, Any] = {"output_dir": output_dir}
    if config["dataset"] != "synthetic":
        options["data_dir"] = config["data_dir"]
    for name, value in config.items():
        is_repeated = name in defaults and name not in left_out
        if is_repeated and value != defaults[name]:
            options[name] = value
    return _command("train", options)


def evaluate_command(config: dict[str, Any]) -> str:
    """The command that evaluates a run's model again, from its ``config`` in ``run.json``."""
    defaults = describe_config(TrainConfig())
    options: dict[str, Any] = {"output_dir": config["output_dir"]}
    for name in ("dataset", "data_dir", "recipe", "seed"):
        if config[name] != defaults[name]:
            options[name] = config[name]
    return _command("evaluate", options)


def _command(command: str, options: dict[str, Any]) -> str:
    words = ["python", "-m", "job", command]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return shlex.join(words)
