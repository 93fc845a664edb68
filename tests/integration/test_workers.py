"""One run with several workers: their results, and failures of single workers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY, Job
from tests.integration.chaos import compare, state_of_checkpoint
from tests.integration.plain_recipe import build_model
from tests.integration.team import Team, evaluate_on_one_device, free_addresses

# Executions of 15 and 5 steps, with a checkpoint after each; 60 steps in total.
OPTIONS = "--limit 1280 --batch-size 64 --epochs 3 --checkpoint-every 0.001 --log-format json"
PLAIN = "tests.integration.plain_recipe"
HANGING = "tests.integration.hanging"
PRECISE = ("--precision", "float32", "--learning-rate", "0.01")
# TensorFlow's heartbeats detect a silent worker; the end of a process is detected at once.
SILENT_SECONDS = 30

StartTeam = Callable[..., Team]


@pytest.fixture(scope="module")
def command(cifar10_dir: Path) -> tuple[str, ...]:
    return ("train", *OPTIONS.split(), "--data-dir", str(cifar10_dir))


@pytest.fixture
def make_team(tmp_path: Path, command: tuple[str, ...]) -> Iterator[StartTeam]:
    """Create a team with this number of workers; only the chief uses the output folder."""
    teams = []

    def make(count: int, *options: str, module: str = "job") -> Team:
        words = (*command, "--devices", "cpu:1", *options)
        teams.append(Team(tmp_path, count, *words, module=module))
        return teams[-1]

    yield make
    for team in teams:
        team.kill()


def train_alone(folder: Path, command: tuple[str, ...], *options: str, module: str = "job") -> Path:
    folder.mkdir(exist_ok=True)
    result = Job(folder, *command, "--output-dir", folder, *options, module=module).finish()
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run with two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    team = Team(folder, 2, *command, "--devices", "cpu:1").start()
    try:
        assert team.finish() == [0, 0], team.errors
    finally:
        team.kill()
    return folder / "output"


def manifest(output: Path) -> Any:
    return json.loads((output / "run.json").read_text())


def largest_difference(one: Path, two: Path) -> float:
    states = state_of_checkpoint(one), state_of_checkpoint(two)
    assert states[0].keys() == states[1].keys()
    differences = [
        np.abs(states[0][name].astype(float) - states[1][name].astype(float)).max()
        for name in states[0]
    ]
    return float(max(differences))


def test_two_workers_are_bit_identical_to_one_process_with_two_replicas(
    undisturbed: Path, command: tuple[str, ...], cifar10_dir: Path, tmp_path: Path
) -> None:
    alone = train_alone(tmp_path / "alone", command, "--devices", "cpu:2")
    evaluate_on_one_device(alone, cifar10_dir)
    assert compare(alone, undisturbed) == []
    document = manifest(undisturbed)
    assert (document["workers"], document["replicas"]) == (2, 2)
    assert [device["name"] for device in document["devices"]] == [
        "worker 0 CPU:0",
        "worker 1 CPU:0",
    ]
    evaluation = json.loads((undisturbed / "evaluation.json").read_text())
    assert evaluation["examples"] == np.sum(evaluation["confusion_matrix"]) == 10_000


@pytest.fixture(scope="module")
def one_replica(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with one replica and the smooth recipe."""
    folder = tmp_path_factory.mktemp("one")
    return train_alone(folder, command, "--devices", "cpu:1", *PRECISE, module=PLAIN)


@pytest.mark.parametrize(("workers", "replicas"), [(4, 1), (2, 2)])
def test_any_number_of_workers_and_replicas_reaches_the_weights_of_one(
    make_team: StartTeam, one_replica: Path, tmp_path: Path, workers: int, replicas: int
) -> None:
    alone = one_replica
    team = make_team(workers, *PRECISE, "--devices", f"cpu:{replicas}", module=PLAIN).start()
    assert team.finish() == [0] * workers, team.errors
    assert largest_difference(alone, tmp_path / "output") < 1e-5
    state = state_of_checkpoint(alone)
    moved = [
        np.abs(state[f"network/{index:04d}"] - variable.numpy()).max()
        for index, variable in enumerate(build_model(42, 10).variables)
    ]
    assert min(moved) > 1e-4
    lines = [(run / "metrics.jsonl").read_text() for run in (alone, tmp_path / "output")]
    one, other = ([json.loads(line) for line in text.splitlines()] for text in lines)
    for mine, theirs in zip(one, other, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert mine["step"] == theirs["step"]


def test_only_the_chief_uses_the_output_folder(
    make_team: StartTeam, undisturbed: Path, tmp_path: Path
) -> None:
    team = make_team(2).start(0)
    team.start(1, options=("--output-dir", "/proc/nowhere"))
    assert team.finish() == [0, 0], team.errors
    assert compare(undisturbed, tmp_path / "output") == []
    events = [event["event"] for event in team.logs[1]]
    assert events == ["waiting_for_workers", "connecting", "joined", "following"]
    assert {event["worker"] for event in team.logs[1]} == {1}


def test_no_worker_changes_a_finished_run(make_team: StartTeam, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("[!.]*")}
    team = make_team(2, "--output-dir", str(undisturbed)).start()
    assert team.finish() == [0, 0], team.errors
    assert team.logs[0][-1]["event"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("[!.]*")} == before


def test_a_signal_to_any_worker_stops_all_at_the_same_step(
    make_team: StartTeam, undisturbed: Path, tmp_path: Path
) -> None:
    steps = [0]
    for rank in (1, 0):
        team = make_team(2).start()
        team.workers[0].wait_for("checkpoint")
        team.workers[rank].send_signal(signal.SIGTERM)
        assert team.finish() == [75, 75], team.errors
        for errors in team.errors.values():
            assert "which has ended or does not answer" not in errors
            assert "Traceback" not in errors
        attempt = manifest(tmp_path / "output")["attempts"][-1]
        assert attempt["outcome"] == "stopped"
        reason = (
            "SIGTERM" if rank == 0 else f"worker 1 ({team.addresses[1]}) received a stop request"
        )
        assert reason in attempt["reason"]
        steps.append(attempt["last_step"])
        for errors in team.errors.values():
            assert f"everything up to step {steps[-1]} of 60" in errors
    assert steps[0] < steps[1] < steps[2] <= 60

    again = make_team(2).start()
    assert again.finish() == [0, 0], again.errors
    assert compare(undisturbed, tmp_path / "output") == []


def test_a_killed_worker_ends_the_others_without_a_checkpoint(
    make_team: StartTeam, undisturbed: Path, tmp_path: Path
) -> None:
    for rank in (1, 0):
        team = make_team(2).start()
        team.workers[0].wait_for("checkpoint")
        team.workers[rank].kill()
        killed = time.monotonic()
        codes = team.finish()
        assert time.monotonic() - killed < SILENT_SECONDS
        assert codes.pop(rank) == -signal.SIGKILL
        assert set(codes) == {75}, team.errors
        survivor = next(other for other in team.workers if other != rank)
        assert f"lost worker {rank} ({team.addresses[rank]})" in team.errors[survivor]
    checkpoints = sorted((tmp_path / "output" / "checkpoints").glob("*.npz"))
    step = int(checkpoints[-1].name.split("-")[2])
    assert step in (20, 35, 40, 55, 60)

    again = make_team(2).start()
    assert again.finish() == [0, 0], again.errors
    first, second, third = manifest(tmp_path / "output")["attempts"]
    assert (first["outcome"], second["outcome"]) == ("stopped", "lost")
    assert third["first_step"] == step
    assert compare(undisturbed, tmp_path / "output") == []


def test_a_suspended_worker_ends_the_others(make_team: StartTeam) -> None:
    team = make_team(2).start()
    team.workers[0].wait_for("checkpoint")
    team.workers[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    chief = team.workers.pop(0)
    result = chief.finish()
    assert time.monotonic() - stopped < SILENT_SECONDS
    assert result.returncode == 75
    assert f"lost worker 1 ({team.addresses[1]})" in result.stderr


# If Python threads cannot run, a native timer ends the worker ten seconds later than the thread.
STALL_SECONDS, LATEST_SECONDS = 20, 20 + 10 + 5
COMPILATION_SECONDS = 30


def reports_stall(errors: str) -> bool:
    """Whether a worker reports a hanging call, by its watchdog thread or the native timer."""
    return "did not return within --stall-timeout" in errors or "Timeout (" in errors


@pytest.mark.parametrize(
    ("rank", "place", "seconds"),
    [
        (1, "Workers.require_equal 1", LATEST_SECONDS),
        (0, "Workers.broadcast 1", LATEST_SECONDS + COMPILATION_SECONDS),
        (1, "Engine.train_epoch 2", LATEST_SECONDS),
        (1, "Evaluator.__call__ 2", LATEST_SECONDS),
        (0, "CheckpointStore.save 4", LATEST_SECONDS),
        (0, "Engine.export 1", LATEST_SECONDS + COMPILATION_SECONDS),
        (1, "Workers.barrier 1", LATEST_SECONDS),
    ],
)
def test_a_hanging_worker_with_heartbeats_ends_the_others(
    make_team: StartTeam, rank: int, place: str, seconds: float
) -> None:
    team = make_team(2, "--stall-timeout", str(STALL_SECONDS), module=HANGING)
    env = {"COMPILATION_SECONDS": str(COMPILATION_SECONDS)}
    team.start(1 - rank, env=env)
    team.start(rank, options=("--stall-timeout", "1000"), env={**env, "HANG": place})
    team.workers.pop(rank).wait_for("hangs")
    start = time.monotonic()
    assert team.finish() == [1], team.errors
    assert time.monotonic() - start < seconds
    assert reports_stall(team.errors[1 - rank]), team.errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_listens_but_never_joins_ends_the_others(
    make_team: StartTeam, tmp_path: Path, listener: socket.socket, rank: int
) -> None:
    team = make_team(2, "--join-timeout", "5", "--stall-timeout", "5")
    team.addresses[1 - rank] = f"127.0.0.1:{listener.getsockname()[1]}"
    team.start(rank).workers[rank].wait_for("waiting_for_workers")
    start = time.monotonic()
    assert team.finish() == [1], team.errors
    # Five seconds for each option, ten until the native timer fires, and the exit of the process.
    assert time.monotonic() - start < 5 + 5 + 10 + 15
    assert reports_stall(team.errors[rank]), team.errors
    assert "in rendezvous" in team.errors[rank]
    assert not (tmp_path / "output").exists()


def test_a_worker_can_start_late(make_team: StartTeam) -> None:
    team = make_team(2, "--epochs", "1").start(0)
    team.workers[0].wait_for("waiting_for_workers")
    time.sleep(15)
    team.start(1)
    assert team.finish() == [0, 0], team.errors
    joined = next(event for event in team.logs[0] if event["event"] == "joined")
    assert joined["seconds"] > 15


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_never_starts_is_reported(
    make_team: StartTeam, tmp_path: Path, rank: int
) -> None:
    team = make_team(3, "--join-timeout", "15")
    missing = 1 - rank
    for worker in team.start(rank, 2).workers.values():
        worker.wait_for("waiting_for_workers")
    start = time.monotonic()
    assert team.finish() == [75, 75]
    assert time.monotonic() - start < 45
    name = f"worker {missing} ({team.addresses[missing]})"
    for errors in team.errors.values():
        assert f"cifar10-job: stopped: missing {name} (Connection refused)" in errors
        assert "within --join-timeout 15 s" in errors
    assert not (tmp_path / "output").exists()


def test_a_signal_ends_a_worker_that_waits_for_the_others(make_team: StartTeam) -> None:
    team = make_team(2).start(0)
    team.workers[0].wait_for("waiting_for_workers")
    time.sleep(1)
    team.workers[0].send_signal(signal.SIGTERM)
    assert team.finish(60) == [75]
    assert "stopped: SIGTERM" in team.errors[0]


def test_the_documented_command_trains_on_two_workers(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "multi-node.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^TF_CONFIG=.*$", page, re.MULTILINE)
    command = command.replace(".venv/bin", str(Path(sys.executable).parent))
    for port, free in zip((23451, 23452), free_addresses(2), strict=True):
        command = command.replace(f"127.0.0.1:{port}", free)
    workers = [
        subprocess.Popen(
            ["bash", "-c", command.replace('"index":0', f'"index":{rank}')],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert manifest(tmp_path / "output" / "nodes")["workers"] == 2


def test_all_workers_reject_different_options_or_devices(make_team: StartTeam) -> None:
    for option, value in (("seed", "43"), ("epochs", "4")):
        team = make_team(2).start(0)
        team.start(1, options=(f"--{option}", value))
        assert team.finish() == [2, 2], team.errors
        for errors in team.errors.values():
            assert f"worker 1 ({team.addresses[1]}) has {option} {value}, worker 0" in errors
    team = make_team(2).start(0)
    team.start(1, options=("--devices", "cpu:2"))
    assert team.finish() == [2, 2], team.errors
    for errors in team.errors.values():
        assert "received different devices" in errors
        assert "cpu:2" in errors
    # TensorFlow's strategy would ignore one device of each worker.
    team = make_team(2, "--devices", "cpu:2").start()
    assert team.finish() == [2, 2], team.errors
    for errors in team.errors.values():
        assert "--devices received cpu:2 with 2 workers, expected cpu:1" in errors
        assert "start more workers instead" in errors


def test_a_dry_run_reports_the_share_of_each_worker_without_contacting_others(
    make_team: StartTeam, tmp_path: Path
) -> None:
    team = make_team(4, "--dry-run").start(1)
    assert team.finish() == [0], team.errors
    (report,) = team.logs[1]
    assert report["workers"] == {"addresses": team.addresses, "index": 1}
    assert report["batch"]["rows_per_replica"] == 16
    assert not (tmp_path / "output").exists()


def test_a_run_resumes_with_another_number_of_workers(
    make_team: StartTeam, command: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    team = make_team(2).start()
    team.workers[0].wait_for("checkpoint")
    team.workers[1].send_signal(signal.SIGTERM)
    assert team.finish() == [75, 75], team.errors

    alone = Job(tmp_path, *command, "--devices", "auto")
    alone.wait_for("checkpoint")
    alone.send_signal(signal.SIGTERM)
    assert alone.finish().returncode == 75
    first, second = manifest(output)["attempts"]
    # The same number of replicas as before, with equal shares of the same global batch.
    assert manifest(output)["replicas"] == 2
    assert second["changes"] == ["workers: 2 -> 1"]

    more = make_team(4).start()
    assert more.finish() == [0] * 4, more.errors
    changed = next(event for event in more.logs[0] if event["event"] == "changed")
    assert changed["changes"] == ["replicas: 2 -> 4", "workers: 1 -> 4"]
    assert first["last_step"] == second["first_step"]
    assert manifest(output)["config"]["batch_size"] == 64
