"""The job on this machine's real GPUs."""

import json
from pathlib import Path

import pytest
import tensorflow as tf

from tests.conftest import RunJob

pytestmark = pytest.mark.skipif(
    not tf.config.list_physical_devices("GPU"), reason="no GPU is visible to TensorFlow"
)


def test_doctor_finds_no_problem(run_job: RunJob) -> None:
    result = run_job("doctor", "--require-gpus", "1", "--log-format", "text")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("jit", ["on", "off"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trains_on_every_gpu(run_job: RunJob, tmp_path: Path, precision: str, jit: str) -> None:
    gpus = len(tf.config.list_physical_devices("GPU"))
    result = run_job(
        *("train", "--dataset", "synthetic", "--epochs", "2", "--limit", "10240"),
        *("--batch-size", str(64 * gpus), "--learning-rate", "1e-3"),
        *("--precision", precision, "--jit", jit, "--require-gpus", str(gpus)),
    )
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "output" / "run.json").read_text())
    assert (manifest["replicas"], manifest["xla"]) == (gpus, jit == "on")
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[1] < losses[0] < 2.3


def test_a_second_run_reuses_the_compiled_code_of_the_first(
    run_job: RunJob, tmp_path: Path
) -> None:
    for output, has_code in (("first", False), ("second", True)):
        result = run_job(
            *("train", "--dataset", "synthetic", "--epochs", "1", "--limit", "2560"),
            *("--devices", "gpu:1", "--compile-cache", "code", "--output-dir", output),
        )
        assert result.returncode == 0, result.stderr
        assert ("reusing the compiled code" in result.stdout) == has_code
    (entry,) = (tmp_path / "code").iterdir()
    assert entry.stat().st_size > 10_000
