import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.cluster import Device
from job.cluster.scheduler import RunIdentity
from job.config import DeviceRequest, TrainConfig
from job.run.folder import OutputDir
from job.run.manifest import RunManifest, git_commit
from job.run.record import BestEpoch, Manifest, TrainingRecord, read_manifest
from tests.conftest import REPOSITORY

CONFIG = TrainConfig(
    devices=DeviceRequest("cpu:2"), cifar10_url="https://me:secret@mirror/file?token=secret"
)
TRAINING = TrainingRecord(devices=[Device("CPU:0", "Zen")], replicas=2)
SLURM = RunIdentity("slurm job 1")
BEST = BestEpoch(1, 0.5)


def read(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def test_the_manifest_contains_the_outcome(tmp_path: Path) -> None:
    assert RunManifest(OutputDir(tmp_path), SLURM).document is None
    written = RunManifest(OutputDir(tmp_path), SLURM)
    written.begin(CONFIG)
    assert read(tmp_path).attempts[0].outcome == "running"
    assert read(tmp_path).devices is None  # not known yet
    written.start_training(CONFIG, TRAINING, 0, [])
    running = read(tmp_path)
    assert (running.outcome, running.end, running.replicas) == ("running", None, 2)
    assert running.devices == [Device("CPU:0", "Zen")]
    assert running.config.devices == DeviceRequest("cpu:2")
    written.progress(300, BEST, 12.3456)
    written.finish("failed", "the disk is full")
    ended = read(tmp_path)
    assert (ended.outcome, ended.error) == ("failed", "the disk is full")
    assert (ended.best, ended.elapsed_seconds) == (BEST, 12.346)
    assert ended.end is not None
    assert ended.start == running.start <= ended.end
    (attempt,) = ended.attempts
    assert (attempt.first_step, attempt.last_step, attempt.devices) == (0, 300, ["Zen"])
    assert (attempt.run_id, attempt.outcome) == ("slurm job 1", "failed")
    assert written.document == ended
    assert "secret" not in (tmp_path / "run.json").read_text()


def test_every_attempt_is_listed_with_its_end(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    first = RunManifest(output, SLURM)
    first.begin(CONFIG)
    first.start_training(CONFIG, TRAINING, 0, [])
    first.progress(100, BEST, 10.0)
    start = read(tmp_path).start
    # It is killed here. The second attempt fails before it trains, the third one completes.
    second = RunManifest(output, SLURM)
    second.begin(CONFIG)
    assert (read(tmp_path).outcome, read(tmp_path).end) == ("running", None)
    second.finish("failed", "no GPU")
    third = RunManifest(output, SLURM)
    third.begin(CONFIG)
    third.start_training(CONFIG, TRAINING, 100, ["replicas: 1 -> 2"])
    third.finish("done")
    document = read(tmp_path)
    assert document.start == start
    assert [(attempt.outcome, attempt.reason) for attempt in document.attempts] == [
        ("lost", "no end recorded: killed, or its machine failed"),
        ("failed", "no GPU"),
        ("done", None),
    ]
    assert document.attempts[2].changes == ["replicas: 1 -> 2"]
    assert (document.outcome, document.error) == ("done", None)
    assert (document.best, document.elapsed_seconds) == (BEST, 10.0)


def test_a_fresh_start_keeps_no_earlier_attempt_once_it_trains(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    RunManifest(output, SLURM).begin(CONFIG)
    fresh = RunManifest(output, SLURM, fresh=True)
    fresh.begin(CONFIG)
    assert len(read(tmp_path).attempts) == 2
    fresh.start_training(CONFIG, TRAINING, 0, [])
    (attempt,) = read(tmp_path).attempts
    assert attempt.fresh


def test_a_finished_run_stays_finished_if_a_later_attempt_does_not_train(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    done = RunManifest(output, SLURM)
    done.begin(CONFIG)
    done.start_training(CONFIG, TRAINING, 0, [])
    done.finish("done")
    end = read(tmp_path).end
    later = RunManifest(output, SLURM)
    later.begin(CONFIG)
    later.finish("failed", "no data")
    assert (read(tmp_path).outcome, read(tmp_path).end) == ("done", end)
    assert read(tmp_path).attempts[-1].reason == "no data"


def test_the_first_end_counts(tmp_path: Path) -> None:
    written = RunManifest(OutputDir(tmp_path), SLURM)
    written.begin(CONFIG)
    written.finish("done")
    written.finish("stopped", "SIGTERM")
    assert read(tmp_path).outcome == "done"


def test_git_commit_comes_from_the_checkout_or_the_build_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (REPOSITORY / ".git").exists():
        commit = git_commit()
        assert commit is not None
        assert len(commit) == 40
    monkeypatch.setenv("PATH", os.devnull)
    assert git_commit() is None
    for value, expected in (("0123abcd", "0123abcd"), ("", None)):
        monkeypatch.setenv("JOB_GIT_COMMIT", value)
        assert git_commit() == expected


def test_git_commit_is_never_that_of_another_repository(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    for command in (
        ["init", "--quiet"],
        ["commit", "--quiet", "--allow-empty", "--message=theirs"],
    ):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    # pip install --target and virtual environments put the program into other projects like this.
    for folder in (tmp_path, tmp_path / "libraries"):
        shutil.copytree(REPOSITORY / "job", folder / "job")

    def commit(folder: Path, **env: str) -> str:
        command = [sys.executable, "-c", "from job.run import manifest as m; print(m.git_commit())"]
        env |= {"PATH": os.environ["PATH"]}
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert commit(tmp_path) == commit(tmp_path / "libraries") == "None"
    # A git hook sets these variables.
    hook = {"GIT_DIR": str(tmp_path / ".git"), "GIT_INDEX_FILE": "index", "GIT_PREFIX": ""}
    assert commit(REPOSITORY, **hook) == str(git_commit())
