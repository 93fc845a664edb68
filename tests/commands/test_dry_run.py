import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import pytest
import tensorflow as tf

from job.cluster.scheduler import RunIdentity
from job.commands.dry_run import Preview, preview
from job.config import TrainConfig, UserError, describe_config
from job.data import Dataset
from job.environment import program
from job.recipes import classic
from job.run.attempt import hold_output_dir
from job.run.lease import LeaseLostError
from job.run.stop import StopRequest
from tests.conftest import MakeDevices, RunJob
from tests.run.test_attempt import finish, run, save

Find = Callable[[TrainConfig], Preview]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    output = tmp_path / "output"
    return TrainConfig(output, dataset="synthetic", epochs=2, batch_size=96, run_id="mine")


@pytest.fixture
def find(small_dataset: Dataset, make_devices: MakeDevices) -> Find:
    """Preview a training on two replicas and little data."""
    devices = make_devices(2)

    def find(config: TrainConfig) -> Preview:
        return preview(config, StopRequest(), lambda *_: devices, lambda _: small_dataset)

    return find


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture
def nothing_changes(tmp_path: Path) -> Iterator[None]:
    before = tree(tmp_path)
    yield
    assert tree(tmp_path) == before


def found_with(config: TrainConfig, *problems: str) -> list[str]:
    found = Preview()
    found.add("config", describe_config(config))
    for problem in problems:
        with found.collecting():
            raise UserError(problem)
    found.add("data", {"name": "synthetic"}, "drawn from seed 42", "512 images")
    return found.as_text().splitlines()


def test_problems_come_first() -> None:
    assert found_with(TrainConfig(), "too large", "too small") == [
        "Problem      too large",
        "Problem      too small",
        "Data         drawn from seed 42",
        "Data         512 images",
    ]
    first = found_with(TrainConfig())[0]
    assert first == "Dry run      no problems found; nothing was written"


@pytest.mark.usefixtures("nothing_changes")
def test_a_new_run(config: TrainConfig, find: Find) -> None:
    found = find(config)
    assert found.problems == []
    report = found.report
    assert (report["config"]["batch_size"], report["config"]["recipe"]) == (96, "classic")
    assert (report["output"]["state"], report["output"]["held_by"]) == ("new", None)
    assert report["batch"] == {
        "batch_size": 96,
        "rows_per_replica": 48,
        "steps_per_epoch": 5,
        "images_left_out": 512 - 5 * 96,
        "epochs": 2,
        "total_steps": 10,
    }
    assert report["data"]["train_examples"] == 512
    assert report["data"]["found"] == "drawn from seed 42"
    text = found.as_text()
    assert "96 images per step = 2 replicas x 48" in text
    assert "5 steps per epoch, 32 images left out" in text
    first, second, *_ = text.splitlines()
    assert first == "Dry run      no problems found; nothing was written"
    assert second.startswith(f"Config       {program()} train --output-dir ")
    assert " --epochs 2 " in second
    labels = [line.split()[0] for line in text.splitlines() if line[0] != " "]
    assert list(dict.fromkeys(labels)) == [*("Dry", "Config", "Output", "Devices", "Data", "Batch")]
    json.dumps(report)


def test_a_run_that_the_recipe_cannot_resume_is_a_problem(config: TrainConfig, find: Find) -> None:
    run(
        config,
        save(config, epochs=0, steps=5, **{"optimizer.beta_1": 0.5, "optimizer.name": "Adam"}),
    )
    found = find(config)
    (problem,) = map(str, found.problems)
    assert (
        "contains another run: the optimizer's beta_1 (--epochs can set its schedule) received "
        "0.9, expected 0.5; resume that run with its own settings"
    ) in problem
    assert found.report["output"]["step"] == 5


def test_a_run_that_was_stopped_and_then_finished(
    config: TrainConfig, find: Find, tmp_path: Path
) -> None:
    run(config, save(config, epochs=0, steps=5))
    before = tree(tmp_path)
    found = find(config)
    assert found.problems == []
    output = found.report["output"]
    assert (output["state"], output["step"]) == ("resume", 5)
    assert "contains this run: it would resume at step 5" in found.as_text()
    assert find(replace(config, fresh=True)).report["output"]["state"] == "fresh"

    # A problem does not hide the remaining checks.
    found = find(replace(config, seed=43, batch_size=95))
    first, second = map(str, found.problems)
    assert "--seed received 43, expected 42" in first
    assert "--batch-size received 95, expected a multiple of 2, the number of replicas" in second
    lines = found.as_text().splitlines()
    assert lines[:2] == [f"Problem      {first}", f"Problem      {second}"]
    assert "output" not in found.report
    assert found.report["data"]["train_examples"] == 512
    assert tree(tmp_path) == before

    run(config, finish(config))
    before = tree(tmp_path)
    found = find(config)
    assert found.report["output"]["state"] == "finished"
    # Devices and data need not be checked.
    assert found.report.keys() == {"config", "output"}
    assert found.as_text().startswith(
        "Dry run      the run is finished: train would report that, do nothing and end with exit "
        "code 0; raise --epochs to resume it, pass --fresh to start over, or use another "
        "--output-dir; nothing was written\n"
    )
    assert tree(tmp_path) == before


def test_the_advice_for_a_batch_larger_than_the_data_names_only_options_in_use(
    config: TrainConfig, find: Find
) -> None:
    (problem,) = find(replace(config, batch_size=514)).problems
    assert str(problem).endswith("expected at most the 512 training images; lower --batch-size")
    limited = replace(config, batch_size=514, limit=512)
    (problem,) = find(limited).problems
    assert str(problem).endswith("; lower --batch-size or raise --limit")


@pytest.mark.usefixtures("nothing_changes")
def test_a_download_is_announced_but_not_started(
    config: TrainConfig, find: Find, tmp_path: Path
) -> None:
    address = "http://127.0.0.1:9/x"
    config = replace(config, dataset="cifar10", data_dir=tmp_path / "data", cifar10_url=address)
    found = find(config)
    assert found.problems == []
    assert found.report["data"]["download"]
    assert "would be downloaded from http://127.0.0.1:9/x" in found.as_text()
    assert found.report["data"]["train_examples"] == 50_000
    assert found.report["batch"]["steps_per_epoch"] == 520
    assert find(replace(config, limit=960)).report["batch"]["steps_per_epoch"] == 10
    (problem,) = find(replace(config, limit=50_001)).problems
    assert "expected at most the 50000 training images of cifar10" in str(problem)


@pytest.mark.usefixtures("nothing_changes")
@pytest.mark.parametrize(
    ("size", "layer", "problem"),
    [
        (32, {"activation": "linear"}, "expected probabilities: none below 0, and rows that sum"),
        (
            24,
            {"activation": "softmax"},
            "has images of shape (32, 32, 3), expected (24, 24, 3) for",
        ),
        (
            32,
            {"activation": "softmax", "kernel_regularizer": lambda kernel: 0.1},
            "job/recipes/mine.py: ",
        ),
    ],
    ids=["logits", "size", "no file"],
)
def test_a_network_that_cannot_be_trained_is_a_problem(
    config: TrainConfig,
    find: Find,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    layer: dict[str, Any],
    problem: str,
) -> None:
    def build(seed: int, classes: int) -> keras.Model:
        layers = keras.layers
        ends = [layers.Flatten(), layers.Dense(classes, **layer)]
        return keras.Sequential([keras.Input((size, size, 3)), *ends])

    module = ModuleType("job.recipes.mine")
    module.__dict__["RECIPE"] = replace(
        classic.RECIPE,
        build_model=build,
        draw_augmentation=lambda seed, epoch, steps, rows: tf.zeros([steps, rows, 1]),
        augment=lambda images, draws, resample: images,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (found,) = find(replace(config, recipe="mine")).problems
    assert isinstance(found, UserError)
    assert problem in str(found)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_unusable_output_folder_is_a_problem(
    config: TrainConfig, find: Find, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    (problem,) = find(replace(config, output_dir=tmp_path / name)).problems
    assert "--output-dir" in str(problem)
    assert tree(tmp_path) == before


def test_a_metrics_textfile_in_a_missing_folder_is_a_problem(
    config: TrainConfig, find: Find, tmp_path: Path
) -> None:
    config = replace(config, metrics_textfile=tmp_path / "missing" / "job.prom")
    (problem,) = find(config).problems
    assert "cannot write --metrics-textfile" in str(problem)


def test_a_dry_run_leaves_a_held_folder_to_its_holder(
    config: TrainConfig, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.defer()
    with hold_output_dir(config.output_dir, stop, RunIdentity("run other")) as output:
        before = tree(config.output_dir / ".lease")
        (problem,) = find(config).problems
        assert isinstance(problem, UserError)
        assert "is in use by run other, process" in str(problem)
        assert before.keys() == tree(config.output_dir / ".lease").keys()
        output.check()
    with hold_output_dir(config.output_dir, stop, RunIdentity("run mine")) as output:
        found = find(config)
        assert found.problems == []
        assert "held by run mine, process" in found.as_text()
        output.check()
        assert stop.reason is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = replace(config, run_id=None)
    with hold_output_dir(config.output_dir, stop, RunIdentity("slurm job 7", 3)):
        (problem,) = find(config).problems
        assert isinstance(problem, LeaseLostError)
        path = next((config.output_dir / ".lease").iterdir())
        lease_of_killed_process = path.read_bytes()
    assert find(config).report["output"]["held_by"] is None
    path.write_bytes(lease_of_killed_process)
    assert find(config).report["output"]["held_by"] is None


def test_the_command_exits_with_the_code_of_the_training_and_writes_nothing(
    run_job: RunJob, tmp_path: Path
) -> None:
    options = ("--log-format", "text", "--devices", "cpu:2")
    good = run_job("train", *options, env={"JOB_DRY_RUN": "1"})
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    first, *lines = good.stdout.splitlines()
    assert first == "Dry run      no problems found; nothing was written"
    assert sum(line.startswith("Devices      CPU:") for line in lines) == 2
    assert (
        "Batch        195 steps per epoch, 80 images left out, different ones in each epoch"
        in lines
    )
    assert f"Config       {program()} train --output-dir output --devices cpu:2" in lines
    missing = run_job("train", "--dry-run", env={"SLURM_GPUS_ON_NODE": "99"})
    assert missing.returncode == 3
    dry_run, error = map(json.loads, missing.stdout.splitlines())
    assert (dry_run["event"], dry_run["problems"]) == ("dry_run", [error["message"]])
    assert (error["event"], error["exit_code"]) == ("error", 3)
    assert dry_run["data"]["train_examples"] == 50_000
    assert list(tmp_path.iterdir()) == []
