"""`sbatch --nodes=2 slurm/train.sh` on hosts of their own: the job itself, and stubs for it."""

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
# Does what JOB_STUB says, in any runtime.
STUB = """#!/bin/sh
test "$1" != -c || exit 0
eval "$JOB_STUB"
"""
TOLD = re.compile(
    r"^task (\d) of (\d) \((\S+) on (\S+)\), node (\d), local (\d), job (\d+), on (\S+)$", re.M
)
TELL = """
echo "task $SLURM_PROCID of $SLURM_STEP_NUM_TASKS ($SLURM_STEP_TASKS_PER_NODE on \
$SLURM_STEP_NODELIST), node $SLURM_NODEID, local $SLURM_LOCALID, job $SLURM_JOB_ID, on $(hostname)"
"""
# Until srun ends it because of another task.
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
    """Variables by which the stub is the program."""
    return {"JOB_OUTPUT_DIR": str(output), "PYTHON": str(stub)}


# Three executions an epoch, and a checkpoint after each.
TRAIN = (
    "slurm/train.sh",
    *["--limit", "2560", "--batch-size", "64", "--epochs", "3", "--checkpoint-every", "0.001"],
)
LOST = "lost worker 1 (n2:"


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Path:
    """The output folder of a training on two nodes that nothing happened to."""
    job = cluster.submit("--nodes=2", *TRAIN, JOB_DEVICES="cpu:1")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert re.search(r"all 2 workers are there", log)
    assert "worker 1: follows worker 0 (n1:" in log
    assert log.count("epoch 3/3") == 1
    return cluster.checkout / "output" / "slurm"


def begin(cluster: Cluster, output: Path) -> str:
    """Submit that training for another folder, and wait for a checkpoint."""
    job = cluster.submit("--nodes=2", *TRAIN, JOB_OUTPUT_DIR=str(output), JOB_DEVICES="cpu:1")
    cluster.wait_for_log(job, "checkpoint at step")
    return job


def test_at_the_time_limit_all_nodes_stop_together_and_go_on_to_the_same_bits(
    cluster: Cluster, trained: Path, output: Path
) -> None:
    job = begin(cluster, output)
    # As Slurm does at the limit.
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert "exit code 75, requeueing from step-0" in log
    assert LOST not in log
    first, second = attempts(output)
    assert first["outcome"] == "stopped"
    assert second["first_step"] == first["last_step"] > 0
    assert compare(trained, output) == []


def test_a_killed_worker_requeues_the_job_to_the_same_bits(
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


def test_a_network_cut_between_trainings_requeues_the_job_to_the_same_bits(
    cluster: Cluster, hosts: Hosts, trained: Path, output: Path
) -> None:
    job = begin(cluster, output)
    hosts.cut("n2")
    cut = time.monotonic()
    try:
        cluster.wait_for_log(job, "exit code 75, requeueing from step-0")
        assert time.monotonic() - cut < 60
    finally:
        hosts.mend("n2")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert LOST in cluster.log(job)
    assert compare(trained, output) == []


def test_in_apptainer_two_nodes_come_to_the_same_bits(
    cluster: Cluster, trained: Path, sif: Path, readable_data: Path
) -> None:
    image = {"CONTAINER_IMAGE": str(sif), "JOB_DATA_DIR": str(readable_data)}
    user = cluster.for_ordinary_user(**image, JOB_DEVICES="cpu:1")
    job = user.submit("--nodes=2", *TRAIN)
    assert user.wait(job) == "COMPLETED", user.log(job)
    assert "worker 1: follows worker 0 (n1:" in user.log(job)
    assert compare(trained, user.checkout / "output" / "slurm") == []


def worker_on(node: str, job: str) -> int:
    """Process id of a job's training on a node."""
    for process in processes(job):
        with contextlib.suppress(OSError):
            here = f"SLURMD_NODENAME={node}".encode() in environment(process)
            if here and b"\0train\0" in (process / "cmdline").read_bytes():
                return int(process.name)
    pytest.fail(f"no training of job {job} on {node}")


def submit(cluster: Cluster, does: str, *options: str, **env: str) -> str:
    return cluster.submit("--nodes=2", *options, "slurm/train.sh", JOB_STUB=does, **env)


@pytest.mark.parametrize(("options", "count"), [(("--nodes=3",), 3), (("--ntasks-per-node=2",), 2)])
def test_each_node_runs_one_task_the_first_beside_the_script(
    cluster: Cluster, base: dict[str, str], options: tuple[str, ...], count: int
) -> None:
    job = submit(cluster, TELL, *options, **base)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    each, nodes = f"1(x{count})", f"n[1-{count}]"
    assert sorted(TOLD.findall(cluster.log(job))) == [
        (str(n), str(count), each, nodes, str(n), "0", job, f"n{n + 1}") for n in range(count)
    ]
    assert cluster.fields(job)["BatchHost"] == "n1"
    assert f"attempt 0 on {nodes}: " in cluster.log(job)


def test_a_sites_file_may_have_each_node_prepared(
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
        job = submit(cluster, TELL, **base)
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    finally:
        site.unlink()
    assert {path.name for path in output.iterdir()} == {"n1", "n2"}


def test_nodes_give_a_step_gpus_of_their_own(cluster: Cluster, base: dict[str, str]) -> None:
    """Which the script of a job that runs on the first node cannot tell."""
    first = cluster.submit(
        *("--nodelist=n1", "slurm/train.sh"), **{**base, "JOB_STUB": "sleep 100"}
    )
    try:
        wait_until(lambda: cluster.state(first) == "RUNNING", 30)
        tell = 'echo "task $SLURM_PROCID: $SLURM_STEP_GPUS, $SLURM_JOB_GPUS of $SLURM_GPUS_ON_NODE"'
        job = submit(cluster, tell, "--gpus-per-node=2", **base)
        assert cluster.wait(job) == "COMPLETED"
        told = re.findall(r"^task .*", cluster.log(job), re.M)
        assert sorted(told) == ["task 0: 1,2, 1,2 of 2", "task 1: 0,1, 1,2 of 2"]
    finally:
        cluster.run("scancel", first)
        cluster.wait(first)


def test_a_node_that_cannot_start_ends_the_others_and_after_a_second_try_the_job(
    cluster: Cluster, base: dict[str, str]
) -> None:
    job = submit(cluster, f"test $SLURM_PROCID = 0 || exit 2; {STAY}", **base)
    assert cluster.wait(job, timeout=60) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "1", cluster.log(job)
    assert "two attempts in a row made no progress after the start" in cluster.log(job)


def test_tasks_of_an_array_share_nodes_as_jobs_of_their_own(
    cluster: Cluster, base: dict[str, str], output: Path
) -> None:
    together = "until test $(ls ../meeting-* | wc -l) = 4; do sleep 0.1; done"
    meet = f"cd $JOB_OUTPUT_DIR; touch ../meeting-$JOB_SEED-$SLURM_PROCID; {together}"
    array = submit(cluster, TELL + meet, "--array=5-6", **base)
    tasks = [f"{array}_{seed}" for seed in (5, 6)]
    assert cluster.wait(*tasks, timeout=60) == "COMPLETED"
    jobs = [{told[6] for told in TOLD.findall(cluster.log(task))} for task in tasks]
    assert [len(one) for one in jobs] == [1, 1]
    assert jobs[0] != jobs[1]
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"seed-5", "seed-6"}


def test_a_job_that_loses_a_node_goes_on_on_others(cluster: Cluster, base: dict[str, str]) -> None:
    job = submit(cluster, f"{TELL} test $SLURM_RESTART_COUNT = 0 || exit 0; {STAY}", **base)
    cluster.wait_for_log(job, "task 1 of 2 (1(x2) on n[1-2])")
    cluster.kill_node("n2")
    try:
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    finally:
        cluster.start_node("n2")
    assert cluster.fields(job)["Restarts"] == "1"
    assert "task 1 of 2 (1(x2) on n[1,3])" in cluster.log(job)
    wait_until(cluster.is_idle, 60)
