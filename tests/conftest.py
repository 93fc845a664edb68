"""Fixtures shared by all tests.

TensorFlow's devices can be set up only once per process. So the tests in this process share four
CPU devices, and tests of code that sets up devices run it in a separate process.
"""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.commands.cli import load_tensorflow

load_tensorflow()

import keras
import numpy as np
import tensorflow as tf

from job.cluster import Device
from job.cluster.devices import Compilation, Devices
from job.cluster.scheduler import ALONE, ClusterSpec
from job.cluster.workers import Workers
from job.data import Dataset, cifar10, synthetic
from job.recipes import classic
from job.run.folder import EVALUATION, MODEL, OutputDir, sha256_of
from job.run.record import ClassRecord, EvaluationRecord, encode
from job.training.saved_model import save_model
from tests.run_folders import climb, make_sweep_run, make_whole_run

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("JOB_TEST_DATA", REPOSITORY / "data"))
# Recreates the data set from a smaller form, if one is next to the checkout.
UNPACK = REPOSITORY.parent / "shared" / "data" / "unpack_cifar10.py"

# GPUs are reserved for the processes that the tests start.
tf.config.set_visible_devices([], "GPU")
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

CLASS_NAMES = tuple(f"kind {label}" for label in range(10))

MakeDevices = Callable[..., Devices]
RunJob = Callable[..., subprocess.CompletedProcess[str]]
StartJob = Callable[..., "Job"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark integration tests as slow: only `make test-all` runs them."""
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped integration test into a failure in CI, where all it needs is installed."""
    report = yield
    if os.environ.get("CI") and report.skipped and "integration" in item.path.parts:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@functools.cache
def strategy_over(replicas: int) -> tf.distribute.Strategy:
    """Return the only strategy over this number of CPU devices in this process.

    A run has a single strategy. Several strategies in one process give the same numbers to their
    collectives and so disturb one another, unless each starts from its own number.
    """
    kind = type(
        f"Mirrored{replicas}",
        (tf.distribute.MirroredStrategy,),
        {"_collective_key_base": 1_000 * replicas},
    )
    return kind([f"CPU:{index}" for index in range(replicas)])


@pytest.fixture(scope="session")
def make_devices() -> MakeDevices:
    """Make `Devices` over the first replicas of this process's CPU devices."""

    def make(
        replicas: int = 1, precision: str = "float32", compilation: Compilation | None = None
    ) -> Devices:
        names = tuple(f"CPU:{index}" for index in range(replicas))
        return Devices(
            strategy=strategy_over(replicas),
            kind="cpu",
            descriptions=tuple(map(Device, names)),
            computes_bfloat16=False,
            local_names=names,
            workers=Workers(ALONE),
            precision="bfloat16" if precision == "bfloat16" else "float32",
            jit="auto",
            compilation=compilation or Compilation(network=False, elementwise=True),
            deterministic=False,
            threads=2,
        )

    return make


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """512 training and 300 test images of the synthetic data set."""
    train_images, train_labels = synthetic.draw(512, seed=7, stream=0)
    test_images, test_labels = synthetic.draw(300, seed=7, stream=1)
    return Dataset(
        "synthetic", synthetic.CLASS_NAMES, train_images, train_labels, test_images, test_labels
    )


@pytest.fixture
def model() -> keras.Model:
    """The network of `classic`, untrained."""
    model = classic.build_model(1, 10)
    classic.RECIPE.compile(model, 1e-4, 1)
    return model


@pytest.fixture
def model_output(tmp_path: Path, model: keras.Model) -> OutputDir:
    """A folder with a model file and its evaluation."""
    folder = tmp_path / "output"
    folder.mkdir()
    output = OutputDir(folder)
    save_model(model, output, MODEL)
    digest = sha256_of(folder / MODEL)
    evaluation = EvaluationRecord(
        loss=1.0,
        accuracy=1.0,
        examples=10,
        classes=dict.fromkeys(CLASS_NAMES, ClassRecord(1.0, 1.0, 1)),
        confusion_matrix=np.eye(10, dtype=int).tolist(),
        model=MODEL,
        model_sha256=digest,
    )
    output.write_bytes(EVALUATION, encode(evaluation))
    return output


def free_ports(count: int) -> list[int]:
    """Find unused ports on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that accepts connections on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


@pytest.fixture
def three_workers(listener: socket.socket) -> ClusterSpec:
    """Three workers: the first is this one, the second answers, the third does not."""
    own, missing = free_ports(2)
    ports = (own, listener.getsockname()[1], missing)
    return ClusterSpec(tuple(f"127.0.0.1:{port}" for port in ports), 0)


class Job(subprocess.Popen[str]):
    """The command line in a separate process, without JOB_, SLURM_ and KUBERNETES_ variables.

    Args:
        folder: Working directory.
        arguments: Arguments of the command line.
        env: Additional environment variables.
        module: The module to run instead of the job.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        module: str = "job",
    ) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JOB_", "SLURM_", "KUBERNETES_"))
        }
        super().__init__(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=folder,
            env={**inherited, "PYTHONPATH": str(REPOSITORY), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, event: str) -> dict[str, Any]:
        """Read the JSON log up to an event."""
        assert self.stdout is not None
        for line in self.stdout:
            fields: dict[str, Any] = json.loads(line)
            if fields["event"] == event:
                return fields
        pytest.fail(f"the job ended without {event!r}: {self.communicate()[1]}")

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the process; kill it at the timeout."""
        try:
            output, errors = self.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return subprocess.CompletedProcess(self.args, self.returncode, output, errors)

    def end(self) -> None:
        """Kill the process and wait for it: otherwise a later test reports it as unawaited."""
        self.kill()
        self.communicate()


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[StartJob]:
    """Start the command line in a separate process and folder."""
    started = []

    def start(*arguments: str | Path, env: dict[str, str] | None = None) -> Job:
        started.append(Job(tmp_path, *arguments, env=env))
        return started[-1]

    yield start
    for job in started:
        job.end()


@pytest.fixture
def run_job(start_job: StartJob) -> RunJob:
    """Run the command line in a separate process and folder until it ends."""

    def run(
        *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return start_job(*arguments, env=env).finish(timeout)

    return run


@pytest.fixture
def whole(tmp_path: Path) -> OutputDir:
    """A finished run with all its files, interrupted twice before; tests can change it."""
    return make_whole_run(tmp_path / "run")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of one setting, two of another, and an unfinished run of a third."""
    for seed, saved in ((42, 0.61), (7, 0.66), (10, 0.64)):
        make_sweep_run(tmp_path / f"seed-{seed}", climb(saved + 0.01), saved, seed=seed)
    for seed, saved in ((1, 0.5), (2, 0.5)):
        make_sweep_run(
            tmp_path / f"fast-{seed}", climb(saved), saved, learning_rate=1e-3, seed=seed
        )
    make_sweep_run(tmp_path / "stopped", climb(0.4)[:3], outcome="stopped", learning_rate=1e-2)
    return tmp_path


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the real CIFAR-10 for the tests, in its official layout."""
    folder = tmp_path_factory.mktemp("cifar10")
    found = cifar10.locate(DATA)
    if found.is_dir():
        shutil.copytree(found, folder / cifar10.FOLDER_NAME)
    elif found.is_file():
        with tarfile.open(found) as tar:
            tar.extractall(folder, filter="data")
    elif "JOB_TEST_DATA" in os.environ:
        pytest.fail(f"JOB_TEST_DATA received {DATA}, expected a folder with CIFAR-10; correct it")
    elif UNPACK.is_file():
        subprocess.run([sys.executable, UNPACK, folder], check=True)
    else:
        pytest.skip(f"no CIFAR-10 in {DATA}; set JOB_TEST_DATA to a folder with it")
    return folder
