"""The image as clusters run it: any user, only the volumes writable, no network."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job import __version__
from job.run.manifest import versions
from tests.conftest import REPOSITORY
from tests.integration.containers import REVISION, build_image, podman, shell

LOCKED_DOWN = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges", "--network", "none", "--shm-size", "64m"),
)
ON_CPU = ("--env", "JOB_REQUIRE_GPUS=0")
SMALL = ("train", "--limit", "768", "--checkpoint-every", "0.01", "--epochs")
ARTIFACTS = [
    *(".lease", "checkpoints", "cifar10_model.h5", "evaluation.json"),
    *("metrics.jsonl", "prediction.png", "predictions.npz", "report", "report.html", "run.json"),
]

MakeFolder = Callable[[int], Path]


@pytest.fixture(scope="module")
def data(cifar10_dir: Path) -> Path:
    """The real data set, readable by every user."""
    cifar10_dir.chmod(0o755)
    return cifar10_dir


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Create an output folder that only this user ID can access."""

    def make(user: int) -> Path:
        folder = tmp_path / f"output-{user}"
        folder.mkdir(mode=0o700)
        subprocess.run(["chown", f"{user}:{user}", folder], check=True)
        return folder

    return make


@pytest.fixture
def container() -> Iterator[str]:
    """The name of a container that is removed after the test."""
    name = "cifar10-job-test"
    podman("rm", "--force", name)
    yield name
    podman("rm", "--force", name)


def volumes(output: Path, data: Path) -> tuple[str, ...]:
    return ("--volume", f"{output}:/output", "--volume", f"{data}:/data:ro")


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def without_times(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "images_per_second", "elapsed_seconds")
    return [
        {key: value for key, value in json.loads(line).items() if key not in times}
        for line in lines
    ]


def test_configuration(image: str) -> None:
    (document,) = json.loads(podman("image", "inspect", image).stdout)
    config = document["Config"]
    assert config["Entrypoint"] == ["python", "-m", "job"]
    assert config["Cmd"] == ["train"]
    assert config["User"] == "10001:0"
    assert "JOB_REQUIRE_GPUS=1" in config["Env"]
    # An anonymous volume is also lost, and would hide that nothing is mounted.
    assert "Volumes" not in config
    labels = {name.rpartition(".")[2]: text for name, text in config["Labels"].items()}
    assert (labels["version"], labels["revision"]) == (__version__, REVISION)


def test_the_image_contains_no_compiler_cache_or_test(image: str) -> None:
    script = (
        "ls /app; find / -xdev -type f \\( -name gcc -o -name clang -o -name nvcc -o -name cicc "
        "-o -name libnvvm.so -o -path '*/.cache/*' -o -path '/app/*test*' \\)"
    )
    found = podman("run", "--rm", "--user", "0", "--entrypoint", "sh", image, "-c", script)
    assert found.stdout.split() == ["docker", "job", "locks", "nvidia"]


@pytest.mark.parametrize("user", [0, 42_424])
def test_trains_as_any_user_with_only_the_volume_writable(
    image: str, make_folder: MakeFolder, data: Path, user: int
) -> None:
    folder = make_folder(user)
    as_user = ("--user", f"{user}:{user}")
    result = podman(
        *("run", "--rm", *LOCKED_DOWN, *ON_CPU, *as_user, *volumes(folder, data), image),
        *(*SMALL, "1"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    names = [event["event"] for event in events(result.stdout)]
    reported = [name for name in names if name != "checkpoint"]
    assert reported == ["start", "epoch", "evaluation", "report"]
    assert sorted(path.name for path in folder.iterdir()) == ARTIFACTS
    owners = {path.stat().st_uid for path in folder.rglob("*")}
    assert owners == {user}
    run = json.loads((folder / "run.json").read_text())
    assert run["git_commit"] == REVISION
    # TensorFlow comes from the base, and so does Python, whose version can differ from the tests'.
    assert run["versions"] | {"python": ""} == versions() | {"python": ""}


def test_a_stopped_container_resumes_and_ends_with_the_same_bits(
    image: str, container: str, make_folder: MakeFolder, data: Path
) -> None:
    whole, interrupted = make_folder(10001), make_folder(10002)
    subprocess.run(["chown", "-R", "10001:0", interrupted], check=True)
    run = (*LOCKED_DOWN, *ON_CPU)
    result = podman("run", "--rm", *run, *volumes(whole, data), image, *SMALL, "3")
    assert result.returncode == 0, result.stderr

    started = ("run", "--detach", "--name", container, *run, *volumes(interrupted, data))
    podman(*started, image, *SMALL, "3").check_returncode()
    with subprocess.Popen(
        ["podman", "logs", "--follow", container], stdout=subprocess.PIPE, text=True
    ) as logs:
        assert logs.stdout
        assert any('"checkpoint"' in line for line in logs.stdout)
        podman("stop", "--time", "30", container).check_returncode()
    assert podman("wait", container).stdout.strip() == "75"
    # Restart the same container, as a daemon with a restart policy does.
    again = podman("start", "--attach", container)
    assert again.returncode == 0, again.stderr

    model = "cifar10_model.h5"
    assert (interrupted / model).read_bytes() == (whole / model).read_bytes()
    assert without_times(interrupted) == without_times(whole)
    outcomes = [
        attempt["outcome"]
        for attempt in json.loads((interrupted / "run.json").read_text())["attempts"]
    ]
    assert outcomes == ["stopped", "done"]


def test_an_unwritable_volume_is_an_error_with_advice(
    image: str, make_folder: MakeFolder, data: Path
) -> None:
    folder = make_folder(4242)
    result = podman("run", "--rm", *LOCKED_DOWN, *ON_CPU, *volumes(folder, data), image)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert re.search(r"cannot write to --output-dir /output.* user 10001 .*--user.*fsGroup", line)
    assert list(folder.iterdir()) == []


def test_a_missing_gpu_is_exit_code_3_and_a_missing_mount_a_warning(image: str) -> None:
    result = podman("run", "--rm", "--network", "none", image)
    assert result.returncode == 3
    warning, error = events(result.stdout)
    assert (warning["level"], warning["event"]) == ("warning", "not_mounted")
    assert "lost with the container" in warning["message"]
    assert (error["event"], error["exit_code"]) == ("error", 3)
    (line,) = result.stderr.splitlines()
    assert re.search(
        r"expected 1 GPU, TensorFlow detects 0 \(cannot find libcuda\.so\.1: .*--gpus", line
    )

    doctor = podman("run", "--rm", "--network", "none", image, "doctor")
    assert doctor.returncode == 3
    (finding,) = json.loads(doctor.stdout)["findings"]
    assert finding == error["message"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the image is built from."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("docker", "job", "locks", ".dockerignore"):
        subprocess.run(["cp", "-r", REPOSITORY / name, folder], check=True)
    return folder


def test_the_build_fails_without_a_library_that_tensorflow_needs(
    image: str, checkout: Path
) -> None:
    source = checkout / "job" / "cluster" / "gpus.py"
    source.write_text(source.read_text().replace('"libnccl.so.2"', '"libnccl.so.99"'))
    build = build_image(f"{image}-broken", checkout)
    assert build.returncode != 0
    assert "would not find libnccl.so.99, expected" in build.stdout + build.stderr


def test_a_source_change_keeps_the_layer_of_the_packages(image: str, checkout: Path) -> None:
    with (checkout / "job" / "training" / "train.py").open("a") as file:
        file.write("\n# changed\n")
    changed = f"{image}-changed"
    assert build_image(changed, checkout).returncode == 0
    documents = [json.loads(podman("image", "inspect", tag).stdout)[0] for tag in (image, changed)]
    podman("rmi", changed)
    before, after = (document["RootFS"]["Layers"] for document in documents)
    kept = sum(one == other for one, other in zip(before, after, strict=True))
    steps = [step for step in documents[0]["History"] if not step.get("empty_layer")]
    assert "/app/job" in steps[kept]["created_by"]
    assert any("pip install" in step["created_by"] for step in steps[:kept])


# Simulates an ordinary user with a Docker daemon, on a machine with podman and without GPUs.
ORDINARY_USER = """
id() { echo 42424; }
mkdir() { setpriv --reuid 42424 --regid 42424 --clear-groups mkdir "$@"; }
docker() {
  local arguments=()
  for word; do [[ $word == --gpus || $word == all ]] || arguments+=("$word"); done
  podman "$1" --env JOB_REQUIRE_GPUS=0 --env JOB_DATASET=synthetic --env JOB_EPOCHS=1 \
    --env JOB_LIMIT=256 "${arguments[@]:1}"
}
set -e
"""


def docker_blocks(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    return [block for block in blocks if "docker run" in block]


def test_the_documented_commands_leave_files_that_belong_to_the_user(
    image: str, make_folder: MakeFolder
) -> None:
    first, others = docker_blocks("docs/container.md")
    assert docker_blocks("README.md") == [first]
    script = ORDINARY_USER + first + others
    published = f" cifar10-job:{__version__}"
    assert script.count(published) == 3
    folder = make_folder(42_424)
    result = shell(script.replace(published, f" {image}"), folder)
    assert result.returncode == 0, result.stderr
    assert "convolution on CPU:0" in result.stdout
    assert sorted(path.name for path in (folder / "output").iterdir()) == sorted(
        [*ARTIFACTS, "cpu"]
    )
    assert sorted(path.name for path in (folder / "output/cpu").iterdir()) == ARTIFACTS
    assert {path.stat().st_uid for path in folder.rglob("*")} == {42_424}


def test_make_runs_the_readme_command() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    make = subprocess.run(
        # Without the check for Docker before and the note about exit code 75 after.
        [*("make", "--dry-run", "--no-print-directory", "docker-run"), "NEEDS_DOCKER=", "EXPLAIN="],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert make.stdout.rstrip() in readme
