"""The command line as a user runs it: real data, separate processes, real file systems."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from job.run.folder import MODEL, OutputDir
from tests.conftest import Job, RunJob
from tests.integration.conftest import MakeVolume

SMALL = ("--epochs", "2", "--limit", "2560")

# How a user without this package uses the artifacts: with stock Keras only.
STOCK_KERAS = """
import json, pickle, sys
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    batch = pickle.load(file, encoding="latin1")
images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / 255.0
labels = keras.utils.to_categorical(batch["labels"], 10)
loss, accuracy = model.evaluate(images, labels, verbose=0)
last = model.layers[-1]
print(json.dumps({
    "loss": loss, "accuracy": accuracy, "activation": last.activation.__name__,
    "policies": sorted({layer.dtype_policy.name for layer in model.layers}),
    "optimizer": model.optimizer.name, "compiled_loss": model.loss.__name__,
    "sums": model.predict(images[:100], verbose=0).sum(axis=1).tolist(),
}))
"""


# The same with the oldest Keras that can load the model; the expected outputs come from the newest.
OLD_KERAS = """
import sys
import keras, numpy as np
assert keras.__version__ == "3.3.3"
images, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
received = keras.models.load_model(sys.argv[1]).predict(images, verbose=0)
np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)
"""


def test_the_model_file_loads_in_an_older_keras(
    model_output: OutputDir, model: keras.Model, tmp_path: Path
) -> None:
    lock, packages = Path(__file__).with_name("old-keras.txt"), tmp_path / "packages"
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(packages)]
    pip = [sys.executable, "-m", "pip", "install", *options, "--requirement", str(lock)]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"cannot install an older Keras: {installed.stderr}")
    images = np.random.default_rng(1).random((4, 32, 32, 3), np.float32)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "expected.npy", model.predict(images, verbose=0))
    subprocess.run(
        [
            *(sys.executable, "-c", OLD_KERAS, model_output.path / MODEL),
            *(tmp_path / "images.npy", tmp_path / "expected.npy"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cifar10_dir: Path) -> Path:
    """The output folder of a bfloat16 run on two replicas."""
    folder, temporary = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "job", "train", *SMALL, "--devices", "cpu:2"]
    # On a busy machine two epochs can take longer than the default checkpoint interval.
    options = f"--precision bfloat16 --checkpoint-every 3600 --data-dir {cifar10_dir}".split()
    options += ["--output-dir", str(folder)]
    environ = {**os.environ, "TMPDIR": str(temporary), "HOME": str(temporary)}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stderr
    # The temporary folder must stay empty: it is shared on a node, and in memory in the image.
    assert list(temporary.iterdir()) == []
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


def test_stdout_is_json_lines_and_stderr_is_empty(trained: Path) -> None:
    events = [json.loads(line) for line in (trained / "stdout").read_text().splitlines()]
    names = [event["event"] for event in events]
    epochs = ["checkpoint", "epoch", "epoch", "checkpoint"]
    assert names == ["start", *epochs, "evaluation", "report"]
    assert (trained / "stderr").read_text() == ""


def test_stock_keras_reproduces_the_evaluation_from_the_model_file(
    trained: Path, cifar10_dir: Path, tmp_path: Path
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", STOCK_KERAS),
            *(trained / "cifar10_model.h5", cifar10_dir / "cifar-10-batches-py" / "test_batch"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    stock = json.loads(result.stdout.splitlines()[-1])
    evaluation = read(trained / "evaluation.json")
    assert stock["loss"] == pytest.approx(evaluation["loss"], abs=1e-5)
    assert stock["accuracy"] == pytest.approx(evaluation["accuracy"], abs=1e-6)
    assert stock["sums"] == pytest.approx([1.0] * 100, abs=1e-5)
    assert stock["activation"] == "softmax"
    assert stock["policies"] == ["float32"]
    assert (stock["optimizer"], stock["compiled_loss"]) == ("adam", "categorical_crossentropy")


def test_evaluation_json_is_complete(trained: Path) -> None:
    evaluation = read(trained / "evaluation.json")
    assert evaluation["examples"] == 10_000
    assert [c["support"] for c in evaluation["classes"].values()] == [1_000] * 10
    assert next(iter(evaluation["classes"])) == "airplane"
    digest = hashlib.sha256((trained / "cifar10_model.h5").read_bytes()).hexdigest()
    assert evaluation["model_sha256"] == digest


def test_evaluate_reproduces_the_evaluation(
    run_job: RunJob, trained: Path, cifar10_dir: Path
) -> None:
    before = read(trained / "evaluation.json")
    result = run_job(
        "evaluate", "--output-dir", trained, "--data-dir", cifar10_dir, "--devices", "cpu:2"
    )
    assert result.returncode == 0, result.stderr
    after = read(trained / "evaluation.json")
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert after["confusion_matrix"] == before["confusion_matrix"]


def test_the_log_format_does_not_change_the_model(
    run_job: RunJob, cifar10_dir: Path, tmp_path: Path
) -> None:
    results = []
    for name, log_format in (("one", "json"), ("two", "text")):
        options = ("--data-dir", cifar10_dir, "--output-dir", tmp_path / name)
        result = run_job(
            "train",
            "--epochs",
            "1",
            "--limit",
            "2560",
            *options,
            env={"JOB_LOG_FORMAT": log_format},
        )
        assert result.returncode == 0, result.stderr
        results.append(read(tmp_path / name / "evaluation.json")["confusion_matrix"])
        line = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        results.append(json.loads(line)["loss"])
    assert results[:2] == results[2:]


def test_an_archive_trains_like_the_folder(
    run_job: RunJob, cifar10_dir: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with tarfile.open(data_dir / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(cifar10_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    result = run_job("train", "--epochs", "1", "--limit", "512", "--devices", "cpu:4")
    assert result.returncode == 0, result.stderr
    manifest = read(tmp_path / "output" / "run.json")
    assert (manifest["replicas"], manifest["data"]["train_examples"]) == (4, 512)


BAD_RUNS = [
    (["--dataset", "synthetic", "--devices", "gpu:99"], 2, "received gpu:99, expected at most"),
    (["--dataset", "synthetic", "--devices", "cpu:3"], 2, "expected a multiple of 3, the number"),
    (["--dataset", "synthetic", "--require-gpus", "99"], 3, "--require-gpus expected 99 GPUs"),
    (["--dataset", "synthetic", "--limit", "100"], 2, "--batch-size received 256, expected at"),
    (["--dataset", "synthetic", "--limit", "50001"], 2, "expected at most the 50000 training"),
    (["--cifar10-url", "file:///x"], 2, "expected an address that begins with https:// or"),
    (["--output-dir", "file"], 2, "is a file, expected a folder"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "message"), BAD_RUNS)
def test_a_run_that_cannot_start_prints_a_one_line_error_and_overwrites_nothing(
    run_job: RunJob, tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "prediction.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    result = run_job("train", "--log-format", "text", *arguments)
    assert result.returncode == exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith("cifar10-job: error: ")
    assert message in line
    names = sorted(path.name for path in output.glob("[!.]*"))
    assert names in (["prediction.png"], ["prediction.png", "run.json"])
    assert (output / "prediction.png").read_text() == (tmp_path / "file").read_text() == "mine"


def test_the_cpu_never_replaces_a_missing_gpu(run_job: RunJob) -> None:
    expected = {"SLURM_GPUS_ON_NODE": "99"}
    result = run_job("train", "--dataset", "synthetic", env=expected)
    assert result.returncode == 3
    assert "expected 99 GPUs (SLURM_GPUS_ON_NODE=99)" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["exit_code"] == 3
    requested = ("--devices", "cpu:1", "--limit", "512", "--epochs", "1")
    assert run_job("train", "--dataset", "synthetic", *requested, env=expected).returncode == 0


def test_a_full_volume_is_rejected_before_training(run_job: RunJob, small_volume: Path) -> None:
    result = run_job("train", "--dataset", "synthetic", "--output-dir", small_volume)
    assert result.returncode == 2
    assert "has 1 MiB free, expected at least 64 MiB" in result.stderr
    (small_volume / "filler").write_bytes(b"\0" * (2**20 - 4096))
    result = run_job("train", "--dataset", "synthetic", "--output-dir", small_volume / "new")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_of_another_user_is_rejected(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("becoming another user needs root")
    script = (
        "import os, pathlib, sys\n"
        "from job.config import UserError\n"
        "from job.run.folder import prepare_output_dir\n"
        "os.setuid(65534)\n"
        "try: prepare_output_dir(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "open").mkdir(mode=0o755)
    for path in (tmp_path / "closed" / "output", tmp_path / "open"):
        result = subprocess.run(
            [sys.executable, "-c", script, path],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Permission denied; give user 65534 access" in result.stdout


def test_a_read_only_volume_is_rejected(run_job: RunJob, small_volume: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_volume], check=True)
    result = run_job("train", "--dataset", "synthetic", "--output-dir", small_volume)
    assert result.returncode == 2
    assert f"cannot write to --output-dir {small_volume}: Read-only file system" in result.stderr


@pytest.mark.parametrize("kibibytes", [1024, 1684, 5032])
def test_an_artifact_that_does_not_fit_does_not_replace_the_earlier_one(
    make_volume: MakeVolume, kibibytes: int
) -> None:
    volume = make_volume(kibibytes)
    script = (
        "import sys, pathlib\n"
        "from job.commands.cli import load_tensorflow; load_tensorflow()\n"
        "from job.recipes import classic\n"
        "from job.run.folder import OutputDir\n"
        "from job.training.saved_model import save_model\n"
        "model = classic.build_model(1, 10); classic.RECIPE.compile(model, 1e-4, 1)\n"
        "save_model(model, OutputDir(pathlib.Path(sys.argv[1])), 'model.h5')\n"
    )
    path = volume / "model.h5"
    path.write_text("earlier")
    result = subprocess.run(
        [sys.executable, "-c", script, volume],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert f"UserError: cannot write {path}: " in result.stderr
    assert path.read_text() == "earlier"
    assert result.returncode == 1  # an uncaught exception, not a crash
    assert [entry.name for entry in volume.iterdir()] == ["model.h5"]


def test_a_hanging_call_is_ended_logged_with_stacks_and_recorded(
    cifar10_dir: Path, tmp_path: Path
) -> None:
    result = Job(
        *(tmp_path, "train", *SMALL, "--data-dir", cifar10_dir, "--stall-timeout", "6"),
        env={"HANG": "RunManifest.finish 1", "COMPILATION_SECONDS": "60"},
        module="tests.integration.hanging",
    ).finish(180)
    assert result.returncode == 1
    stalled, error = (json.loads(line) for line in result.stdout.splitlines()[-2:])
    assert (stalled["event"], error["event"], error["exit_code"]) == ("stalled", "error", 1)
    assert stalled["what"] == "a pause between two calls"
    assert "hanging.py" in stalled["stacks"]
    (line,) = result.stderr.splitlines()
    assert line == f"cifar10-job: error: {error['message']}"
    manifest = read(tmp_path / "output" / "run.json")
    assert manifest["outcome"] == manifest["attempts"][0]["outcome"] == "failed"
    assert error["message"].startswith(f"{manifest['error']}; run the same command again")
