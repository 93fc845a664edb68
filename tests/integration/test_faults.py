"""Faults of clusters during a training, on real data, in separate processes, on real volumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, Job, RunJob, StartJob
from tests.integration.chaos import check_visible, compare
from tests.integration.conftest import MakeVolume

# A checkpoint after every execution. An epoch has three executions, of 15, 15 and 10 steps.
OPTIONS = "--limit 2560 --batch-size 64 --epochs 2 --checkpoint-every 0.001 --devices cpu:1"


@pytest.fixture(scope="module")
def command(cifar10_dir: Path) -> tuple[str, ...]:
    """The arguments of a small training, without the output folder."""
    return ("train", *OPTIONS.split(), "--log-format", "json", "--data-dir", str(cifar10_dir))


@pytest.fixture(scope="module")
def reference(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the uninterrupted training."""
    folder = tmp_path_factory.mktemp("reference")
    result = Job(folder, *command, "--output-dir", folder).finish()
    assert result.returncode == 0, result.stderr
    return folder


def manifest(output: Path) -> Any:
    return json.loads((output / "run.json").read_text())


def events(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").iterdir())


def test_a_finished_run_is_reported_and_not_changed(
    run_job: RunJob, command: tuple[str, ...], reference: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.glob("[!.]*")}
    result = run_job(*command, "--output-dir", reference)
    assert (result.returncode, result.stderr) == (0, "")
    (event,) = events(result)
    assert event["event"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in reference.glob("[!.]*")} == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", "7", "--seed received 7, expected 42"),
        ("--batch-size", "128", "--batch-size received 128, expected 64"),
        ("--dataset", "synthetic", "--dataset received synthetic, expected cifar10"),
        ("--epochs", "1", "--epochs received 1, expected at least 2"),
    ],
)
def test_another_run_is_rejected_with_the_option_that_differs(
    run_job: RunJob,
    command: tuple[str, ...],
    reference: Path,
    option: str,
    value: str,
    message: str,
) -> None:
    files = [*reference.glob("[!.]*.*"), *checkpoints(reference)]
    before = {path: path.read_bytes() for path in files}
    result = run_job(*command, "--output-dir", reference, option, value)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    for path, content in before.items():
        assert path.read_bytes() == content


def test_a_full_disk_ends_the_run_and_loses_nothing(
    start_job: StartJob,
    run_job: RunJob,
    command: tuple[str, ...],
    reference: Path,
    make_volume: MakeVolume,
) -> None:
    volume = make_volume(80 * 1024)
    output = volume / "output"
    job = start_job(*command, "--output-dir", output)
    job.wait_for("checkpoint")
    filler = volume / "filler"
    # Fill the volume to the last byte.
    subprocess.run(["cp", "/dev/zero", filler], check=False, stderr=subprocess.DEVNULL)
    result = job.finish()
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"cifar10-job: error: cannot write {output}/")
    assert "No space left on device; free some space" in line
    assert check_visible(output) == []
    assert list(output.rglob("*.partial*")) == []
    filler.unlink()
    assert run_job(*command, "--output-dir", output).returncode == 0
    # If the last write of run.json found space again, the outcome is failed.
    assert compare(reference, output, ("failed", "lost")) == []


def test_a_lost_volume_ends_the_run_and_nothing_is_written_to_the_mount_point(
    start_job: StartJob, command: tuple[str, ...], make_volume: MakeVolume
) -> None:
    volume = make_volume(80 * 1024)
    job = start_job(*command, "--output-dir", volume)
    job.wait_for("checkpoint")
    subprocess.run(["umount", "-l", volume], check=True)
    result = job.finish()
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert str(volume) in line
    assert "No such file or directory" in line
    assert list(volume.iterdir()) == []


def test_a_damaged_checkpoint_loses_steps_but_the_result_is_bit_identical(
    run_job: RunJob,
    start_job: StartJob,
    command: tuple[str, ...],
    reference: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    job = start_job(*command, "--output-dir", output)
    job.wait_for("epoch")
    job.wait_for("checkpoint")
    job.kill()
    job.wait()
    older, newest = checkpoints(output)[:2]
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 0x10
    newest.write_bytes(content)
    result = run_job(*command, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    first, second = events(result)[:2]
    assert (first["event"], first["path"]) == ("checkpoint_damaged", str(newest))
    assert (second["event"], second["step"]) == ("start", int(older.name.split("-")[2]))
    assert compare(reference, output) == []


def test_two_runs_cannot_share_a_folder(
    start_job: StartJob, run_job: RunJob, command: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    first = start_job(*command, "--output-dir", output, env={"SLURM_JOB_ID": "41"})
    first.wait_for("start")
    second = run_job(*command, "--output-dir", output)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"--output-dir {output} is in use by slurm job 41, process" in line
    assert first.finish().returncode == 0
    assert compare(reference, output) == []


def test_a_requeued_job_takes_over_from_its_older_attempt(
    start_job: StartJob, command: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    slurm = {"SLURM_JOB_ID": "41"}
    older = start_job(*command, "--output-dir", output, env=slurm)
    older.wait_for("checkpoint")
    # The node hangs, and continues only after the next attempt has taken over.
    older.send_signal(signal.SIGSTOP)
    newer = start_job(*command, "--output-dir", output, env={**slurm, "SLURM_RESTART_COUNT": "1"})
    assert newer.wait_for("waiting")["holder"].startswith("slurm job 41, process")
    assert newer.wait_for("start")["step"] > 0
    older.send_signal(signal.SIGCONT)
    ended = older.finish()
    assert ended.returncode == 75
    (line,) = ended.stderr.splitlines()
    assert "was taken over by slurm job 41" in line
    assert "ends without writing" in line
    assert newer.finish().returncode == 0
    assert compare(reference, output) == []


def test_a_running_older_attempt_is_requested_to_save_its_work(
    start_job: StartJob, command: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    run_id = ("--run-id", "mine")
    longer = ("--epochs", "40")
    older = start_job(*command, *longer, *run_id, "--output-dir", output)
    older.wait_for("checkpoint")
    newer = start_job(*command, *longer, *run_id, "--output-dir", output)
    ended = older.finish()
    assert ended.returncode == 75
    assert "a newer attempt of run mine on host" in ended.stderr
    assert ended.stderr.endswith("; that attempt resumes the run\n")
    saved = manifest(output)["attempts"][0]["last_step"]
    assert newer.wait_for("start")["step"] == saved > 0


def test_a_clock_that_runs_backwards_changes_nothing(
    start_job: StartJob, command: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime; install the package faketime")
    output, clock = tmp_path / "output", tmp_path / "clock"
    clock.write_text("-0")
    fake = {
        "LD_PRELOAD": str(library),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
    }
    first = start_job(*command, "--output-dir", output, "--run-id", "mine", env=fake)
    before = first.wait_for("checkpoint")["time"]
    clock.write_text("-400d")
    # A checkpoint may have been reported before the clock was set.
    while first.wait_for("checkpoint")["time"] >= before:
        pass
    first.send_signal(signal.SIGTERM)
    assert first.finish().returncode == 75
    clock.write_text("-4000d")
    second = start_job(*command, "--output-dir", output, "--run-id", "mine", env=fake)
    assert second.finish().returncode == 0
    assert compare(reference, output) == []
    # The times in metrics.jsonl come from a monotonic clock.
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [0 < line["seconds"] <= line["elapsed_seconds"] < 300 for line in lines] == [True] * 2


def test_another_number_of_threads_causes_a_warning_and_is_recorded(
    start_job: StartJob, command: tuple[str, ...], tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    output = tmp_path / "output"
    first = start_job(*command, "--output-dir", output)
    first.wait_for("checkpoint")
    first.send_signal(signal.SIGUSR1)
    assert first.finish().returncode == 75
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(affinity)})
    try:
        second = start_job(*command, "--output-dir", output)
    finally:
        os.sched_setaffinity(0, affinity)
    threads = len(affinity)
    assert second.wait_for("changed")["changes"] == [f"threads: {threads} -> 1"]
    second.send_signal(signal.SIGUSR1)
    assert second.finish().returncode == 75
    assert manifest(output)["attempts"][-1]["changes"] == [f"threads: {threads} -> 1"]


def test_closed_output_pipes_do_not_change_the_exit_code(
    start_job: StartJob, command: tuple[str, ...], tmp_path: Path
) -> None:
    """As with `train | tee log` and Ctrl-C, which also ends tee."""
    job = start_job(*command, "--output-dir", tmp_path / "output")
    job.wait_for("checkpoint")
    assert job.stdout is not None
    assert job.stderr is not None
    job.stdout.close()
    job.stderr.close()
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=300) == 75
    assert manifest(tmp_path / "output")["attempts"][0]["outcome"] == "stopped"


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_a_signal_ends_a_process_without_stdout(
    command: tuple[str, ...], tmp_path: Path, log_format: str
) -> None:
    words = [sys.executable, "-m", "job", *command, "--log-format", log_format]
    closed = 'exec "$@" >&-'
    process = subprocess.Popen(
        ["sh", "-c", closed, "sh", *words, "--output-dir", str(tmp_path / "output")],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    # TensorFlow is being imported, which holds back what others print.
    assert errors == "cifar10-job: stopped: SIGTERM; run the same command again to resume\n"
    assert process.returncode == 75
