import json
import os
from pathlib import Path

import numpy as np
import pytest

from job import artifacts, classic
from job.config import DeviceRequest, TrainConfig, UserError
from job.dataset import Dataset
from job.engine import Engine, Plan
from tests.conftest import MakeDevices


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    artifacts.write_text(path, "whole")
    with pytest.raises(RuntimeError), artifacts.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ha")
        assert path.read_text() == "whole"
        raise RuntimeError("killed while writing")
    assert path.read_text() == "whole"
    assert listing(tmp_path) == ["file.txt"]


def test_a_write_that_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file.txt"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
        artifacts.write_text(path, "text")


def test_an_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    artifacts.prepare_output_dir(tmp_path / "a" / "b")
    assert listing(tmp_path / "a" / "b") == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        artifacts.prepare_output_dir(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_folder_with_an_impossible_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to --output-dir"):
        artifacts.prepare_output_dir(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="there is no model"):
        artifacts.load_model(tmp_path / ("x" * 300))


def test_what_a_killed_write_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".file.partial.txt").write_text("left by a killed run, and longer")
    artifacts.write_text(tmp_path / "file.txt", "whole")
    assert listing(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_the_model_file_restores_every_variable_bit_for_bit_and_trains_on(
    tmp_path: Path, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    plan = Plan(global_batch_size=64, steps_per_epoch=4, epochs=1, seed=42)
    engine = Engine(classic.RECIPE, make_devices(2), small_dataset, plan, 1e-3)
    list(engine.train_epoch(0))
    saved = engine.export()
    artifacts.save_model(saved, tmp_path / "model.h5")
    assert listing(tmp_path) == ["model.h5"]

    loaded = artifacts.load_model(tmp_path / "model.h5")
    assert len(loaded.optimizer.variables) == 2 + 2 * len(saved.trainable_variables)
    for received, expected in (
        (loaded.weights, saved.weights),
        (loaded.optimizer.variables, saved.optimizer.variables),
    ):
        for one, two in zip(received, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert any(np.abs(v.numpy()).max() > 0 for v in loaded.optimizer.variables[2:])

    images = small_dataset.train_images[:64] / np.float32(255)
    labels = np.eye(10, dtype=np.float32)[small_dataset.train_labels[:64]]
    for model in (saved, loaded):
        model.get_layer("dropout").rate = 0.0
        model.train_on_batch(images, labels)
    for one, two in zip(loaded.weights, saved.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=0, atol=1e-7)


def test_something_else_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model"):
        artifacts.load_model(tmp_path / "model.h5")
    (tmp_path / "model.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="is no model of this job"):
        artifacts.load_model(tmp_path / "model.h5")


def test_metrics_file_holds_a_line_an_epoch(tmp_path: Path) -> None:
    metrics = artifacts.MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"epoch": 1})
    metrics.append({"epoch": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_manifest_tells_the_outcome(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    config = TrainConfig(devices=DeviceRequest("cpu", 2))
    manifest = artifacts.RunManifest(path, config, {"replicas": 2})
    running = json.loads(path.read_text())
    assert (running["outcome"], running["end"], running["replicas"]) == ("running", None, 2)
    assert running["config"]["devices"] == "cpu:2"
    assert running["config"]["batch_size"] == 256
    manifest.finish("failed", "the disk is full")
    ended = json.loads(path.read_text())
    assert (ended["outcome"], ended["error"]) == ("failed", "the disk is full")
    assert ended["start"] == running["start"] <= ended["end"]


def test_git_commit_is_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(artifacts.__file__).parent.parent / ".git").exists():
        pytest.skip("not a git checkout")
    commit = artifacts.git_commit()
    assert commit is not None
    assert len(commit) == 40
    monkeypatch.setenv("PATH", os.devnull)
    assert artifacts.git_commit() is None
