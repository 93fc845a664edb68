"""The pages are executed and compared with the program, so that they stay correct."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from job.commands.cli import cli, train
from job.config import CIFAR10_URL, ExitCode, TrainConfig, option_name
from job.run.predictions import Predictions
from job.training.prometheus import GAUGES
from tests.conftest import REPOSITORY
from tests.run_folders import add_evaluation, make_run

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for folder in (".", "docs", "slurm")
    for path in sorted((REPOSITORY / folder).glob("*.md"))
}
README = PAGES["README.md"]
OPTIONS = PAGES["docs/options.md"]
ARTIFACTS = PAGES["docs/artifacts.md"]


def section(page: str, heading: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    text = page.split(f"\n## {heading}\n", 1)[1]
    return text.split("\n## ", 1)[0]


def first_column(text: str) -> list[str]:
    """The names in code letters that begin the rows of tables."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


# The table's text if the default is not a text or number.
NO_VALUE = {"all", "never", "none", "the scheduler's job", "the one in `--output-dir`"}


def documented_default(option: click.Option) -> set[str]:
    """The texts that may document a default."""
    default = option.to_info_dict()["default"]
    if default is None:
        return NO_VALUE
    if default is False:
        return {"off"}
    if default == CIFAR10_URL:
        return {"the official address"}
    return {f"{default:g}"} if isinstance(default, int | float) else {f"`{default}`"}


def documented_options(page: str) -> dict[str, tuple[str, str]]:
    """Variable and default of each option in a page's tables."""
    rows = re.findall(r"^\| `(--[a-z0-9-]+)` \| `(JOB_[A-Z0-9_]+)` \| (.*?) \|", page, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (variable, default) for name, variable, default in rows}


def test_every_option_is_documented_with_its_variable_and_default() -> None:
    documented = documented_options(OPTIONS + PAGES["docs/predict.md"])
    options = [
        option
        for command in cli.commands.values()
        for option in command.params
        if isinstance(option, click.Option) and option.envvar
    ]
    assert documented.keys() == {option.opts[0] for option in options}
    for option in options:
        variable, default = documented[option.opts[0]]
        assert option.envvar == variable
        assert default in documented_default(option), option.opts


def test_the_readmes_eight_options_are_documented_as_elsewhere() -> None:
    eight = documented_options(README)
    assert len(eight) == 8
    assert eight.items() <= documented_options(OPTIONS).items()


def test_the_table_of_train_has_the_fields_of_its_configuration() -> None:
    named = documented_options(OPTIONS).keys()
    configured = {option_name(field.name) for field in fields(TrainConfig)}
    # These concern the output of the command, and not the run.
    assert named - configured == {"--expect-mount", "--log-format", "--dry-run"}
    assert configured <= named
    assert named == {parameter.opts[0] for parameter in train.params}


def test_every_metric_is_documented() -> None:
    documented = first_column(section(PAGES["docs/monitoring.md"], "Prometheus"))
    assert documented == [f"cifar10_job_{name}" for name in (*GAUGES, "info", "phase", "state")]


def test_completion_works_as_documented(tmp_path: Path) -> None:
    lines = re.findall(r"^.*_CIFAR10_JOB_COMPLETE=.*$", OPTIONS, re.MULTILINE)
    program = tmp_path / "cifar10-job"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m job "$@"\n')
    program.chmod(0o755)
    bash, zsh, fish = (line.replace(".venv/bin/cifar10-job", str(program)) for line in lines)

    def run_bash(script: str) -> list[str]:
        command = ["bash", "-euc", script]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    complete = "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _cifar10_job_completion " + str(program)
    show = 'printf "%s\\n" "${COMPREPLY[@]}"'
    for words, expected in (
        ("train --prec", ["--precision"]),
        ("train --precision ''", ["auto", "float32", "bfloat16"]),
    ):
        assert run_bash(f"{bash}\nCOMP_WORDS=(cifar10-job {words})\n{complete}\n{show}") == expected
    # These shells need not be installed; this is the text that they receive.
    assert "compdef _cifar10_job_completion cifar10-job" in "\n".join(
        run_bash(zsh.split('"$(')[1][:-2])
    )
    assert "--command cifar10-job" in "\n".join(run_bash(fish.partition("|")[0]))


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_every_exit_code_is_documented(page: str) -> None:
    codes = re.findall(r"^\| (\d+) \|", section(PAGES[page], "Exit codes"), re.MULTILINE)
    assert [int(code) for code in codes] == [code.value for code in ExitCode]


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_every_command_is_documented(page: str) -> None:
    table = PAGES[page].split("| does |\n", 1)[1].partition("\n\n")[0]
    assert set(first_column(table)) == set(cli.commands)


def test_artifact_tables_name_what_the_program_writes(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    add_evaluation(output)
    line, *_ = (output.path / "metrics.jsonl").read_text().splitlines()
    assert first_column(section(ARTIFACTS, "`metrics.jsonl`")) == list(json.loads(line))
    evaluation = json.loads((output.path / "evaluation.json").read_text())
    assert first_column(section(ARTIFACTS, "`evaluation.json`")) == list(evaluation)
    manifest = json.loads((output.path / "run.json").read_text())
    documented = first_column(section(ARTIFACTS, "`run.json`"))
    assert documented == [*manifest, *manifest["attempts"][0]]
    kept = [field.name for field in fields(Predictions)]
    assert first_column(section(ARTIFACTS, "`predictions.npz`")) == kept


def documented_files(text: str) -> set[str]:
    """The names in the page's table of the output folder."""
    table = text.split("| in the output folder | content |\n", 1)[1].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[1:]]
    return {name for cell in cells for name in re.findall(r"`([^`/]+)/?`", cell)}


def test_the_readmes_files_are_documented_as_elsewhere() -> None:
    files = documented_files(README)
    assert len(files) == 9
    assert files <= documented_files(ARTIFACTS)


def test_every_make_target_named_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    text = "\n".join(PAGES.values())
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named <= targets
    assert {"demo", "train", "test", "k8s-run", "bench-workers"} <= named


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub generates them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_heading_named_exists(name: str) -> None:
    for path in re.findall(r"`((?:job|tests|locks|docs|k8s|slurm)/[\w./-]+)`", PAGES[name]):
        assert "NAME" in path or path in MADE or (REPOSITORY / path).exists(), path
    for link, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", PAGES[name]):
        target = ((REPOSITORY / name).parent / link).resolve() if link else REPOSITORY / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}#{anchor}"


# Files that the reader creates by following a page.
MADE = {"job/data/leaves.py", "job/recipes/leafnet.py", "slurm/site.sh"}


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)}
    assert PAGES.keys() - {"README.md"} <= linked


def test_every_overlay_is_documented() -> None:
    overlays = sorted(folder.name for folder in (REPOSITORY / "k8s" / "overlays").iterdir())
    assert first_column(section(PAGES["docs/kubernetes.md"], "Overlays")) == overlays


def test_the_map_of_the_code_names_every_package() -> None:
    text = section(README, "Map of the code")
    packages = [path.parent.name for path in (REPOSITORY / "job").glob("*/__init__.py")]
    assert set(first_column(text)) == {*(f"{package}/" for package in packages), "*.py"}
    for module in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (REPOSITORY / "job" / module).exists(), module


# For the first words of each documented command: the file that runs it, and the call in that file.
# Stubs replace GPUs, clusters and package sources that the gate does not have.
RUN_BY = {
    "make demo": (".ci/run", "make demo"),
    "make train": ("tests/docs/test_pages.py", '"make", "train"'),
    "make install": (".ci/run", "make install"),
    "mkdir -p output data": ("tests/integration/test_image.py", "README.md"),
    "docker run": ("tests/integration/test_image.py", "docs/container.md"),
    "podman save": ("tests/integration/containers.py", "podman save"),
    "apptainer build": ("tests/integration/containers.py", "apptainer build"),
    ".venv/bin/cifar10-job": ("tests/docs/test_pages.py", "commands()"),
    'eval "$(_CIFAR10_JOB_COMPLETE': ("tests/docs/test_pages.py", "_CIFAR10_JOB_COMPLETE"),
    "_CIFAR10_JOB_COMPLETE": ("tests/docs/test_pages.py", "_CIFAR10_JOB_COMPLETE"),
    "kubectl apply -f k8s/job.yaml": ("tests/integration/test_kube_play.py", '"play"'),
    "kubectl apply -k k8s/overlays/multi-node": ("tests/k8s/test_manifests.py", "MULTI_NODE"),
    "make k8s-fetch": ("tests/k8s/test_targets.py", '"k8s-fetch"'),
    "sbatch slurm/train.sh": ("tests/integration/test_slurm.py", "sbatch"),
    "TF_CONFIG=": ("tests/integration/test_workers.py", "TF_CONFIG="),
    "sbatch --nodes=2 slurm/train.sh": ("tests/integration/test_multi_node.py", '"--nodes=2"'),
}
# Their page states that they are not tested.
UNTESTED = ("enroot import",)


def every_command() -> list[str]:
    # The tests of these two pages run all of their commands.
    others = ("docs/make-it-yours.md", "slurm/README.md")
    text = "\n".join(page for name, page in PAGES.items() if name not in others)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def commands() -> list[str]:
    """The program's commands in the order of the pages; those of the README need only the demo."""
    return [line for line in every_command() if line.startswith(".venv/bin/cifar10-job")]


def test_every_command_is_run_somewhere() -> None:
    for command in every_command():
        if command.startswith(UNTESTED):
            continue
        (start,) = [start for start in RUN_BY if command.startswith(start)]
        file, call = RUN_BY[start]
        assert call in (REPOSITORY / file).read_text(), command


@pytest.mark.slow
def test_make_train_is_the_real_job(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "cifar10-job"):
        (venv / "bin" / name).symlink_to(Path(sys.executable).with_name(name))
    for lock in ("cpu", "gpu"):
        (venv / f".{lock}").touch()
    # A dry run checks everything before the first of the 50 epochs.
    environ = {"JOB_DRY_RUN": "1", "JOB_DATA_DIR": str(tmp_path), "JOB_DEVICES": "cpu:1"}
    environ |= {"JOB_OUTPUT_DIR": str(tmp_path / "output"), "PATH": os.environ["PATH"]}
    command = ["make", "train", f"VENV={venv}"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=True
    )
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["config"]["dataset"], report["config"]["recipe"]) == ("cifar10", "classic")
    assert report["batch"]["total_steps"] == 9750
    assert not (tmp_path / "output").exists()


def run_make(folder: Path, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run make with a stand-in for the installed program, and with only basic programs on PATH."""
    for name in ("venv/bin", "bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for lock in ("cpu", "gpu"):
        (folder / "venv" / f".{lock}").touch()
    for name in ("python", "cifar10-job"):
        program = folder / "venv" / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}")
        program.chmod(0o755)
    for name in ("make", "sh", "sed", "grep", "git"):
        found = shutil.which(name)
        assert found
        (folder / "bin" / name).unlink(missing_ok=True)
        (folder / "bin" / name).symlink_to(found)
    command = [
        str(folder / "bin" / "make"),
        *arguments,
        f"VENV={folder}/venv",
        f"DATA_DIR={folder}",
    ]
    environ = {"PATH": str(folder / "bin")}
    return subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True)


def test_make_passes_options_on_and_refuses_unknown_variables(tmp_path: Path) -> None:
    passed = run_make(tmp_path, "train", "ARGS=--epochs 3 --seed 7", script='echo "given $*"')
    assert passed.returncode == 0, passed.stderr
    assert re.search("^given train .* --epochs 3 --seed 7$", passed.stdout, re.MULTILINE)
    refused = run_make(tmp_path, "train", "EPOCHS=3", script="echo started")
    assert refused.returncode == 2
    assert "received EPOCHS, which is not a variable of this Makefile" in refused.stderr
    assert 'make train ARGS="--epochs 3"' in refused.stderr
    assert "started" not in refused.stdout
    assert run_make(tmp_path, "train", "epochs=3").returncode == 2
    for name in ("JOB_EPOCHS", "JOB_TEST_DATA", "CUDA_VISIBLE_DEVICES", "KUBECONFIG", "SHELL"):
        value = "/bin/sh" if name == "SHELL" else "3"
        given = run_make(tmp_path, "train", f"{name}={value}", script=f'echo "{name} is ${name}"')
        assert f"{name} is {value}\n" in given.stdout, given.stderr
    container = ("docker-run", "--dry-run", "IMAGE=image:1")
    assert re.search(r" image:1 +\|\|", run_make(tmp_path, *container).stdout)
    assert (
        " image:1 train --epochs 3 ||" in run_make(tmp_path, *container, "ARGS=--epochs 3").stdout
    )
    ignored = run_make(tmp_path, "k8s-run", "ARGS=--epochs 3")
    assert (ignored.returncode, "received ARGS, which only these" in ignored.stderr) == (2, True)


def test_make_explains_a_stop_and_a_missing_program(tmp_path: Path) -> None:
    stopped = run_make(tmp_path, "train", script="exit 75")
    assert "make: exit code 75 is not a failure: run the same command again to" in stopped.stderr
    failed = run_make(tmp_path, "train", script="exit 2")
    assert "stopped" not in failed.stderr
    for target, program in (
        *((target, "docker") for target in ("image", "docker-run", "push")),
        *((target, "kubectl") for target in ("k8s-run", "k8s-fetch")),
    ):
        result = run_make(tmp_path, target, "IMAGE=registry/image:1")
        assert result.returncode == 2
        first = result.stderr.splitlines()[0]
        problem = f"make {target} needs {program}, which is not installed"
        assert first.startswith(f"{problem}; install it")


def demo() -> list[str]:
    """The commands of ``make demo``, which the gate runs in full."""
    makefile = (REPOSITORY / "Makefile").read_text().replace("\\\n", "")
    recipe = re.split(r"^demo:.*\n", makefile, flags=re.MULTILINE)[1].partition("\n\n")[0]
    commands = re.findall(r"\$\(BIN\)/((?:python|cifar10-job) .*)$", recipe, re.MULTILINE)
    return [
        command.replace("$(DEMO_DIR)", "output/demo").removesuffix(" $(ARGS)) $(EXPLAIN)")
        for command in commands
    ]


@pytest.mark.slow
def test_commands_run_and_the_model_loads_as_shown(tmp_path: Path) -> None:
    # `make train` is the real job's 50 epochs.
    assert len(commands()) == 11
    for command in (*demo(), *commands()):
        words = shlex.split(command)
        if words[-1].startswith("output/demo") and "train" in words:
            words += ["--limit", "2560", "--epochs", "1"]  # the demo takes longer
        result = subprocess.run(
            [Path(sys.executable).with_name(Path(words[0]).name), *words[1:]],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr

    left = {path.name for path in (tmp_path / "output" / "demo").iterdir()}
    assert left - {"test-images", "grid.png"} <= documented_files(ARTIFACTS)

    (snippet,) = re.findall(r"```python\n(.*?)```", ARTIFACTS, re.DOTALL)
    check = f"{snippet}\nassert model.output_shape == (None, 10)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True)
