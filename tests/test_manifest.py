import json
import os
from pathlib import Path
from typing import Any

import pytest

from job.cluster import RunIdentity
from job.config import DeviceRequest, TrainConfig
from job.manifest import RunManifest, git_commit
from job.output import OutputDir
from tests.conftest import REPOSITORY

CONFIG = TrainConfig(devices=DeviceRequest("cpu", 2))
DETAILS = {"devices": [{"name": "CPU:0", "model": "Zen"}], "replicas": 2}
SLURM = RunIdentity("slurm job 1")


def read(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def test_manifest_tells_the_outcome(tmp_path: Path) -> None:
    manifest = RunManifest(OutputDir(tmp_path), SLURM)
    manifest.begin()
    assert list(tmp_path.iterdir()) == []  # nothing has been trained yet
    manifest.start_training(CONFIG, DETAILS, 0, [])
    running = read(tmp_path)
    assert (running["outcome"], running["end"], running["replicas"]) == ("running", None, 2)
    assert running["config"]["devices"] == "cpu:2"
    assert running["config"]["batch_size"] == 256
    assert running["config"]["checkpoint_every"] == 60.0
    manifest.progress(300, {"epoch": 1, "val_accuracy": 0.5}, 12.3456)
    manifest.finish("failed", "the disk is full")
    ended = read(tmp_path)
    assert (ended["outcome"], ended["error"]) == ("failed", "the disk is full")
    assert (ended["best"]["val_accuracy"], ended["elapsed_seconds"]) == (0.5, 12.346)
    assert ended["start"] == running["start"] <= ended["end"]
    (attempt,) = ended["attempts"]
    assert (attempt["first_step"], attempt["last_step"], attempt["devices"]) == (0, 300, ["Zen"])
    assert (attempt["run_id"], attempt["outcome"]) == ("slurm job 1", "failed")


def test_every_attempt_is_listed_with_its_end(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    first = RunManifest(output, SLURM)
    first.start_training(CONFIG, DETAILS, 0, [])
    first.progress(100, {"epoch": 1, "val_accuracy": 0.5}, 10.0)
    start = read(tmp_path)["start"]
    # It is killed here. The next one fails before it trains, the third one gets to the end.
    second = RunManifest(output, SLURM)
    second.begin()
    second.finish("failed", "no GPU")
    third = RunManifest(output, SLURM)
    third.begin()
    third.start_training(CONFIG, DETAILS, 100, ["replicas: 1 -> 2"])
    third.finish("done")
    document = read(tmp_path)
    assert document["start"] == start
    outcomes = [(attempt["outcome"], attempt["reason"]) for attempt in document["attempts"]]
    assert outcomes == [
        ("lost", "left no word: killed, or its machine failed"),
        ("failed", "no GPU"),
        ("done", None),
    ]
    assert document["attempts"][2]["changes"] == ["replicas: 1 -> 2"]
    assert (document["outcome"], document["error"]) == ("done", None)


def test_a_fresh_start_is_remembered_for_its_run(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    RunManifest(output, SLURM, fresh=True).start_training(CONFIG, DETAILS, 0, [])
    later = RunManifest(output, SLURM)
    assert later.was_started_fresh_by(SLURM)
    assert not later.was_started_fresh_by(RunIdentity("slurm job 2"))
    assert not later.was_started_fresh_by(RunIdentity(None))


def test_git_commit_is_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    commit = git_commit()
    assert commit is not None
    assert len(commit) == 40
    monkeypatch.setenv("PATH", os.devnull)
    assert git_commit() is None
