import json
from pathlib import Path

from tests.conftest import RunJob


def test_a_machine_without_gpus_passes_with_json_output(run_job: RunJob) -> None:
    result = run_job("doctor", "--log-format", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["findings"] == []
    assert report["gpus"]["expected"] == report["gpus"]["visible"]
    assert {"job", "python", "tensorflow", "keras"} <= report["versions"].keys()
    assert all(device["memory_gib"] > 0 for device in report["devices"])
    tests = [computation["what"] for computation in report["computations"]]
    assert len(tests) == len(report["devices"]) + 1
    assert tests[-1].startswith("all-reduce over")
    folders = {folder["option"]: folder for folder in report["folders"]}
    assert folders["--output-dir"]["problem"] is None
    assert folders["--output-dir"]["free_gib"] > 0


def test_a_missing_expected_gpu_causes_exit_code_3_with_the_reason(run_job: RunJob) -> None:
    result = run_job("doctor", "--log-format", "text", env={"SLURM_GPUS_ON_NODE": "64"})
    assert result.returncode == 3
    assert "expected 64 GPUs (SLURM_GPUS_ON_NODE=64)" in result.stdout
    assert "libcuda.so.1: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Problem ")
    assert "Traceback" not in result.stderr


def test_an_unusable_folder_is_a_finding(run_job: RunJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_job(
        "doctor",
        *("--log-format", "text", "--output-dir", "file"),
        env={"SLURM_GPUS_ON_NODE": "gpu:2"},
    )
    assert result.returncode == 3
    problems = [line for line in result.stdout.splitlines() if line.startswith("Problem ")]
    assert "SLURM_GPUS_ON_NODE received 'gpu:2'" in problems[0]
    assert "--output-dir file cannot be written: Not a directory" in problems[1]
