"""`sbatch --nodes=2 slurm/train.sh` on separate hosts, with the program itself and with stubs."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.chaos import compare
from tests.integration.namespaces import Hosts, require_namespaces
from tests.integration.slurm import (
    Cluster,
    attempts,
    environment,
    processes,
    require_slurm,
    wait_until,
)

README = (REPOSITORY / "slurm" / "README.md").read_text()
# Runs the commands in JOB_STUB instead of the program.
STUB = """#!/bin/sh
test "$1" != -c || exit 0
eval "$JOB_STUB"
"""
TASK_LINE = re.compile(
    r"^task (\d) of (\d) \((\S+) on (\S+)\), node (\d), local (\d), job (\d+), on (\S+)$", re.M
)
PRINT_TASK = """
echo "task $SLURM_PROCID of $SLURM_STEP_NUM_TASKS ($SLURM_STEP_TASKS_PER_NODE on \
$SLURM_STEP_NODELIST), node $SLURM_NODEID, local $SLURM_LOCALID, job $SLURM_JOB_ID, on $(hostname)"
"""
# Waits until srun ends it because of another task.
STAY = "trap 'exit 75' TERM; sleep 100 & wait"


@pytest.fixture(scope="module")
def cluster(cifar10_dir: Path) -> Iterator[Cluster]:
    require_slurm()
    require_namespaces()
    one = Cluster(cifar10_dir, separate=True)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def hosts(cluster: Cluster) -> Hosts:
    assert cluster.hosts is not None
    return cluster.hosts


@pytest.fixture
def output(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """An output folder for one test."""
    return cluster.folder / "output" / re.sub(r"\W+", "-", request.node.name)


@pytest.fixture(scope="module")
def stub(cluster: Cluster) -> Path:
    path = cluster.folder / "stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


@pytest.fixture
def base(output: Path, stub: Path) -> dict[str, str]:
    """Variables that make the script run the stub as the program."""
    return {"JOB_OUTPUT_DIR": str(output), "PYTHON": str(stub)}


# Three executions per epoch, and a checkpoint after each.
TRAIN = (
    "slurm/train.sh",
    *["--limit", "2560", "--batch-size", "64", "--epochs", "3", "--checkpoint-every", "0.001"],
)
LOST = "lost worker 1 (n2:"


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Path:
    """The output folder of an uninterrupted training on two nodes."""
    job = cluster.submit("--nodes=2", *TRAIN, JOB_DEVICES="cpu:1")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert re.search(r"all 2 workers are connected", log)
    assert "worker 1: follows worker 0 (n1:" in log
    assert log.count("epoch 3/3") == 1
    return cluster.checkout / "output" / "slurm"


def begin(cluster: Cluster, output: Path) -> str:
    """Submit the same training with another output folder, and wait for a checkpoint."""
    job = cluster.submit("--nodes=2", *TRAIN, JOB_OUTPUT_DIR=str(output), JOB_DEVICES="cpu:1")
    cluster.wait_for_log(job, "checkpoint at step")
    return job


def test_at_the_time_limit_all_nodes_stop_and_resume_to_the_same_bits(
    cluster: Cluster, trained: Path, output: Path
) -> None:
    job = begin(cluster, output)
    # The signal that Slurm sends at the limit.
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert "exit code 75, requeueing from step-0" in log
    assert LOST not in log
    first, second = attempts(output)
    assert first["outcome"] == "stopped"
    assert second["first_step"] == first["last_step"] > 0
    assert compare(trained, output) == []


def test_after_a_killed_worker_the_requeued_job_ends_with_the_same_bits(
    cluster: Cluster, trained: Path, output: Path
) -> None:
    job = begin(cluster, output)
    os.kill(worker_on("n2", job), signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert cluster.fields(job)["Restarts"] == "1"
    assert "exit code 137, requeueing from step-0" in cluster.log(job)
    first, second = attempts(output)
    assert first["outcome"] == "stopped"
    assert LOST in first["reason"]
    assert second["first_step"] == first["last_step"] > 0
    assert compare(trained, output) == []


def test_after_a_network_failure_the_requeued_job_ends_with_the_same_bits(
    cluster: Cluster, hosts: Hosts, trained: Path, output: Path
) -> None:
    job = begin(cluster, output)
    hosts.disconnect("n2")
    disconnected = time.monotonic()
    try:
        cluster.wait_for_log(job, "exit code 75, requeueing from step-0")
        assert time.monotonic() - disconnected < 60
    finally:
        hosts.reconnect("n2")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert LOST in cluster.log(job)
    assert compare(trained, output) == []


def test_two_nodes_with_apptainer_end_with_the_same_bits(
    cluster: Cluster, trained: Path, sif: Path, readable_data: Path
) -> None:
    image = {"CONTAINER_IMAGE": str(sif), "JOB_DATA_DIR": str(readable_data)}
    user = cluster.for_ordinary_user(**image, JOB_DEVICES="cpu:1")
    job = user.submit("--nodes=2", *TRAIN)
    assert user.wait(job) == "COMPLETED", user.log(job)
    assert "worker 1: follows worker 0 (n1:" in user.log(job)
    assert compare(trained, user.checkout / "output" / "slurm") == []


def worker_on(node: str, job: str) -> int:
    """The process ID of a job's training on a node."""
    for process in processes(job):
        with contextlib.suppress(OSError):
            here = f"SLURMD_NODENAME={node}".encode() in environment(process)
            if here and b"\0train\0" in (process / "cmdline").read_bytes():
                return int(process.name)
    pytest.fail(f"no training of job {job} on {node}")


def submit(cluster: Cluster, script: str, *options: str, **env: str) -> str:
    return cluster.submit("--nodes=2", *options, "slurm/train.sh", JOB_STUB=script, **env)


@pytest.mark.parametrize(("options", "count"), [(("--nodes=3",), 3), (("--ntasks-per-node=2",), 2)])
def test_each_node_runs_one_task_and_the_first_runs_on_the_node_of_the_script(
    cluster: Cluster, base: dict[str, str], options: tuple[str, ...], count: int
) -> None:
    job = submit(cluster, PRINT_TASK, *options, **base)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    each, nodes = f"1(x{count})", f"n[1-{count}]"
    assert sorted(TASK_LINE.findall(cluster.log(job))) == [
        (str(n), str(count), each, nodes, str(n), "0", job, f"n{n + 1}") for n in range(count)
    ]
    assert cluster.fields(job)["BatchHost"] == "n1"
    assert f"attempt 0 on {nodes}: " in cluster.log(job)


def test_site_sh_can_prepare_each_node(
    cluster: Cluster, base: dict[str, str], output: Path
) -> None:
    output.mkdir(parents=True)
    (recipe,) = re.findall(r"^srun .*mkdir.*", README, re.MULTILINE)
    options, folder = recipe.split(" mkdir -p ")
    assert folder == '"$local_data"'
    site = cluster.checkout / "slurm" / "site.sh"
    # The nodes share this machine's files.
    site.write_text(f"{options} sh -c 'touch {output}/$(hostname)'\n")
    try:
        job = submit(cluster, PRINT_TASK, **base)
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    finally:
        site.unlink()
    assert {path.name for path in output.iterdir()} == {"n1", "n2"}


def test_each_node_selects_its_own_gpus_for_a_step(cluster: Cluster, base: dict[str, str]) -> None:
    """The script, which runs on the first node, cannot read the GPU numbers of other nodes."""
    first = cluster.submit(
        *("--nodelist=n1", "slurm/train.sh"), **{**base, "JOB_STUB": "sleep 100"}
    )
    try:
        wait_until(lambda: cluster.state(first) == "RUNNING", 30)
        print_gpus = (
            'echo "task $SLURM_PROCID: $SLURM_STEP_GPUS, $SLURM_JOB_GPUS of $SLURM_GPUS_ON_NODE"'
        )
        job = submit(cluster, print_gpus, "--gpus-per-node=2", **base)
        assert cluster.wait(job) == "COMPLETED"
        tasks = re.findall(r"^task .*", cluster.log(job), re.M)
        assert sorted(tasks) == ["task 0: 1,2, 1,2 of 2", "task 1: 0,1, 1,2 of 2"]
    finally:
        cluster.run("scancel", first)
        cluster.wait(first)


def test_a_node_that_fails_to_start_ends_the_others_and_after_a_retry_the_job(
    cluster: Cluster, base: dict[str, str]
) -> None:
    job = submit(cluster, f"test $SLURM_PROCID = 0 || exit 2; {STAY}", **base)
    assert cluster.wait(job, timeout=60) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "1", cluster.log(job)
    assert "two attempts in a row made no progress after the start" in cluster.log(job)


def test_array_tasks_run_as_separate_jobs_on_the_same_nodes(
    cluster: Cluster, base: dict[str, str], output: Path
) -> None:
    together = "until test $(ls ../meeting-* | wc -l) = 4; do sleep 0.1; done"
    meet = f"cd $JOB_OUTPUT_DIR; touch ../meeting-$JOB_SEED-$SLURM_PROCID; {together}"
    array = submit(cluster, PRINT_TASK + meet, "--array=5-6", **base)
    tasks = [f"{array}_{seed}" for seed in (5, 6)]
    assert cluster.wait(*tasks, timeout=60) == "COMPLETED"
    jobs = [{line[6] for line in TASK_LINE.findall(cluster.log(task))} for task in tasks]
    assert [len(one) for one in jobs] == [1, 1]
    assert jobs[0] != jobs[1]
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"seed-5", "seed-6"}


def test_a_job_that_loses_a_node_resumes_on_other_nodes(
    cluster: Cluster, base: dict[str, str]
) -> None:
    job = submit(cluster, f"{PRINT_TASK} test $SLURM_RESTART_COUNT = 0 || exit 0; {STAY}", **base)
    cluster.wait_for_log(job, "task 1 of 2 (1(x2) on n[1-2])")
    cluster.kill_node("n2")
    try:
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    finally:
        cluster.start_node("n2")
    assert cluster.fields(job)["Restarts"] == "1"
    assert "task 1 of 2 (1(x2) on n[1,3])" in cluster.log(job)
    wait_until(cluster.is_idle, 60)
