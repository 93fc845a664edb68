"""What slurm/train.sh rejects, and its command line for pyxis, with stubs for Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

RECORD = "JobId=41 JobState=RUNNING BatchFlag={batch} Restarts=0 ReqNodeList=(null) {more}"


class Node:
    """A node whose scontrol prints one record and whose srun records its arguments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stub("srun", f'printf "%s\\n" "$@" > {folder}/received; env > {folder}/environment')
        self.set_job()

    def set_job(self, batch: int = 1, more: str = "") -> None:
        self.stub("scontrol", f'echo "{RECORD.format(batch=batch, more=more)}"')

    def stub(self, name: str, script: str) -> None:
        path = self._folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n7"}
        path = f"{self._folder}:{os.environ['PATH']}"
        return subprocess.run(
            [REPOSITORY / "slurm" / "train.sh", *arguments],
            cwd=self._folder,
            env={"PATH": path, **job, **env},
            capture_output=True,
            text=True,
        )

    def received(self) -> list[str]:
        path = self._folder / "received"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self) -> dict[str, str]:
        lines = (self._folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "a.sqsh").touch()
    return Node(tmp_path)


@pytest.mark.parametrize(
    ("env", "arguments", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "", "not run by sbatch; submit it with: sbatch slurm/train.sh"),
        ({}, "", "after make install LOCK=gpu, or set CONTAINER_IMAGE"),
        ({"CONTAINER_IMAGE": "b.sif"}, "", "b.sif, which does not exist on"),
        ({"CONTAINER_IMAGE": "team/job:1"}, "", "expected apptainer or pyxis"),
        ({"CONTAINER_IMAGE": "job:1", "CONTAINER_RUNTIME": "none"}, "", "expected apptainer or"),
        ({"CONTAINER_IMAGE": "a.sqsh"}, "--output-dir x", "set JOB_OUTPUT_DIR or JOB_DATA_DIR"),
        (
            {"CONTAINER_IMAGE": "a.sqsh", "JOB_OUTPUT_DIR": "/dev/null/x"},
            "",
            "cannot create /dev/null/x or ",
        ),
    ],
)
def test_invalid_settings_are_rejected_before_srun_starts(
    node: Node, env: dict[str, str], arguments: str, message: str
) -> None:
    result = node.run(*arguments.split(), **env)
    assert (result.returncode, node.received()) == (2, [])
    assert message in result.stderr


def test_starting_the_script_with_salloc_or_srun_is_rejected(node: Node) -> None:
    node.set_job(batch=0)
    result = node.run()
    assert (result.returncode, node.received()) == (2, [])
    assert "run by salloc or srun; submit it with: sbatch slurm/train.sh" in result.stderr


def test_no_answer_from_slurm_is_not_a_user_error(node: Node) -> None:
    node.stub("scontrol", "exit 1")
    node.stub("sleep", "")
    result = node.run(CONTAINER_IMAGE="a.sqsh")
    assert (result.returncode, node.received()) == (75, [])
    assert "Slurm has not answered" in result.stderr


def test_shell_options_and_arguments_set_by_site_sh_have_no_effect(
    node: Node, tmp_path: Path
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text("set -euo pipefail\nset -- --epochs 9 $#\n")
    result = node.run("--epochs", "3", CONTAINER_IMAGE="a.sqsh")
    assert result.returncode == 0, result.stderr
    assert node.received()[-5:] == ["-m", "job", "train", "--epochs", "3"]


def test_the_step_of_a_checkpoint_is_read_from_its_file_name_only(
    node: Node, tmp_path: Path
) -> None:
    output = tmp_path / "step-2" / "run"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "000001-step-00000015-0.npz").touch()
    node.stub("srun", "exit 1")
    result = node.run(CONTAINER_IMAGE="a.sqsh", JOB_OUTPUT_DIR=str(output))
    assert result.returncode == 1
    assert "requeueing from step-00000015; Slurm reports" in result.stderr


def test_a_requeue_that_slurm_refuses_is_reported(node: Node) -> None:
    node.stub("srun", "exit 75")
    node.stub("scontrol", f'test "$1" != requeue && echo "{RECORD.format(batch=1, more="")}"')
    result = node.run(CONTAINER_IMAGE="a.sqsh")
    assert result.returncode == 75
    assert result.stderr.splitlines()[-1].endswith(
        "exit code 75, not requeued because of Slurm's error above; submit it again to resume"
    )


def test_a_seed_in_an_array_is_rejected(node: Node) -> None:
    assert node.run("--seed", "7", CONTAINER_IMAGE="a.sqsh").returncode == 0
    node.set_job(more="ArrayJobId=40 ArrayTaskId=3 ")
    result = node.run("--seed", "7", CONTAINER_IMAGE="a.sqsh")
    assert result.returncode == 2
    assert "received --seed in an array; remove it" in result.stderr


def test_pyxis_gets_image_mounts_and_variables(node: Node, tmp_path: Path) -> None:
    result = node.run(
        *("--epochs", "3"),
        **{"CONTAINER_IMAGE": "a.sqsh", "JOB_SEED": "7", "NCCL_DEBUG": "INFO", "HTTPS_PROXY": "p"},
        **{"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
        **{"LD_LIBRARY_PATH": "/opt/modules/lib", "SECRET": "x"},
    )
    assert result.returncode == 0, result.stderr
    received = node.received()
    (variables,) = (word for word in received if word.startswith("--container-env="))
    assert received == [
        *("--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--distribution=block"),
        *("--cpus-per-task=4", "--gpus=2", "--kill-on-bad-exit=1", "--export=ALL"),
        f"--container-image={tmp_path}/a.sqsh",
        f"--container-mounts={tmp_path}/output/slurm:/output,{tmp_path}/data:/data",
        *("--container-workdir=/app", "--no-container-mount-home", "--no-container-remap-root"),
        *("--no-container-entrypoint", variables),
        *("python", "-m", "job", "train", "--epochs", "3"),
    ]
    assert set(variables.removeprefix("--container-env=").split(",")) == {
        *("JOB_SEED", "JOB_OUTPUT_DIR", "JOB_DATA_DIR", "JOB_LOG_FORMAT", "JOB_REQUIRE_GPUS"),
        *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK"),
        *("SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG"),
        "HTTPS_PROXY",
    }
    environment = node.environment()
    assert environment["JOB_OUTPUT_DIR"] == "/output"
    assert "LD_LIBRARY_PATH" not in environment
