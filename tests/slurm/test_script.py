"""What slurm/train.sh tells the container runtimes and Slurm, told to stand-ins for both."""

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from job import __version__
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "slurm" / "train.sh"
COMMANDS = "bash cat date env grep hostname id mkdir mv realpath rm sed sort tr"

# Each writes its words to a file of its name, a line a word, and the environment beside it.
STAND_IN = """#!/bin/bash
test "$*" != --help || {{ echo "{help}"; exit; }}
printf '%s\\n' "$@" > {folder}/{name}.told
env > {folder}/{name}.env
exit {code}
"""
SCONTROL = """#!/bin/bash
echo "$*" >> {folder}/scontrol.told
case $* in
  *"show job {silent}"*) exit 1 ;;
  *"show job"*)
    printf '%s' "{others}"
    echo "JobId={job} JobName=cifar10 JobState={state} Restarts={restarts} {more}" \
    "{preempted} ReqNodeList={required} ExcNodeList={excluded} NodeList=n7" ;;
  *"show hostnames"*) tr , '\\n' <<< "$3" ;;
  *"{failing}"*) exit 1 ;;
esac
{then}
"""


# A step that ends with its code when it gets SIGUSR1, and sends its signals to the script before.
SIGNALLED_SRUN = """#!/bin/bash
test "$*" != --help || exit
trap 'told=yes' USR1 # and not before the last signal is sent
for name in {signals}; do kill -s $name $PPID; done
for _ in {{1..100}}; do
  test -z "$told" || exit {code}
  {sleep} 0.1
done
"""

# Runs a command for each task, one after the other, as on so many nodes with different GPUs.
TASKS = """#!/bin/bash
test "$*" != --help || exit
printf '%s\\n' "$@" > {folder}/srun.told
count=0
while [[ $1 == --* ]]; do
  [[ $1 != --ntasks=* ]] || count=${{1#*=}}
  shift
done
export SLURM_STEP_NUM_TASKS=$count SLURM_STEP_NODELIST=n[7-8] SLURM_STEP_TASKS_PER_NODE="1(x$count)"
gpus=({gpus})
for ((rank = 0; rank < count; rank++)); do
  export SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 SLURM_STEP_GPUS=${{gpus[rank]}}
  "$@" || exit
  for file in told env; do mv {folder}/{name}.$file {folder}/{name}-$rank.$file; done
done
"""


class Node:
    """A node that runs the script, with nothing on its PATH but what is put there.

    Attributes:
        folder: Where the job was submitted, with the images a.sif and a.sqsh in it.
        env: Of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "submitted"
        self.folder.mkdir()
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name in COMMANDS.split():
            (self._bin / name).symlink_to(str(shutil.which(name)))
        self.put("sleep", "#!/bin/bash\n")
        self.put("sinfo", "#!/bin/bash\necho n7\necho n8\n")
        self.env = {
            "PATH": str(self._bin),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_PARTITION": "main",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURMD_NODENAME": "n7",
        }
        self.srun_ends_with(0)
        self.slurm_says()
        for name in ("a.sif", "a.sqsh"):
            (self.folder / name).touch()

    def put(self, name: str, script: str) -> None:
        (self._bin / name).write_text(script)
        (self._bin / name).chmod(0o755)

    def install(self, name: str) -> None:
        """Put a container runtime there, which has every image."""
        self.put(name, STAND_IN.format(folder=self._bin, name=name, code=0, help=""))

    def srun_ends_with(self, code: int, helping: str = "") -> None:
        self.put("srun", STAND_IN.format(folder=self._bin, name="srun", code=code, help=helping))

    def srun_sends(self, signals: str, code: int = 75) -> None:
        """Have the script get these signals, and srun end at the SIGUSR1 that it passes on."""
        sleep = shutil.which("sleep")
        self.put("srun", SIGNALLED_SRUN.format(signals=signals, sleep=sleep, code=code))

    def srun_runs_tasks_of(self, name: str, gpus: str = "") -> None:
        """Have told and environment of a runtime for each task, under its name and -0, -1…"""
        self.put("srun", TASKS.format(folder=self._bin, name=name, gpus=gpus))

    def srun_says(self, *lines: str, code: int) -> None:
        """Have srun end with a code, and its standard error say what is told."""
        said = "".join(f"echo '{line}' >&2\n" for line in lines)
        self.put("srun", f"#!/bin/bash\ntest $1 != --help || exit\n{said}exit {code}\n")

    def install_pyxis(self) -> None:
        self.srun_ends_with(0, "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH")

    def slurm_says(
        self,
        state: str = "RUNNING",
        restarts: int = 0,
        excluded: str = "(null)",
        preempted: str = "",
        required: str = "(null)",
        job: str = "41",
        then: str = "",
        more: str = "BatchFlag=1 TimeLimit=01:00:00",
        failing: str = "nothing",
        silent: str = "of another",
        others: str = "",
    ) -> None:
        self.put(
            "scontrol",
            SCONTROL.format(
                folder=self._bin,
                state=state,
                restarts=restarts,
                excluded=excluded,
                preempted=preempted,
                required=required,
                job=job,
                more=more,
                then=f"[[ $1 != requeue ]] || {then}" if then else "",
                failing=failing,
                silent=silent,
                others=others,
            ),
        )

    def slurm_requeues(self) -> None:
        """Have the job requeued by the first request to do so."""
        self.slurm_says(then=f"sed -i s/Restarts=0/Restarts=1/ {self._bin}/scontrol")

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments],
            cwd=self.folder,
            env={**self.env, **env},
            capture_output=True,
            text=True,
        )

    def told(self, name: str) -> list[str]:
        path = self._bin / f"{name}.told"
        return path.read_text().splitlines() if path.exists() else []

    def requests(self) -> list[str]:
        """What Slurm was asked to do."""
        return [line for line in self.told("scontrol") if " show " not in f" {line}"]

    def environment(self, name: str = "srun") -> dict[str, str]:
        lines = (self._bin / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


TWO_GPUS = {
    "SLURM_JOB_GPUS": "0,3",
    "SLURM_GPUS_ON_NODE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "JOB_EPOCHS": "5",
    "LD_LIBRARY_PATH": "/opt/modules/lib",
    "SECRET": "not for the container",
}
SRUN = ["--nodes=1", "--ntasks=1", "--export=ALL", "--cpus-per-task=4", "--gpus=2"]
TRAIN = ["python", "-m", "job", "train", "--epochs", "2"]
# Of those in TWO_GPUS and Node.env, those that the program is to see, and the script's own.
NAMES = [
    *("JOB_DATA_DIR", "JOB_EPOCHS", "JOB_LOG_FORMAT", "JOB_OUTPUT_DIR", "JOB_REQUIRE_GPUS"),
    *("KERAS_HOME", "MPLCONFIGDIR", "PYTHONNOUSERSITE", "SLURMD_NODENAME", "SLURM_CPUS_PER_TASK"),
    *("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"),
    *("SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT"),
]
# What srun sets in each task.
OF_A_TASK = [
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID"),
]
NAMES = sorted([*NAMES, *OF_A_TASK])


def test_pyxis_is_told_image_mounts_and_variables(node: Node) -> None:
    node.install_pyxis()
    image = {"CONTAINER_IMAGE": "registry.example.com:5000/team/cifar10-job:0.1.0"}
    image["CONTAINER_ARGS"] = "--container-writable"
    host = {"LD_PRELOAD": "", "PYTHONHOME": "/opt/python"}
    result = node.run("--epochs", "2", **TWO_GPUS, **image, **host)
    assert result.returncode == 0, result.stderr
    told = node.told("srun")
    (names,) = (word for word in told if word.startswith("--container-env="))
    assert sorted(names.removeprefix("--container-env=").split(",")) == sorted(
        [*NAMES, "CUDA_VISIBLE_DEVICES"]
    )
    output, data = node.folder / "output/slurm", node.folder / "data"
    assert told == [
        *SRUN,
        "--container-image=registry.example.com:5000#team/cifar10-job:0.1.0",
        f"--container-mounts={output}:/output,{data}:/data",
        "--container-workdir=/app",
        "--no-container-mount-home",
        "--no-container-remap-root",
        "--no-container-entrypoint",
        names,
        "--container-writable",
        *TRAIN,
    ]
    assert node.environment()["JOB_OUTPUT_DIR"] == "/output"
    of_the_host = {"LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"}
    assert not of_the_host & node.environment().keys()


@pytest.mark.parametrize("command", ["apptainer", "singularity"])
def test_apptainer_is_told_image_mounts_and_variables(node: Node, command: str) -> None:
    node.install(command)
    node.srun_runs_tasks_of(command)
    (node.folder / "cifar10-job.sif").touch()
    result = node.run("--epochs", "2", CONTAINER_ARGS="--bind /scratch", **TWO_GPUS)
    assert result.returncode == 0, result.stderr
    assert node.told("srun")[: len(SRUN)] == SRUN
    assert node.told(f"{command}-0") == [
        *("exec", "--nv", "--cleanenv", "--no-home", "--pwd", "/app"),
        *("--bind", f"{node.folder}/output/slurm:/output", "--bind", f"{node.folder}/data:/data"),
        *("--bind", "/scratch", f"{node.folder}/cifar10-job.sif"),
        *TRAIN,
    ]
    prefix = f"{command.upper()}ENV_"
    passed = {
        name.removeprefix(prefix): value
        for name, value in node.environment(f"{command}-0").items()
        if name.startswith(prefix)
    }
    assert sorted(passed) == sorted([*NAMES, "CUDA_VISIBLE_DEVICES"])
    assert passed["JOB_DATA_DIR"] == "/data"
    assert passed["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert passed["JOB_REQUIRE_GPUS"] == "0"  # Slurm's promise stands


def named_container(told: list[str]) -> list[str]:
    """What podman or docker were told after `run` and a name for the container."""
    assert told[:2] == ["run", "--name"]
    assert re.fullmatch(r"cifar10-job-41-\d+", told[2])
    return told[3:]


@pytest.mark.parametrize("command", ["podman", "docker"])
def test_engines_are_told_image_user_mounts_and_the_steps_own_gpus(
    node: Node, command: str
) -> None:
    node.install(command)
    node.srun_runs_tasks_of(command, gpus="0,3")
    result = node.run("--epochs", "2", CONTAINER_ARGS="--network host", **TWO_GPUS)
    assert result.returncode == 0, result.stderr
    assert node.told("srun")[: len(SRUN)] == SRUN
    told = named_container(node.told(f"{command}-0"))
    variables = [word for option, word in itertools.pairwise(told) if option == "--env"]
    # The job's GPUs have other numbers in a container that sees no others.
    assert variables == NAMES
    assert told == [
        *gpu_options(command, "0,3"),
        *("--rm", "--label", "slurm-job=41", "--user", f"{os.getuid()}:{os.getgid()}"),
        *("--security-opt", "label=disable", "--shm-size", "1g"),
        *("--volume", f"{node.folder}/output/slurm:/output"),
        *("--volume", f"{node.folder}/data:/data"),
        *(word for name in variables for word in ("--env", name)),
        *user_options(command),
        *("--network", "host", f"cifar10-job:{__version__}", "train", "--epochs", "2"),
    ]


def gpu_options(command: str, gpus: str) -> list[str]:
    if command == "docker":
        return ["--gpus", f'"device={gpus}"']
    return [word for gpu in gpus.split(",") for word in ("--device", f"nvidia.com/gpu={gpu}")]


def user_options(command: str) -> list[str]:
    if command == "podman":
        return ["--userns", "keep-id"] if os.getuid() else []
    groups = subprocess.run(["id", "-G"], capture_output=True, text=True).stdout.split()
    return [word for group in groups for word in ("--group-add", group)]


def test_a_container_gets_the_variables_that_say_how_to_compute_and_connect(node: Node) -> None:
    node.install("docker")
    node.srun_runs_tasks_of("docker")
    theirs = ("TF_CPP_MIN_LOG_LEVEL", "NCCL_DEBUG", "https_proxy", "HTTP_PROXY", "no_proxy", "TZ")
    node.run(JOB_REQUIRE_GPUS="2", SECRET="no", **dict.fromkeys((*theirs, "ALL_PROXY"), "x"))
    told = node.told("docker-0")
    variables = {word for option, word in itertools.pairwise(told) if option == "--env"}
    assert {*theirs, "ALL_PROXY", "JOB_REQUIRE_GPUS"} <= variables
    assert "SECRET" not in variables
    assert node.environment("docker-0")["JOB_REQUIRE_GPUS"] == "2"


def test_podman_keeps_an_ordinary_users_own_id() -> None:
    if os.getuid():
        pytest.skip("covered by the other tests, as this user is an ordinary one")
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder))
        node.install("podman")
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o777)
        node.srun_runs_tasks_of("podman")
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        result = subprocess.run(
            [*user, "bash", "-s"],
            input=SCRIPT.read_text(),  # which that user need not be able to read
            cwd=node.folder,
            env={**node.env, "PATH": f"{node.env['PATH']}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        told = node.told("podman-0")
        assert told[told.index("--userns") + 1] == "keep-id"
        assert told[told.index("--user") + 1] == "65534:65534"


def test_without_a_container_the_interpreter_is_told_folders(node: Node) -> None:
    node.install("python3.12")
    python = shutil.which("python3.12", path=node.env["PATH"])
    result = node.run("--epochs", "2", PYTHON=str(python), JOB_OUTPUT_DIR="here", **TWO_GPUS)
    assert result.returncode == 0, result.stderr
    assert node.told("srun") == [*SRUN, str(python), *TRAIN[1:]]
    environment = node.environment()
    assert environment["JOB_OUTPUT_DIR"] == f"{node.folder}/here"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "JOB_REQUIRE_GPUS" not in environment


UUIDS = "GPU-8f6c\nGPU-21ab\n"


@pytest.mark.parametrize(
    ("visible", "smi", "expected"),
    [
        ("0,1", "", "0,3"),  # not known
        ("0,1", UUIDS, "GPU-8f6c,GPU-21ab"),  # Slurm shows the job no others
        ("0,1", UUIDS + "GPU-77c0\n", "0,3"),  # or there are others, too
        ("GPU-21ab,GPU-77c0", UUIDS, "GPU-21ab,GPU-77c0"),
        ("MIG-1,MIG-2", "", "MIG-1,MIG-2"),
    ],
)
def test_gpus_have_the_names_that_mean_the_same_outside_of_slurm(
    node: Node, visible: str, smi: str, expected: str
) -> None:
    node.put("nvidia-smi", f"#!/bin/bash\nprintf '{smi}'\n")
    gpus = TWO_GPUS | {"CUDA_VISIBLE_DEVICES": visible}
    for command in ("podman", "docker"):
        node.install(command)
        node.srun_runs_tasks_of(command, gpus="0,3")
        node.run(CONTAINER_RUNTIME=command, **gpus)
        options = gpu_options(command, expected)
        assert named_container(node.told(f"{command}-0"))[: len(options)] == options


def test_without_gpus_no_container_gets_any(node: Node) -> None:
    for command in ("podman", "docker"):
        node.install(command)
        node.srun_runs_tasks_of(command)
        node.run(CONTAINER_RUNTIME=command)
        assert not [word for word in node.told("srun") if word.startswith("--gpus")]
    assert "--device" not in node.told("podman-0")
    assert "--gpus" not in node.told("docker-0")
    assert "NVIDIA_VISIBLE_DEVICES=void" in node.told("docker-0")


def runtime_of(result: subprocess.CompletedProcess[str]) -> str:
    match = re.search(r"runtime (\w+(?: with \S+)?),", result.stderr)
    assert match, result.stderr
    return match[1].replace(" with", "")


def test_auto_takes_the_first_runtime_that_has_an_image(node: Node) -> None:
    for name in ("apptainer", "podman", "docker"):
        node.install(name)
    node.install_pyxis()
    (node.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(Path(node.env["PATH"]) / "podman", node.folder / ".venv/bin/python")
    for name in ("cifar10-job.sqsh", "cifar10-job.sif"):
        (node.folder / name).touch()
    local = f"cifar10-job:{__version__}"
    assert runtime_of(node.run()) == f"pyxis {node.folder}/cifar10-job.sqsh"
    (node.folder / "cifar10-job.sqsh").unlink()
    assert runtime_of(node.run()) == f"apptainer {node.folder}/cifar10-job.sif"
    (node.folder / "cifar10-job.sif").unlink()
    assert runtime_of(node.run()) == f"podman {local}"
    node.put("podman", "#!/bin/bash\nexit 1\n")
    assert runtime_of(node.run()) == f"docker {local}"
    node.put("docker", "#!/bin/bash\nexit 1\n")
    assert runtime_of(node.run()) == "none"


@pytest.mark.parametrize(
    ("runtime", "given", "expected"),
    [
        ("pyxis", "team/a:1", "team/a:1"),
        ("pyxis", "docker://example.com/team/a:1", "example.com#team/a:1"),
        ("pyxis", "example.com#team/a:1", "example.com#team/a:1"),
        ("pyxis", "images/a.sqsh", "{folder}/images/a.sqsh"),
        ("apptainer", "example.com/team/a:1", "docker://example.com/team/a:1"),
        ("apptainer", "oras://example.com/team/a:1", "oras://example.com/team/a:1"),
        ("apptainer", "{folder}/images/a.sif", "{folder}/images/a.sif"),
        ("apptainer", "/images/unpacked", "/images/unpacked"),
        ("podman", "example.com/team/a:1", "example.com/team/a:1"),
        ("docker", "docker://example.com/team/a:1", "example.com/team/a:1"),
    ],
)
def test_an_image_is_spelt_as_the_runtime_wants_it(
    node: Node, runtime: str, given: str, expected: str
) -> None:
    if runtime == "pyxis":
        node.install_pyxis()
    else:
        node.install(runtime)
    (node.folder / "images").mkdir()
    for name in ("a.sif", "a.sqsh"):
        (node.folder / "images" / name).touch()
    image = given.format(folder=node.folder)
    result = node.run(CONTAINER_RUNTIME=runtime, CONTAINER_IMAGE=image)
    assert runtime_of(result) == f"{runtime} {expected.format(folder=node.folder)}"


def test_auto_leaves_an_images_file_to_the_runtime_that_reads_it(node: Node) -> None:
    node.install("podman")
    node.install("apptainer")
    node.install_pyxis()
    for runtime, image in (("apptainer", "a.sif"), ("pyxis", "a.sqsh")):
        assert runtime_of(node.run(CONTAINER_IMAGE=image)) == f"{runtime} {node.folder}/{image}"


TASK_7_OF_40 = "BatchFlag=1 TimeLimit=01:00:00 ArrayJobId=40 ArrayTaskId=7"
REFUSED = [
    ({"SLURM_JOB_ID": ""}, (), "not started by Slurm; say sbatch slurm/train.sh"),
    ({"MAX_REQUEUES": "ten"}, (), "MAX_REQUEUES is ten, expected a number"),
    ({}, ("--output-dir", "a"), "received --output-dir; say JOB_OUTPUT_DIR=FOLDER sbatch"),
    ({}, ("--time=30",), "received --time, an option of sbatch; say it before slurm/train.sh"),
    ({}, ("--gpus-per-node", "4"), "received --gpus-per-node, an option of sbatch"),
    ({"CONTAINER_RUNTIME": "none", "CONTAINER_IMAGE": "a"}, (), "is none and CONTAINER_IMAGE a"),
    (
        {"CONTAINER_RUNTIME": "none", "PYTHON": "python9"},
        (),
        "there is no python9 in .*; submit at",
    ),
    ({}, ("--data-dir=a",), "received --data-dir; say JOB_DATA_DIR"),
    ({}, ("--seed=1",), "received --seed in an array"),
    ({"JOB_SEED": "1"}, (), "JOB_SEED is 1 in an array, .*; unset it"),
    ({"JOB_OUTPUT_DIR": "/proc/a"}, (), "cannot make the folder /proc/a; set JOB_OUTPUT_DIR"),
    ({"JOB_DATA_DIR": "a:b"}, (), "expected neither colon nor comma"),
    ({"JOB_DATA_DIR": "a b", "CONTAINER_IMAGE": "a.sqsh"}, (), "expected letters, .* for pyxis"),
    ({"CONTAINER_RUNTIME": "lxc"}, (), "CONTAINER_RUNTIME is lxc, expected auto, pyxis, "),
    ({"CONTAINER_RUNTIME": "docker"}, (), "CONTAINER_RUNTIME is docker, which .* does not have"),
    ({"CONTAINER_RUNTIME": "none"}, (), r"there is no \.venv/bin/python in .*LOCK=gpu"),
    ({"CONTAINER_RUNTIME": "pyxis"}, (), "CONTAINER_RUNTIME is pyxis, which .* does not have"),
    (
        {"CONTAINER_RUNTIME": "podman", "CONTAINER_IMAGE": "a.sif"},
        (),
        "podman, which has no image a.sif on",
    ),
    (
        {"CONTAINER_IMAGE": "a.sqsh"},
        (),
        "nothing on .* runs the image a.sqsh: expected pyxis for a .sqsh",
    ),
    ({"CONTAINER_IMAGE": "lost.sif"}, (), "CONTAINER_IMAGE is lost.sif, which is not on .* in /"),
    ({}, ("-t", "30"), "received -t, an option of sbatch; say it before slurm/train.sh"),
    ({}, ("--output=a.log",), "received --output, an option of sbatch; say it before"),
    ({"SITE_SETUP": "lost.sh"}, (), "SITE_SETUP is lost.sh, which is not in"),
]


@pytest.mark.parametrize(("env", "arguments", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_runs(
    node: Node, env: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    node.install("podman")
    if "for pyxis" in message:
        node.install_pyxis()
    if "in an array" in message:
        node.slurm_says(more=TASK_7_OF_40)
    result = node.run(*arguments, **env)
    assert result.returncode == 2
    assert re.search(f"slurm/train.sh: error: .*{message}", result.stderr), result.stderr
    assert node.told("srun") == []


def test_a_folder_that_is_no_checkout_is_refused(node: Node) -> None:
    node.put("broken", "#!/bin/bash\nexit 1\n")
    result = node.run(PYTHON=f"{node.env['PATH']}/broken")
    assert result.returncode == 2
    assert "has not all that job/ in" in result.stderr


def test_without_image_and_environment_it_says_where_to_submit(node: Node) -> None:
    result = node.run()
    assert result.returncode == 2
    assert "received neither an image nor .venv/bin/python in" in result.stderr
    assert "--chdir=CHECKOUT" in result.stderr
    assert {path.name for path in node.folder.iterdir()} == {"a.sif", "a.sqsh"}


@pytest.mark.parametrize("runtime", ["auto", "none"])
def test_an_interpreter_that_the_node_cannot_run_is_named(node: Node, runtime: str) -> None:
    """As where the Python that made .venv is on the login node alone."""
    python = node.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/opt/login-node/python3.12")
    result = node.run(CONTAINER_RUNTIME=runtime)
    assert result.returncode == 2
    assert ".venv/bin/python, which" in result.stderr
    assert "it leads to /opt/login-node/python3.12" in result.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 0\n", "error: .*site.sh has ended the script"), ("false\n", "ended with exit code 1")],
)
def test_what_goes_wrong_in_a_sites_file_is_told(node: Node, script: str, message: str) -> None:
    (node.folder / "site.sh").write_text(script)
    node.install("podman")
    result = node.run(SITE_SETUP="./site.sh")
    assert re.search(message, result.stderr)
    has_ended = script.startswith("exit")
    assert ("is done" in result.stderr) != has_ended
    assert ("ended the script" in result.stderr) == has_ended
    assert result.returncode == (2 if has_ended else 0)


def test_a_step_of_another_job_is_refused_and_a_short_limit_warned_of(node: Node) -> None:
    node.install("podman")
    node.slurm_says(more="BatchFlag=0 TimeLimit=01:00:00")
    result = node.run()
    assert result.returncode == 2
    assert "started by srun or salloc; say sbatch slurm/train.sh" in result.stderr
    node.slurm_says(more="BatchFlag=1 TimeLimit=00:04:00")
    result = node.run()
    assert result.returncode == 0
    assert "warning: the time limit is 00:04:00, expected 5 minutes at least" in result.stderr


def test_a_sites_file_is_sourced_first(node: Node) -> None:
    (node.folder / "slurm").mkdir()
    site = node.folder / "slurm" / "site.sh"
    site.write_text("echo $UNKNOWN_VARIABLE\nexport CONTAINER_RUNTIME=podman JOB_DATA_DIR=/tmp\n")
    node.install("podman")
    node.install("docker")
    result = node.run()
    assert runtime_of(result).startswith("podman")
    assert "/tmp:/data" in node.told("srun")


def test_what_a_sites_file_sets_for_itself_is_taken_back(node: Node) -> None:
    """With its -e the script would end at the signal, and the job would not be requeued."""
    (node.folder / "slurm").mkdir()
    (node.folder / "slurm" / "site.sh").write_text(
        "set -efu +o pipefail\ncd /\nIFS=o here=/ options=oops site=/ ours=/\ntrap '' USR1\n"
    )
    node.install("podman")
    node.srun_sends("USR1")
    result = node.run()
    assert node.requests() == ["requeue Incomplete 41"], result.stderr
    assert f"output {node.folder}/output/slurm" in result.stderr


def test_a_task_of_an_array_has_its_seed_and_its_folder(node: Node) -> None:
    node.install("podman")
    # Where 41 is the number of the whole array, too, or its variables are those of another array.
    node.slurm_says(more=TASK_7_OF_40, others="JobId=39 ArrayTaskId=6 Restarts=9\n")
    for variables in ({}, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}):
        assert node.run(**variables).returncode == 0
        environment = node.environment()
        assert environment["JOB_SEED"] == environment["SLURM_ARRAY_TASK_ID"] == "7"
        assert environment["SLURM_ARRAY_JOB_ID"] == "40"
        assert environment["SLURM_RESTART_COUNT"] == "0"
        assert f"{node.folder}/output/slurm/seed-7:/output" in node.told("srun")
    assert node.told("scontrol")[-1] == "--oneliner show job 40_7"


def test_where_slurm_is_silent_the_variables_tell_a_task(node: Node) -> None:
    node.install("podman")
    node.slurm_says(silent="41")
    node.run(SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="7")
    assert node.environment()["JOB_SEED"] == "7"


OUTER = (
    *("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_SOCKET", "SLURM_GPUS_PER_TASK"),
    *("SLURM_CPUS_PER_GPU", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_NTASKS_PER_GPU"),
    *("SLURM_TRES_PER_TASK", "SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_MEM_BIND"),
)


def test_options_of_a_job_from_within_which_it_was_submitted_are_not_its_own(node: Node) -> None:
    """srun would take them for its own, and then refuse them or bind to that job's processors."""
    node.install("podman")
    (node.folder / "site.sh").write_text("export SLURM_CPU_BIND=none\n")
    node.run(SITE_SETUP="site.sh", **dict.fromkeys(OUTER, "2"), **TWO_GPUS)
    environment = node.environment()
    assert {*OUTER} & environment.keys() == {"SLURM_CPU_BIND"}
    assert environment["SLURM_CPU_BIND"] == "none"


def test_variables_of_a_job_from_within_which_it_was_submitted_do_not_count(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(1)
    outer = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "3"}
    result = node.run(**outer, SLURM_MEM_PER_CPU="100")
    assert "job 41, attempt 0 on n7" in result.stderr
    assert node.requests() == ["requeue Incomplete 41"]
    environment = node.environment()
    assert environment["SLURM_RESTART_COUNT"] == "0"
    assert not {"SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_CPU", "JOB_SEED"} & environment.keys()


def test_a_node_without_slurms_commands_is_refused(node: Node) -> None:
    node.install("podman")
    (Path(node.env["PATH"]) / "scontrol").unlink()
    result = node.run()
    assert result.returncode == 2
    assert "there is no scontrol on" in result.stderr


def test_a_signal_before_the_step_starts_none(node: Node) -> None:
    (node.folder / "slurm").mkdir()
    (node.folder / "slurm" / "site.sh").write_text("kill -USR1 $$\n")
    node.install("podman")
    result = node.run()
    assert result.returncode == 75
    assert node.told("srun") == []
    assert node.requests() == ["requeue Incomplete 41"]


def test_an_exit_code_is_known_in_posix_mode_too(node: Node) -> None:
    node.install("podman")
    assert node.run(POSIXLY_CORRECT="1").returncode == 0


def test_further_options_may_stand_on_lines_of_their_own(node: Node) -> None:
    node.install("podman")
    node.run(CONTAINER_ARGS="--network host\n--pids-limit 99\n")
    told = node.told("srun")
    assert told[told.index("--network") :][:4] == ["--network", "host", "--pids-limit", "99"]


def record(node: Node) -> Path:
    return node.folder / "output" / "slurm" / ".slurm-41"


def test_a_missing_gpu_adds_its_node_to_those_excluded(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.slurm_says(excluded="n3")
    assert node.run(**TWO_GPUS).returncode == 3
    assert node.requests() == [
        "requeuehold Incomplete 41",
        "update JobId=41 ExcNodeList=n3,n7",
        "release 41",
    ]
    assert record(node).read_text() == "gpu in attempt 0\n"


@pytest.mark.parametrize(("before", "goes_on"), [(2, True), (3, False)])
def test_nodes_are_excluded_three_times_at_most(node: Node, before: int, goes_on: bool) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.slurm_says(restarts=before)
    record(node).parent.mkdir(parents=True)
    record(node).write_text("".join(f"gpu in attempt {n}\n" for n in range(before)))
    result = node.run(**TWO_GPUS)
    assert ("release 41" in node.requests()) == goes_on
    assert ("3 times for this cause (at most 3)" in result.stderr) != goes_on


def test_a_node_is_not_taken_for_another_whose_name_begins_like_it(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.put("sinfo", '#!/bin/bash\n[[ "$*" != *--partition=main* ]] || printf "n7\\nn77\\n"\n')
    assert "a GPU is missing on node n7; requeueing" in node.run(**TWO_GPUS).stderr


def test_a_job_that_cannot_be_held_is_left_alone(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.slurm_says(failing="requeuehold")
    result = node.run(**TWO_GPUS)
    assert "could not requeue by hold_and_exclude" in result.stderr
    assert not any("update" in line or "release" in line for line in node.requests())


def test_a_job_that_has_asked_for_no_gpu_misses_none(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    result = node.run("--require-gpus", "1")
    assert result.returncode == 3
    assert "Slurm was asked for no GPU; say sbatch --gpus-per-node=1" in result.stderr
    assert node.requests() == []


def test_a_job_that_wants_this_node_is_not_sent_to_another(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.slurm_says(required="n7")
    result = node.run(**TWO_GPUS)
    assert result.returncode == 3
    assert "the job has no other to go to than n7" in result.stderr
    assert node.requests() == []


def test_a_job_whose_node_cannot_be_excluded_is_held_with_a_message(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(3)
    node.slurm_says(failing="update")
    result = node.run(**TWO_GPUS)
    assert result.returncode == 3
    assert "job 41 is held, because node n7 could not be excluded" in result.stderr
    assert "scontrol release 41" in result.stderr
    assert not any("release" in line for line in node.requests())


def test_an_attempt_that_was_replaced_does_nothing_to_the_job(node: Node) -> None:
    """Its node was lost for Slurm; srun then ends with 0."""
    node.install("podman")
    replacing = "scontrol requeue 41"
    node.put("srun", f"#!/bin/bash\ntest $1 = --help || {replacing}\n")
    node.slurm_requeues()
    result = node.run()
    assert "attempt 0 of job 41 is over; Slurm has requeued the job as attempt 1" in result.stderr
    assert "done" not in result.stderr
    assert node.requests() == ["requeue 41"]


@pytest.mark.parametrize("code", [1, 3, 75, 139])
def test_a_job_that_is_ending_is_not_requeued(node: Node, code: int) -> None:
    node.install("podman")
    node.srun_ends_with(code)
    node.slurm_says(state="COMPLETING")
    result = node.run()
    assert result.returncode == code
    assert "cancelled or ended from outside (Slurm: COMPLETING)" in result.stderr
    assert node.requests() == []


@pytest.mark.parametrize(
    ("code", "message"),
    [(75, "it was not Slurm's time limit"), (125, "of srun or"), (255, "of srun or")],
)
def test_what_is_nobodys_fault_is_not_requeued(node: Node, code: int, message: str) -> None:
    node.install("podman")
    node.srun_ends_with(code)
    result = node.run()
    assert result.returncode == code
    assert message in result.stderr
    assert node.requests() == []


@pytest.mark.parametrize(
    ("signals", "message", "requests"),
    [
        (
            "USR1",
            r"stopped for the time limit; requeueing \(1 of at most 50\), which Slurm reports",
            ["requeue Incomplete 41"],
        ),
        ("TERM", "stopped by SIGTERM, not requeued", []),
        ("USR1 TERM", "stopped by SIGTERM, not requeued", []),
    ],
)
def test_a_signal_is_passed_on_and_waited_for(
    node: Node, signals: str, message: str, requests: list[str]
) -> None:
    node.install("podman")
    node.srun_sends(signals)
    # Where Slurm is set up for preemption.
    node.slurm_says(preempted="PreemptEligibleTime=2026-01-31T12:00:00 PreemptTime=None")
    result = node.run()
    assert result.returncode == 75
    assert re.search(message, result.stderr), result.stderr
    assert node.requests() == requests


@pytest.mark.parametrize(
    ("code", "message", "cause"),
    [
        (0, "job 41 is done", None),
        (1, "exit code 1; requeueing", "defect"),
        (2, "exit code 2, not requeued", None),
        (3, "a GPU is missing on node n7; requeueing", "gpu"),
        (127, "of srun or podman, not requeued", None),
        (137, "killed by signal 9; requeueing", "defect"),
        (138, "stopped for the time limit; requeueing", "time"),  # before it has heard of SIGUSR1
    ],
)
def test_a_fault_near_the_time_limit_is_that_fault(
    node: Node, code: int, message: str, cause: str | None
) -> None:
    node.install("podman")
    node.srun_sends("USR1", code)
    result = node.run(**TWO_GPUS)
    assert result.returncode == code
    assert message in result.stderr
    assert record(node).exists() == bool(cause)
    assert not cause or record(node).read_text() == f"{cause} in attempt 0\n"


def test_what_is_preempted_is_requeued_unless_it_is_done(node: Node) -> None:
    """Slurm does so only with what its grace time has not been enough for."""
    node.install("podman")
    node.slurm_says(preempted="PreemptTime=2026-01-31T12:00:00")
    assert node.run().returncode == 0
    assert node.requests() == []
    node.srun_sends("TERM")
    result = node.run()
    assert "preempted; requeueing (1 of at most 50)" in result.stderr
    assert node.requests() == ["requeue Incomplete 41"]


def test_a_requeue_that_cannot_be_counted_is_left_alone(node: Node) -> None:
    """Else a full disk would have the job requeued for ever."""
    node.install("podman")
    record(node).mkdir(parents=True)
    node.srun_ends_with(1)
    node.slurm_says(restarts=1)
    result = node.run()
    assert ".slurm-41 cannot be written; submit it again" in result.stderr
    assert node.requests() == []


def test_the_script_outlives_the_requeue_that_ends_it(node: Node) -> None:
    """Slurm sends SIGTERM while the request is on its way, after which its answer counts."""
    node.install("podman")
    node.srun_ends_with(1)
    node.slurm_says(then="kill -s TERM $PPID")
    result = node.run()
    assert result.returncode == 1
    assert "told to end" not in result.stderr


def test_the_count_of_a_job_that_is_done_is_taken_away(node: Node) -> None:
    node.install("podman")
    record(node).parent.mkdir(parents=True)
    record(node).write_text("time in attempt 0\n")
    node.slurm_says(restarts=1)
    assert node.run().returncode == 0
    assert not record(node).exists()


def test_a_requeue_that_slurm_refuses_is_tried_again_and_reported(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(1)
    node.slurm_says(failing="requeue Incomplete 41")
    result = node.run()
    assert result.returncode == 1
    assert node.requests() == ["requeue Incomplete 41"] * 3
    assert "could not requeue by scontrol requeue Incomplete 41; submit it again" in result.stderr


def test_a_job_that_must_not_be_requeued_is_not(node: Node) -> None:
    node.install("podman")
    node.srun_sends("USR1")
    node.slurm_says(more="BatchFlag=1 TimeLimit=01:00:00 Requeue=0")
    result = node.run()
    assert "the job was submitted with --no-requeue; submit it again" in result.stderr
    assert node.requests() == []


def test_without_an_answer_of_slurm_the_exit_code_stands(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(1)
    node.put("scontrol", "#!/bin/bash\nexit 1\n")
    result = node.run()
    assert result.returncode == 1
    assert "exit code 1, not requeued, because Slurm says nothing of job 41" in result.stderr
    node.srun_ends_with(0)
    result = node.run()
    assert result.returncode == 0
    assert "done" not in result.stderr


def test_requeues_of_an_older_job_with_the_same_number_do_not_count(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(1)
    record(node).parent.mkdir(parents=True)
    record(node).write_text("defect in attempt 0\n")
    assert node.run().returncode == 1
    assert node.requests() == ["requeue Incomplete 41"]


def test_requeues_of_all_causes_are_bounded_together(node: Node) -> None:
    node.install("podman")
    node.srun_ends_with(1)
    node.slurm_says(restarts=2)
    record(node).parent.mkdir(parents=True)
    record(node).write_text("time in attempt 0\ntime in attempt 1\n")
    result = node.run(MAX_REQUEUES="2")
    assert result.returncode == 1
    assert (
        "requeued itself 2 times (at most 2), 0 times for this cause (at most 1)" in result.stderr
    )
    assert node.requests() == []


TWO_NODES = {
    **TWO_GPUS,
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[7-8]",
    # Slurm gives the batch script those of a first task.
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
}
TWO_NAMES = sorted([*NAMES, "SLURM_JOB_NODELIST", "no_proxy"])
SRUN_TWO = [
    *("--nodes=2", "--ntasks=2", "--export=ALL"),
    *("--ntasks-per-node=1", "--distribution=block", "--kill-on-bad-exit=1", "--cpus-per-task=4"),
]


def test_on_two_nodes_each_runs_one_task_in_the_order_of_the_nodes(node: Node) -> None:
    node.install("python3.12")
    python = shutil.which("python3.12", path=node.env["PATH"])
    result = node.run("--epochs", "2", PYTHON=str(python), **TWO_NODES)
    assert result.returncode == 0, result.stderr
    assert node.told("srun") == [*SRUN_TWO, str(python), *TRAIN[1:]]
    assert "job 41, attempt 0 on 2 nodes n[7-8]: runtime none" in result.stderr
    assert list((node.folder / "output" / "slurm").iterdir()) == []


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "n7,n8"),
        ({"no_proxy": "a.example"}, "a.example,n7,n8"),
        ({"NO_PROXY": "b.example"}, "b.example,n7,n8"),
    ],
)
def test_what_tasks_tell_each_other_takes_no_proxy(
    node: Node, env: dict[str, str], expected: str
) -> None:
    node.install("podman")
    node.install_pyxis()
    nodes = {**TWO_NODES, "SLURM_JOB_NODELIST": "n7,n8"}
    node.run(CONTAINER_IMAGE="a.sqsh", **nodes, **env)
    assert node.environment()["no_proxy"] == expected
    node.run(CONTAINER_IMAGE="a.sqsh", **TWO_GPUS)
    assert "no_proxy" not in node.environment()


def test_variables_of_the_step_that_has_submitted_a_job_are_not_its_own(node: Node) -> None:
    node.install("apptainer")
    node.run(CONTAINER_IMAGE="a.sif", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_GPUS="0")
    assert not [name for name in node.environment() if "SLURM_STEP" in name]


def test_pyxis_on_two_nodes_is_told_the_variables_of_each_task(node: Node) -> None:
    node.install_pyxis()
    result = node.run(CONTAINER_IMAGE="a.sqsh", **TWO_NODES)
    assert result.returncode == 0, result.stderr
    told = node.told("srun")
    assert told[: len(SRUN_TWO)] == SRUN_TWO
    (names,) = (word for word in told if word.startswith("--container-env="))
    assert names == f"--container-env={','.join([*TWO_NAMES, 'CUDA_VISIBLE_DEVICES'])}"
    assert told[-4:] == TRAIN[:4]


@pytest.mark.parametrize("command", ["apptainer", "singularity"])
def test_apptainer_on_two_nodes_lets_in_the_variables_of_each_task(
    node: Node, command: str
) -> None:
    node.install(command)
    node.srun_runs_tasks_of(command)
    result = node.run("--epochs", "2", CONTAINER_IMAGE="a.sif", **TWO_NODES)
    assert result.returncode == 0, result.stderr
    assert node.told("srun")[: len(SRUN_TWO)] == SRUN_TWO
    prefix = f"{command.upper()}ENV_"
    for rank in ("0", "1"):
        assert node.told(f"{command}-{rank}") == [
            *("exec", "--nv", "--cleanenv", "--no-home", "--pwd", "/app"),
            *("--bind", f"{node.folder}/output/slurm:/output"),
            *("--bind", f"{node.folder}/data:/data", f"{node.folder}/a.sif"),
            *TRAIN,
        ]
        environment = node.environment(f"{command}-{rank}")
        passed = {
            name.removeprefix(prefix): value
            for name, value in environment.items()
            if name.startswith(prefix)
        }
        assert sorted(passed) == sorted([*TWO_NAMES, "CUDA_VISIBLE_DEVICES"])
        assert [passed[name] for name in OF_A_TASK] == ["2", "n[7-8]", "1(x2)", rank, rank, "0"]
        assert passed["JOB_DATA_DIR"] == "/data"


@pytest.mark.parametrize("command", ["podman", "docker"])
def test_engines_on_two_nodes_are_told_the_gpus_of_each_and_to_use_its_network(
    node: Node, command: str
) -> None:
    node.install(command)
    node.srun_runs_tasks_of(command, gpus="0,3 1,2")
    result = node.run("--epochs", "2", CONTAINER_ARGS="--pids-limit 99", **TWO_NODES)
    assert result.returncode == 0, result.stderr
    assert node.told("srun")[: len(SRUN_TWO)] == SRUN_TWO
    for rank, gpus in (("0", "0,3"), ("1", "1,2")):
        told = node.told(f"{command}-{rank}")
        assert named_container(told) == [
            *gpu_options(command, gpus),
            *("--rm", "--label", "slurm-job=41", "--user", f"{os.getuid()}:{os.getgid()}"),
            *("--security-opt", "label=disable", "--shm-size", "1g"),
            *("--volume", f"{node.folder}/output/slurm:/output"),
            *("--volume", f"{node.folder}/data:/data"),
            *(word for name in TWO_NAMES for word in ("--env", name)),
            *(*user_options(command), "--network", "host", "--pids-limit", "99"),
            *(f"cifar10-job:{__version__}", "train", "--epochs", "2"),
        ]
        environment = node.environment(f"{command}-{rank}")
        assert [environment[name] for name in OF_A_TASK[:4]] == ["2", "n[7-8]", "1(x2)", rank]


@pytest.mark.parametrize("option", ["--network=rdma", "--net rdma"])
def test_a_network_of_the_users_own_takes_the_place_of_the_hosts(node: Node, option: str) -> None:
    node.install("podman")
    node.srun_runs_tasks_of("podman")
    assert node.run(CONTAINER_ARGS=option, **TWO_NODES).returncode == 0
    told = node.told("podman-1")
    assert [word for word in told if word.startswith("--net")] == option.split()[:1]
    assert "host" not in told
    assert "--device" not in told  # Slurm has given this step none


def test_each_node_of_several_gets_the_folders_that_a_container_mounts(node: Node) -> None:
    """Those of one need not be the other's."""
    node.install("podman")
    node.srun_runs_tasks_of("podman")
    podman = Path(node.env["PATH"]) / "podman"
    stand_in = podman.read_text().replace("exit 0", "test $1 != run || rm -r data; exit 0")
    podman.write_text(stand_in)
    result = node.run(**TWO_NODES)
    assert result.returncode == 0, result.stderr


def test_a_task_becomes_apptainer_and_so_gets_its_signals(node: Node) -> None:
    node.put("apptainer", "#!/bin/bash\necho apptainer is $$ of $PPID\n")
    node.put(
        "srun",
        "#!/bin/bash\ntest $1 != --help || exit\n"
        'while [[ $1 == --* ]]; do shift; done\n"$@" &\necho task $! of $$\nwait\n',
    )
    result = node.run(CONTAINER_IMAGE="a.sif")
    task, runtime = (re.search(rf"{word} (\d+ of \d+)", result.stdout) for word in ("task", "is"))
    assert task
    assert runtime
    assert task[1] == runtime[1]


# podman that cannot signal its container at first, which then is deaf once, and ends with 75 in the
# end; and not by signals to podman itself.
SIGNALLED_PODMAN = """#!/bin/bash
case $1 in
  run)
    trap '' TERM USR1
    echo "$3" > {folder}/name
    for _ in {{1..100}}; do
      test ! -e {folder}/signalled || exit 75
      {sleep} 0.1
    done
    ;;
  kill)
    echo "$*" >> {folder}/podman.told
    case $(grep -c . {folder}/podman.told) in
      1) exit 1 ;;
      3) > {folder}/signalled ;;
    esac
    ;;
esac
"""
# A step that gets a signal as Slurm sends it, as soon as its container is there.
SIGNALLED_TASK = """#!/bin/bash
test "$*" != --help || exit
while [[ $1 == --* ]]; do shift; done
"$@" &
until test -s {folder}/name; do {sleep} 0.1; done
kill -s {signal} $!
while kill -0 $! 2> /dev/null; do wait $!; done
wait $!
"""


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_container_gets_the_signal_that_podman_itself_does_not_pass_on(
    node: Node, signal: str
) -> None:
    folder, sleep = node.env["PATH"], shutil.which("sleep")
    node.put("podman", SIGNALLED_PODMAN.format(folder=folder, sleep=sleep))
    node.put("srun", SIGNALLED_TASK.format(folder=folder, sleep=sleep, signal=signal))
    result = node.run()
    assert result.returncode == 75, result.stderr
    name = (Path(folder) / "name").read_text().strip()
    told = [line for line in node.told("podman") if line.startswith("kill")]
    assert len(told) >= 3
    assert set(told) == {f"kill --signal USR1 {name}"}


@pytest.mark.parametrize("command", ["podman", "docker"])
def test_a_container_that_its_client_has_left_behind_is_ended(node: Node, command: str) -> None:
    told = Path(node.env["PATH"]) / f"{command}.told"
    node.put(
        command,
        f'#!/bin/bash\n[[ $1 == image ]] || echo "$*" >> {told}\n[[ $1 != ps ]] || echo a1 b2\n',
    )
    node.srun_ends_with(137)
    node.run()
    ask = "ps --quiet --filter label=slurm-job=41"
    assert node.told(command) == [ask, "stop --time 20 a1 b2"]


def test_a_container_of_an_attempt_that_was_replaced_goes_on(node: Node) -> None:
    """The node was taken for dead; the new attempt asks the old one to save its work."""
    told = Path(node.env["PATH"]) / "podman.told"
    node.put("podman", f'#!/bin/bash\n[[ $1 == image ]] || echo "$*" >> {told}\n')
    node.put("srun", "#!/bin/bash\ntest $1 = --help || scontrol requeue 41\n")
    node.slurm_requeues()
    assert "Slurm has requeued the job as attempt 1" in node.run().stderr
    assert node.told("podman") == []


EXITED = "srun: error: {}: Exited with exit code {}"
ENDED_BY = "srun: error: {}: {}"
LOST = "12:00 cifar10-job: stopped: lost worker 1 (n8)"
MISSING = "12:00 cifar10-job: stopped: missing worker 1 (n8)"


def exited(*codes: int) -> list[str]:
    return [EXITED.format(f"n{7 + n}: task {n}", code) for n, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("lines", "srun", "code"),
    [
        (exited(75, 2), 75, 2),
        (exited(3, 2), 3, 2),
        (exited(1, 75, 3), 75, 3),
        (exited(139, 1), 139, 1),
        (exited(75, 139), 139, 139),
        (exited(134, 139), 139, 134),
        (exited(75, 127), 127, 127),
        (exited(139, 255), 255, 255),
        (exited(139, 127), 139, 127),
        (exited(75, 75), 75, 75),
        (exited(2), 0, 2),
        ([EXITED.format("n[7-8,11],gpu07: tasks 0-2,5", 2), *exited(75)], 75, 2),
        # A progress line without an end, of the program.
        (["step 5 " + exited(2)[0], *exited(75)], 75, 2),
        ([ENDED_BY.format("n8: task 1", "Segmentation fault (core dumped)")], 143, 139),
        ([ENDED_BY.format("n8: task 1", "Killed")], 137, 137),
        ([ENDED_BY.format("n8: task 1", "Out Of Memory")], 125, 137),
        ([ENDED_BY.format("n8: task 1", "Aborted (core dumped)")], 134, 134),
        ([ENDED_BY.format("n8: task 1", "Bus error")], 135, 135),
        ([ENDED_BY.format("n8: task 1", "Floating point exception")], 136, 136),
        ([ENDED_BY.format("n8: task 1", "Illegal instruction")], 132, 132),
        ([ENDED_BY.format("n8: task 1", "User defined signal 1")], 138, 138),
        # What srun itself has ended for another's sake.
        ([*exited(75), ENDED_BY.format("n8: task 1", "Terminated")], 143, 75),
        ([*exited(75), ENDED_BY.format("n8: task 1", "Killed")], 137, 75),
        ([ENDED_BY.format("n8: task 1", "Killed"), *exited(75)], 137, 137),
        ([ENDED_BY.format("n8: task 1", "Terminated")], 137, 143),
        (["srun: error: Unable to create step"], 1, 1),
        (["n8 has exited with exit code 2"], 75, 75),
    ],
)
def test_of_the_tasks_exit_codes_the_one_that_asks_for_most_decides(
    node: Node, lines: list[str], srun: int, code: int
) -> None:
    node.install("podman")
    node.srun_says(*lines, code=srun)
    result = node.run(**TWO_NODES)
    assert result.returncode == code
    assert set(lines) <= set(result.stderr.splitlines())
    assert not list((node.folder / "output" / "slurm").glob("*endings"))


def test_of_one_node_the_step_is_not_listened_to(node: Node) -> None:
    node.install("podman")
    node.put("srun", "#!/bin/bash\ntest $1 = --help || printf 'no end of a line' >&2\n")
    assert "no end of a line2" in node.run().stderr
    node.srun_says(LOST, *exited(2), code=75)
    result = node.run()
    assert result.returncode == 75
    assert node.requests() == []


def test_a_step_is_listened_to_also_where_nothing_can_be_noted(node: Node) -> None:
    node.install("podman")
    record(node).with_name(".slurm-41-endings").mkdir(parents=True)
    node.srun_says(*exited(2, 75), code=75)
    result = node.run(**TWO_NODES)
    assert result.returncode == 75
    assert "\n".join(exited(2, 75)) in result.stderr
    assert "endings" not in result.stderr


def test_the_last_words_of_a_step_are_handed_on_too(node: Node) -> None:
    node.install("podman")
    node.put("srun", "#!/bin/bash\ntest $1 = --help || printf ' a\\\\tb \\n\\nlast' >&2\n")
    result = node.run(**TWO_NODES)
    assert "\n a\\tb \n\nlast\n" in result.stderr


def test_what_a_signalled_step_says_is_handed_on_to_its_end(node: Node) -> None:
    """scancel sends SIGTERM to all of a job's processes, srun's and this script's own too."""
    node.install("podman")
    sleep = shutil.which("sleep")
    node.put(
        "srun",
        "#!/bin/bash\ntest $1 != --help || exit\n"
        "trap 'echo told >&2; echo bye >&2; exit 75' USR1; trap '' TERM\n"
        f"{sleep} 0.3; kill -TERM 0; for _ in {{1..100}}; do {sleep} 0.1; done\n",
    )
    result = subprocess.run(
        [SCRIPT],
        cwd=node.folder,
        env={**node.env, **TWO_NODES},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert result.returncode == 75
    assert "told\nbye\n" in result.stderr
    assert "stopped by SIGTERM, not requeued" in result.stderr


@pytest.mark.parametrize("line", [LOST, MISSING])
@pytest.mark.parametrize("ending", ["Exited with exit code 75", "Killed"])
def test_a_lost_or_missing_worker_requeues_the_job(node: Node, line: str, ending: str) -> None:
    node.install("podman")
    killed = ENDED_BY.format("n8: task 1", ending)
    node.srun_says(killed, line, *exited(75), code=137)
    result = node.run(**TWO_NODES)
    code = 137 if ending == "Killed" else 75
    assert result.returncode == code
    assert f"a worker was lost or missing (exit code {code}); requeueing (1 of" in result.stderr
    assert node.requests() == ["requeue Incomplete 41"]
    assert record(node).read_text() == "worker in attempt 0\n"


@pytest.mark.parametrize(
    ("lines", "srun", "requeued"),
    [
        ([LOST, *exited(75, 2)], 75, None),
        ([LOST, *exited(75, 127)], 127, None),
        ([LOST, *exited(75, 1)], 75, "defect"),
        ([ENDED_BY.format("n8: task 1", "Segmentation fault"), *exited(75)], 139, "defect"),
        ([ENDED_BY.format("n8: task 1", "Killed")], 137, "defect"),
        ([*exited(75), ENDED_BY.format("n8: task 1", "Killed")], 137, None),
        # Of a step with a killed task srun may drop the last words.
        ([ENDED_BY.format("n8: task 1", "Killed"), *exited(75)], 137, "worker"),
        (exited(75, 75), 75, None),
        (["stopped: lost worker"], 75, None),
    ],
)
def test_what_no_lost_worker_explains_is_treated_as_before(
    node: Node, lines: list[str], srun: int, requeued: str | None
) -> None:
    node.install("podman")
    node.srun_says(*lines, code=srun)
    node.run(**TWO_NODES)
    assert node.requests() == (["requeue Incomplete 41"] if requeued else [])
    if requeued:
        assert record(node).read_text() == f"{requeued} in attempt 0\n"


@pytest.mark.parametrize(
    ("before", "limit", "message"),
    [
        (5, "50", "requeued itself 5 times (at most 50), 5 times for this cause (at most 5)"),
        (2, "2", "requeued itself 2 times (at most 2), 2 times for this cause (at most 5)"),
        (4, "50", "requeueing (5 of at most 50)"),
    ],
)
def test_lost_workers_are_bounded(node: Node, before: int, limit: str, message: str) -> None:
    node.install("podman")
    node.srun_says(LOST, *exited(75), code=75)
    node.slurm_says(restarts=before)
    record(node).parent.mkdir(parents=True)
    record(node).write_text("".join(f"worker in attempt {n}\n" for n in range(before)))
    result = node.run(MAX_REQUEUES=limit, **TWO_NODES)
    assert message in result.stderr
    assert node.requests() == (["requeue Incomplete 41"] if "requeueing" in message else [])


def test_at_the_time_limit_several_nodes_are_requeued_for_that(node: Node) -> None:
    node.install("podman")
    node.srun_sends("USR1")
    result = node.run(**TWO_NODES)
    assert result.returncode == 75
    assert "stopped for the time limit; requeueing (1 of at most 50)" in result.stderr
    assert record(node).read_text() == "time in attempt 0\n"


@pytest.mark.parametrize(
    ("lines", "excluded"),
    [
        ([EXITED.format("n8: task 1", 3), *exited(75)], "n8"),
        ([EXITED.format("n8: task 1", 3), EXITED.format("n9: task 2", 3)], "n8,n9"),
    ],
)
def test_of_several_nodes_those_without_a_gpu_are_excluded(
    node: Node, lines: list[str], excluded: str
) -> None:
    node.install("podman")
    node.put("sinfo", "#!/bin/bash\nprintf 'n%d\\n' 7 8 9 10\n")
    node.srun_says(*lines, code=75)
    result = node.run(**TWO_NODES)
    assert result.returncode == 3
    assert f"a GPU is missing on node {excluded}; requeueing" in result.stderr
    assert node.requests() == [
        "requeuehold Incomplete 41",
        f"update JobId=41 ExcNodeList={excluded}",
        "release 41",
    ]


def test_several_nodes_go_nowhere_where_too_few_are_left(node: Node) -> None:
    node.install("podman")
    node.srun_says(EXITED.format("n8: task 1", 3), code=3)
    result = node.run(**TWO_NODES)
    assert "a GPU is missing on node n8, and the job has no other to go to than n8" in result.stderr
    assert node.requests() == []


def test_a_node_that_srun_does_not_name_is_not_guessed(node: Node) -> None:
    node.install("podman")
    node.srun_says(code=3)
    result = node.run(**TWO_NODES)
    assert result.returncode == 3
    assert "srun has not said on which node" in result.stderr
    assert node.requests() == []
