"""`sbatch slurm/train.sh` on a real Slurm, with real data: stopped and resumed."""

import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.chaos import VISIBLE, compare
from tests.integration.slurm import (
    Cluster,
    attempts,
    environment,
    holder_pid,
    processes,
    require_slurm,
    suspended,
    wait_until,
)

# Three executions per epoch, and a checkpoint after each.
OPTIONS = "--limit 2560 --batch-size 64 --epochs 3 --checkpoint-every 0.001"
TRAIN = ("slurm/train.sh", *OPTIONS.split())
ON_CPU = {"JOB_DEVICES": "cpu:1"}
CHECKPOINT = "checkpoint at step"


@pytest.fixture(scope="module")
def cluster(cifar10_dir: Path) -> Iterator[Cluster]:
    require_slurm()
    one = Cluster(cifar10_dir)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture
def output(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """An output folder for one test."""
    return cluster.folder / "output" / re.sub(r"\W+", "-", request.node.name)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> str:
    """A job with the unmodified script that runs without interruption."""
    job = cluster.submit(*TRAIN, **ON_CPU)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    return job


@pytest.fixture
def reference(cluster: Cluster, undisturbed: str) -> Path:
    """The output folder of the undisturbed job."""
    return cluster.checkout / "output" / "slurm"


def submit(cluster: Cluster, output: Path, *options: str, **env: str) -> str:
    return cluster.submit(*options, *TRAIN, JOB_OUTPUT_DIR=str(output), **{**ON_CPU, **env})


def test_the_script_leaves_every_artifact_and_one_readable_log(
    cluster: Cluster, undisturbed: str, reference: Path
) -> None:
    names = {path.name for path in reference.iterdir() if not path.name.startswith(".")}
    assert names == VISIBLE
    # The file with the job's progress has been removed.
    assert {path.name for path in reference.glob(".*")} == {".lease"}
    assert json.loads((reference / "evaluation.json").read_text())["examples"] == 10_000
    log = cluster.log(undisturbed)
    start = (
        rf"job {undisturbed}, attempt 0 on n1: \.venv/bin/python, GPUs per node: 1, "
        r"output \S+/slurm,"
    )
    assert re.search(start, log)
    assert "error" not in log
    assert log.splitlines()[-1].endswith(f"slurm/train.sh: job {undisturbed}: exit code 0, done")
    (attempt,) = attempts(reference)
    assert (attempt["run_id"], attempt["outcome"]) == (f"slurm job {undisturbed}", "done")
    requested = ("JobName", "TimeLimit", "CPUs/Task", "MinMemoryNode", "TresPerNode", "Requeue")
    assert [cluster.fields(undisturbed)[name] for name in requested] == [
        *("cifar10", "01:00:00", "4", "16G", "gres:gpu:1", "1")
    ]


def test_a_job_requeued_at_its_time_limit_ends_with_the_same_bits(
    cluster: Cluster, reference: Path, output: Path
) -> None:
    # Slurm sends the signal two minutes before the limit, or up to half a minute earlier.
    job = submit(cluster, output, "--time=3")
    cluster.wait_for_log(job, CHECKPOINT)
    with suspended(holder_pid(output)):
        # Slurm resumes the processes that it signals.
        cluster.wait_for_log(job, "exit code 75, requeueing from step-0", timeout=100)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.fields(job)["Restarts"] == "1"
    first, second = attempts(output)
    assert (first["outcome"], first["reason"]) == ("stopped", "SIGUSR1")
    assert second["first_step"] == first["last_step"] > 0
    assert compare(reference, output) == []


def test_a_job_requeued_with_scontrol_ends_with_the_same_bits(
    cluster: Cluster, reference: Path, output: Path
) -> None:
    job = submit(cluster, output)
    cluster.wait_for_log(job, CHECKPOINT)
    with suspended(holder_pid(output)):
        cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job) == "COMPLETED"
    assert [one["outcome"] for one in attempts(output)] == ["stopped", "done"]
    assert cluster.fields(job)["Restarts"] == "1"
    assert compare(reference, output) == []


def test_scancel_ends_the_job_and_a_new_job_resumes_to_the_same_bits(
    cluster: Cluster, reference: Path, output: Path
) -> None:
    first = submit(cluster, output)
    cluster.wait_for_log(first, CHECKPOINT)
    with suspended(holder_pid(output)):
        cluster.run("scancel", first)
    assert cluster.wait(first) == "CANCELLED"

    second = submit(cluster, output)
    cluster.wait_for_log(second, CHECKPOINT)
    with suspended(holder_pid(output)):
        cluster.run("scancel", "--signal=KILL", "--full", second)
    cluster.wait(second)

    third = submit(cluster, output)
    assert cluster.wait(third) == "COMPLETED", cluster.log(third)
    stopped, killed, done = attempts(output)
    jobs = [one["run_id"] for one in (stopped, killed, done)]
    assert jobs == [f"slurm job {job}" for job in (first, second, third)]
    # Slurm kills the script of the second job at once, but may first send its training a SIGTERM.
    assert (stopped["outcome"], done["outcome"]) == ("stopped", "done")
    assert killed["outcome"] in ("stopped", "lost")
    assert killed["first_step"] == stopped["last_step"] > 0
    assert [cluster.fields(job)["Restarts"] for job in (first, second)] == ["0", "0"]
    assert compare(reference, output) == []


@pytest.mark.parametrize(
    ("partition", "requeued_by"),
    # With a grace time the job ends before Slurm requeues it.
    [("preemptible", "the script"), ("graceless", "Slurm")],
)
def test_a_preempted_job_resumes_to_the_same_bits(
    cluster: Cluster, reference: Path, output: Path, partition: str, requeued_by: str
) -> None:
    job = submit(cluster, output, f"--partition={partition}", "--nodelist=n1", "--exclusive")
    cluster.wait_for_log(job, CHECKPOINT)
    with suspended(holder_pid(output)):
        urgent = cluster.submit(
            "--partition=urgent", "--nodelist=n1", "--exclusive", "--wrap", "true"
        )
        # Slurm resumes processes that it ends, so a query can come too late to read PreemptTime.
        cluster.wait_for_log(job, "CANCELLED AT")
    assert cluster.wait(urgent, job) == "COMPLETED"
    assert ("requeueing from step-0" in cluster.log(job)) == (requeued_by == "the script")
    assert [one["outcome"] for one in attempts(output)] == ["stopped", "done"]
    assert compare(reference, output) == []


def test_a_bad_option_is_not_requeued(cluster: Cluster, output: Path) -> None:
    job = cluster.submit("slurm/train.sh", "--epochs", "0", JOB_OUTPUT_DIR=str(output), **ON_CPU)
    assert cluster.wait(job) == "FAILED"
    fields = cluster.fields(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")
    assert "Invalid value for '--epochs'" in cluster.log(job)
    assert "exit code 2, not requeued; the error above states what to change" in cluster.log(job)


def test_a_node_without_its_gpu_is_excluded_once(cluster: Cluster, output: Path) -> None:
    # The nodes have no real GPUs.
    job = submit(cluster, output, JOB_DEVICES="auto")
    assert cluster.wait(job) == "FAILED"
    fields = cluster.fields(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("3:0", "1")
    log = cluster.log(job)
    assert log.count("expected 1 GPU (CUDA_VISIBLE_DEVICES=0), TensorFlow detects 0") == 2
    assert "exit code 3, requeueing from the start, not on n1;" in log
    assert "attempt 1 on n2" in log
    assert "two attempts in a row made no progress after the start" in log


def test_array_tasks_train_two_at_a_time_and_are_requeued_separately(
    cluster: Cluster, reference: Path, output: Path
) -> None:
    array = submit(cluster, output, "--array=41-43%2")
    # The last task has the job ID of the array itself.
    last = f"{array}_43"
    most = 0

    def reached_the_last() -> bool:
        nonlocal most
        running = cluster.run("squeue", "-h", "-j", array, "-t", "RUNNING", "-o", "%i").split()
        most = max(most, len(running))
        return CHECKPOINT in cluster.log(last)

    wait_until(reached_the_last, 300)
    with suspended(holder_pid(output / "seed-43")):
        cluster.run("scancel", "--signal=USR1", last)
    assert cluster.wait(*(f"{array}_{task}" for task in range(41, 44))) == "COMPLETED"
    assert most == 2
    seeds = [json.loads((output / f"seed-{n}" / "run.json").read_text()) for n in range(41, 44)]
    assert [seed["config"]["seed"] for seed in seeds] == [41, 42, 43]
    assert [len(seed["attempts"]) for seed in seeds] == [1, 1, 2]
    # 42 is the default seed.
    assert compare(reference, output / "seed-42") == []


def test_a_job_whose_node_is_lost_is_taken_over_on_the_other_node(
    cluster: Cluster, output: Path
) -> None:
    # Long enough that the old process still computes and writes when the new one starts.
    longer = (*TRAIN, "--epochs", "24")
    left_alone, lost = output / "left-alone", output / "lost"
    job = cluster.submit(*longer, JOB_OUTPUT_DIR=str(lost), **ON_CPU)
    cluster.wait_for_log(job, CHECKPOINT)
    assert cluster.fields(job)["BatchHost"] == "n1"
    cluster.kill_node("n1")
    try:
        with suspended(holder_pid(lost)):  # only until Slurm considers the node dead
            other = cluster.submit(
                "--nodelist=n2", *longer, JOB_OUTPUT_DIR=str(left_alone), **ON_CPU
            )
            wait_until(lambda: cluster.fields(job)["Restarts"] == "1", 90)
            whole = (lost / "checkpoints").glob("[0-9]*.npz")
            saved = max(path.name.split("-")[2] for path in whole)
        assert cluster.wait(other, job) == "COMPLETED", cluster.log(job)
    finally:
        cluster.start_node("n1")
    fields = cluster.fields(job)
    assert (fields["BatchHost"], fields["Restarts"]) == ("n2", "1")
    old, new = attempts(lost)
    assert old["outcome"] == "stopped"
    assert f"a newer attempt of slurm job {job} on host" in old["reason"]
    # The process on the lost node continued, and its later checkpoints are not lost.
    assert new["first_step"] == old["last_step"] > int(saved)
    assert "requeueing from" not in cluster.log(job)
    assert compare(left_alone, lost) == []
    wait_until(lambda: cluster.node_states() == {"n1:idle", "n2:idle"}, 60)


# Exits with $CODE; each of the first $MOVING attempts writes a new checkpoint.
STUB = """#!/bin/sh
test "$1" != -c || exit 0
echo "the stub ends with $CODE, on the GPUs $CUDA_VISIBLE_DEVICES"
mkdir -p "$JOB_OUTPUT_DIR/checkpoints"
n=$SLURM_RESTART_COUNT
test "$n" -ge "${MOVING:-0}" || touch "$JOB_OUTPUT_DIR/checkpoints/00000$n-step-0000001$n-0.npz"
exit $CODE
"""


@pytest.fixture(scope="module")
def ordinary(cluster: Cluster) -> Cluster:
    """The cluster for a user without privileges, whose program is a stub."""
    stub = cluster.folder / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return cluster.for_ordinary_user(PYTHON=str(stub))


def test_an_ordinary_user_can_exclude_a_node(ordinary: Cluster) -> None:
    job = ordinary.submit("slurm/train.sh", CODE="3")
    assert ordinary.wait(job) == "FAILED"
    assert ordinary.log(job).count("the stub ends with 3") == 2
    assert "requeueing from the start, not on n1;" in ordinary.log(job)
    assert ordinary.fields(job)["ExitCode"] == "3:0"


def test_a_job_with_a_fixed_node_is_not_moved_to_another(ordinary: Cluster) -> None:
    job = ordinary.submit("--nodelist=n2", "slurm/train.sh", CODE="3")
    assert ordinary.wait(job) == "FAILED"
    message = "a GPU is missing on n2, and the job cannot run on other nodes"
    assert message in ordinary.log(job)
    assert ordinary.fields(job)["ExitCode"] == "3:0"


@pytest.mark.parametrize(
    ("code", "moving", "restarts"),
    [("1", "0", "1"), ("1", "2", "3"), ("75", "0", "1"), ("139", "1", "2")],
)
def test_a_job_is_requeued_while_it_makes_progress_and_once_without(
    ordinary: Cluster, code: str, moving: str, restarts: str
) -> None:
    shutil.rmtree(ordinary.checkout / "output", ignore_errors=True)
    job = ordinary.submit("slurm/train.sh", CODE=code, MOVING=moving)
    assert ordinary.wait(job) == "FAILED"
    last = {"0": "the start", "1": "step-00000010", "2": "step-00000011"}[moving]
    assert f"two attempts in a row made no progress after {last}" in ordinary.log(job)
    fields = ordinary.fields(job)
    assert (fields["ExitCode"], fields["Restarts"]) == (f"{code}:0", restarts)


@pytest.mark.parametrize(
    ("option", "gpus"),
    [
        ("--exclusive", "0,1,2,3"),
        ("--gres=gpu:3", "0,1,2"),
        ("--gpus-per-node=a:1,b:2", "0,2,3"),
        ("--mem=1G", "0"),
    ],
)
def test_the_training_gets_every_gpu_that_the_job_has(
    ordinary: Cluster, option: str, gpus: str
) -> None:
    job = ordinary.submit(option, "slurm/train.sh", CODE="0")
    assert ordinary.wait(job) == "COMPLETED"
    assert f"on the GPUs {gpus}\n" in ordinary.log(job)


def test_a_job_cancelled_while_it_requeues_itself_stays_cancelled(ordinary: Cluster) -> None:
    scontrol = ordinary.checkout / "slow" / "scontrol"
    scontrol.parent.mkdir()
    real = shutil.which("scontrol")
    scontrol.write_text(
        f'#!/bin/sh\n[ "$1" != requeue ] || scancel "$SLURM_JOB_ID"\nexec {real} "$@"\n'
    )
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{ordinary.env['PATH']}"
    job = ordinary.submit("slurm/train.sh", CODE="1", PATH=path)
    assert ordinary.wait(job) == "CANCELLED"
    assert "requeueing from" in ordinary.log(job)
    assert ordinary.fields(job)["Restarts"] == "0"


def test_a_job_submitted_from_within_another_does_not_affect_it(ordinary: Cluster) -> None:
    inner = "sbatch --parsable slurm/train.sh > inner; until test -e end; do sleep 0.2; done"
    # Its GPUs must not be passed to the inner job.
    outer = ordinary.submit("--array=5", "--gpus=2", "--wrap", inner, CODE="1")
    wait_until(lambda: (ordinary.checkout / "inner").exists(), 30)
    wait_until(lambda: (ordinary.checkout / "inner").read_text() != "", 30)
    job = (ordinary.checkout / "inner").read_text().strip()
    assert ordinary.wait(job) == "FAILED"
    assert f"job {job}, attempt 1" in ordinary.log(job)
    assert ordinary.log(job).count("the stub ends with 1, on the GPUs 2") == 2
    assert ordinary.fields(job)["Restarts"] == "1"
    assert ordinary.fields(f"{outer}_5")["Restarts"] == "0"
    assert ordinary.state(f"{outer}_5") == "RUNNING"
    ordinary.run("touch", "end")


def test_a_job_in_apptainer_stops_cleanly_and_resumes_to_the_same_bits(
    cluster: Cluster, sif: Path, readable_data: Path, reference: Path
) -> None:
    image = {"CONTAINER_IMAGE": str(sif), "JOB_DATA_DIR": str(readable_data)}
    user = cluster.for_ordinary_user(**image, **ON_CPU)
    output = user.checkout / "output" / "slurm"
    foreign = {"LD_LIBRARY_PATH": "/opt/modules/lib", "PYTHONSTARTUP": "/home/x", "SECRET": "x"}
    first = user.submit("--time=3", *TRAIN, **foreign)
    # A signal also ends the process that mounts the image. After a validation, everything that is
    # needed is in memory.
    user.wait_for_log(first, "epoch 1/3")
    pid = holder_pid(output)
    with suspended(pid):
        received = dict(line.split(b"=", 1) for line in environment(Path(f"/proc/{pid}")) if line)
        user.wait_for_log(first, "exit code 75, requeueing from step-0", timeout=100)
    assert (received[b"JOB_OUTPUT_DIR"], received[b"SLURM_JOB_ID"]) == (b"/output", first.encode())
    assert received[b"PYTHONPATH"] == b"/app"
    assert not {b"PYTHONSTARTUP", b"SECRET"} & set(received)
    assert b"modules" not in received[b"LD_LIBRARY_PATH"]
    user.run("scontrol", "update", f"JobId={first}", "TimeLimit=60")
    user.wait_for_log(first, "epoch 2/3")
    with suspended(holder_pid(output)):
        user.run("scancel", first)
    assert user.wait(first) == "CANCELLED"
    wait_until(lambda: not processes(first), 10)

    second = user.submit(*TRAIN)
    assert user.wait(second) == "COMPLETED", user.log(second)
    assert not processes(second)
    assert [one["reason"] for one in attempts(output)] == ["SIGUSR1", "SIGTERM", None]
    assert compare(reference, output) == []


README = (REPOSITORY / "slurm" / "README.md").read_text()


def blocks() -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]


def test_the_documented_submissions_are_accepted(cluster: Cluster) -> None:
    whole = [block.replace("\\\n", " ") for block in blocks()]
    lines = [line for block in whole for line in block.splitlines() if "sbatch " in line]
    assert len(lines) >= 7
    for line in lines:
        assert "slurm/train.sh" in line
        cluster.run("bash", "-c", line.replace("sbatch ", "sbatch --test-only "))


def test_doctor_reports_the_problem_of_a_node(cluster: Cluster) -> None:
    (line,) = (line for block in blocks() for line in block.splitlines() if "doctor" in line)
    found = cluster.run("bash", "-c", f"{line.replace('NODE', 'n2')}; test $? = 3")
    assert re.search(
        r"^Problem .*expected 1 GPU \(.*\), TensorFlow detects 0", found, re.MULTILINE
    ), found


def test_the_documented_copy_to_local_disks_works_without_a_gpu(
    cluster: Cluster, cifar10_dir: Path, output: Path
) -> None:
    data = cluster.folder / "archive"
    data.mkdir()
    folder = "cifar-10-batches-py"
    subprocess.run(
        ["tar", "-C", cifar10_dir, "-czf", data / "cifar-10-python.tar.gz", folder], check=True
    )
    (recipe,) = (block for block in blocks() if "sbcast" in block)
    disk = cluster.folder / "disk"
    other = cluster.with_data(data)
    (other.checkout / "slurm" / "site.sh").write_text(recipe)
    words = ("--gpus-per-node=0", *TRAIN, "--epochs", "1")
    job = other.submit(*words, JOB_OUTPUT_DIR=str(output), SLURM_TMPDIR=str(disk))
    assert other.wait(job) == "COMPLETED", other.log(job)
    assert f"GPUs per node: 0, output {output}, data {disk}/cifar10-{job}\n" in other.log(job)
    # The documented script removes its copy.
    assert list(disk.iterdir()) == []
