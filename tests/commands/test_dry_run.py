import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from job.cluster.scheduler import RunIdentity
from job.commands import dry_run
from job.commands.dry_run import preview
from job.config import DataConfig, StoppedError, TrainConfig, UserError
from job.data import Dataset
from job.run import lease
from job.run.attempt import hold_output_dir, open_attempt
from job.run.lease import LeaseLostError, find_holder
from job.run.stop import StopRequest
from job.training import train
from tests.conftest import MakeDevices, RunJob, stand_in_for_devices_and_data
from tests.test_attempt import finish, run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = DataConfig(dataset="synthetic")
    return TrainConfig(tmp_path / "output", data, epochs=2, global_batch_size=96, run_id="mine")


@pytest.fixture(autouse=True)
def two_replicas_and_little_data(
    monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    stand_in_for_devices_and_data(monkeypatch, (train, dry_run), make_devices(2), small_dataset)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture
def nothing_changes(tmp_path: Path) -> Iterator[None]:
    before = tree(tmp_path)
    yield
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("nothing_changes")
def test_a_new_run(config: TrainConfig, small_dataset: Dataset) -> None:
    found = preview(config, StopRequest())
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
    assert report["data"]["fingerprint"] == small_dataset.fingerprint
    assert report["data"]["found"] == "drawn from seed 42"
    assert report["network"]["parameters"] == 423_754
    text = found.as_text()
    assert "96 images a step = 2 replica(s) x 48" in text
    assert "5 steps an epoch, 32 images left out" in text
    first, *_, last = text.splitlines()
    assert first == "Dry run      nothing stands in the way; nothing was written"
    labels = [line.split()[0] for line in text.splitlines() if line[0] != " "]
    assert list(dict.fromkeys(labels)) == [
        *("Dry", "Output", "Devices", "Data", "Batch", "Network", "Config", "Defaults")
    ]
    assert "Config       --epochs            2\n" in text
    assert last.startswith("Defaults     ")
    assert "--learning-rate 0.0001" in last
    assert "--epochs" not in last
    json.dumps(report)


def test_a_run_that_was_stopped(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_devices: MakeDevices,
    small_dataset: Dataset,
) -> None:
    stop = StopRequest()
    stop.stop_after(1e-9)
    with pytest.raises(StoppedError), open_attempt(config, stop) as attempt:
        train.train_and_evaluate(config, attempt)
    before = tree(tmp_path)
    found = preview(config, StopRequest())
    assert found.problems == []
    assert (found.report["output"]["state"], found.report["output"]["step"]) == ("resume", 5)
    assert found.report["network"]["changes"] == []
    assert "data and network are those of the run" in found.as_text()
    assert preview(replace(config, fresh=True), StopRequest()).report["output"]["state"] == "fresh"

    # What it would be refused for does not hide the rest.
    found = preview(replace(config, seed=43, global_batch_size=95), StopRequest())
    first, second = map(str, found.problems)
    assert "--seed received 43, expected 42" in first
    output = str(config.output_dir)
    expected = {"path": output, "held_by": None, "state": "refused", "step": 0}
    assert found.report["output"] == expected
    lines = found.as_text().splitlines()
    assert lines[:2] == [f"Problem      {first}", f"Problem      {second}"]
    assert lines[2] == f"Output       {output}/ holds what this command would not go on with"
    assert "--batch-size received 95, expected a multiple of the 2 replicas" in second
    assert found.report["data"]["train_examples"] == 512

    monkeypatch.setattr(dry_run, "open_promised_devices", lambda *arguments: make_devices(1))
    changes = preview(config, StopRequest()).report["network"]["changes"]
    assert changes == ["replicas: 2 -> 1"]
    other = replace(small_dataset, train_images=np.roll(small_dataset.train_images, 1, axis=0))
    monkeypatch.setattr(dry_run, "load_dataset", lambda data: other)
    (problem,) = preview(config, StopRequest()).problems
    assert "the images and labels are not those that it was trained with" in str(problem)
    assert tree(tmp_path) == before


def test_a_finished_run_needs_no_look_at_devices_and_data(config: TrainConfig) -> None:
    run(config, finish(config))
    found = preview(config, StopRequest())
    assert found.report["output"]["state"] == "finished"
    assert found.report.keys() == {"config", "output"}
    assert found.as_text().startswith(
        "Dry run      the run is finished: train would say so, do nothing and end with exit code "
        "0; raise --epochs to go on with it, start over with --fresh, or name another "
        "--output-dir; nothing was written\n"
    )


def test_a_batch_larger_than_the_data_has_advice_that_can_be_followed(config: TrainConfig) -> None:
    (problem,) = preview(replace(config, global_batch_size=514), StopRequest()).problems
    assert str(problem).endswith("expected at most the 512 training images; lower --batch-size")
    limited = replace(config, global_batch_size=514, data=replace(config.data, limit=512))
    (problem,) = preview(limited, StopRequest()).problems
    assert str(problem).endswith("; lower --batch-size or raise --limit")


@pytest.mark.usefixtures("nothing_changes")
def test_a_download_is_announced_and_not_made(config: TrainConfig, tmp_path: Path) -> None:
    data = DataConfig("cifar10", tmp_path / "data", "http://127.0.0.1:9/x")
    found = preview(replace(config, data=data), StopRequest())
    assert found.problems == []
    assert found.report["data"]["download"]
    assert "would be downloaded from http://127.0.0.1:9/x" in found.as_text()
    assert found.report["data"]["train_examples"] == 50_000
    assert found.report["batch"]["steps_per_epoch"] == 520
    limited = replace(config, data=replace(data, limit=960))
    assert preview(limited, StopRequest()).report["batch"]["steps_per_epoch"] == 10
    (problem,) = preview(replace(config, data=replace(data, limit=50_001)), StopRequest()).problems
    assert "expected at most the 50000 training images of cifar10" in str(problem)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_take_the_run_is_a_problem(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    (problem,) = preview(replace(config, output_dir=tmp_path / name), StopRequest()).problems
    assert "--output-dir" in str(problem)
    assert tree(tmp_path) == before


def test_a_textfile_without_a_folder_is_a_problem(config: TrainConfig, tmp_path: Path) -> None:
    asked = replace(config, metrics_textfile=tmp_path / "missing" / "job.prom")
    (problem,) = preview(asked, StopRequest()).problems
    assert "cannot write --metrics-textfile" in str(problem)


def test_a_folder_that_is_held_is_left_to_its_holder(config: TrainConfig) -> None:
    stop = StopRequest()
    stop.defer()
    with hold_output_dir(config.output_dir, stop, RunIdentity("run other")) as output:
        before = tree(config.output_dir / ".lease")
        (problem,) = preview(config, StopRequest()).problems
        assert isinstance(problem, UserError)
        assert "is in use by run other, process" in str(problem)
        assert before.keys() == tree(config.output_dir / ".lease").keys()
        output.check()
    with hold_output_dir(config.output_dir, stop, RunIdentity("run mine")) as output:
        found = preview(config, StopRequest())
        assert found.problems == []
        assert "held by run mine, process" in found.as_text()
        assert "would be asked to stop" in found.as_text()
        output.check()
        assert stop.reason is None
    with hold_output_dir(config.output_dir, stop, RunIdentity("run mine", 3)):
        (problem,) = preview(config, StopRequest()).problems
        assert isinstance(problem, LeaseLostError)
        path = next((config.output_dir / ".lease").iterdir())
        of_a_killed_process = path.read_bytes()
    assert preview(config, StopRequest()).report["output"]["held_by"] is None
    path.write_bytes(of_a_killed_process)
    assert preview(config, StopRequest()).report["output"]["held_by"] is None


def test_a_holder_elsewhere_is_alive_if_its_lease_changes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_probe", lambda *arguments: "unknown")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    stop = StopRequest()
    stop.defer()
    with hold_output_dir(config.output_dir, stop, RunIdentity("run other")) as output:
        holder = find_holder(config.output_dir)
        assert holder
        assert holder.run == "run other"
        path = next((config.output_dir / ".lease").iterdir())
        content = path.read_bytes()
        output.check()
    path.write_bytes(content)  # of a holder that no longer renews it
    assert find_holder(config.output_dir) is None


def test_the_command_line_ends_as_the_training_would_and_writes_nothing(
    run_job: RunJob, tmp_path: Path
) -> None:
    good = run_job("train", "--dry-run", "--devices", "cpu:2")
    assert good.returncode == 0, good.stderr
    (line,) = good.stdout.splitlines()
    report = json.loads(line)
    assert (report["event"], report["problems"]) == ("dry_run", [])
    assert len(report["devices"]["replicas"]) == 2
    assert report["batch"]["steps_per_epoch"] == 195
    missing = run_job("train", "--dry-run", env={"SLURM_GPUS_ON_NODE": "99"})
    assert missing.returncode == 3
    dry_run_event, error = map(json.loads, missing.stdout.splitlines())
    assert dry_run_event["problems"] == [error["message"]]
    assert (error["event"], error["exit_code"]) == ("error", 3)
    assert dry_run_event["data"]["train_examples"] == 50_000
    options = ("--log-format", "text", "--devices", "cpu:3")
    batch = run_job("train", *options, env={"JOB_DRY_RUN": "1"})
    assert batch.returncode == 2
    assert "expected a multiple of the 3 replicas" in batch.stderr
    assert "Config       --devices           cpu:3\n" in batch.stdout
    assert "--epochs 50, " in batch.stdout
    assert "Problem      --batch-size received 256" in batch.stdout
    assert list(tmp_path.iterdir()) == []
