"""The README is executed and compared with the program, so that it cannot rot."""

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

README = (REPOSITORY / "README.md").read_text()


def section(heading: str) -> str:
    text = README.split(f"\n{heading}\n", 1)[1]
    return re.split(r"\n#{2,3} ", text, maxsplit=1)[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


# What the table says where the default is no text or number.
NO_VALUE = {"all", "never", "none", "the scheduler's job", "that of `--output-dir`"}


def documented_default(option: click.Option) -> set[str]:
    """The texts by which a default may be documented."""
    default = option.to_info_dict()["default"]
    if default is None:
        return NO_VALUE
    if default is False:
        return {"off"}
    if default == CIFAR10_URL:
        return {"the official address"}
    return {f"{default:g}"} if isinstance(default, int | float) else {f"`{default}`"}


def test_every_option_is_documented_with_its_variable_and_default() -> None:
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)` \| `(JOB_[A-Z0-9_]+)` \| (.*?) \|", README, re.MULTILINE
    )
    documented = {name: (variable, default) for name, variable, default in rows}
    assert len(documented) == len(rows)
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


def test_the_table_of_train_has_the_fields_of_its_configuration() -> None:
    (table,) = (
        block for block in section("## Commands").split("\n\n") if block.startswith("| option")
    )
    named = set(first_column(table))
    configured = {option_name(field.name) for field in fields(TrainConfig)}
    # How it is said and looked at is no part of what a run is asked to do.
    assert named - configured == {"--expect-mount", "--log-format", "--dry-run"}
    assert configured <= named
    assert named == {parameter.opts[0] for parameter in train.params}


def test_every_metric_is_documented() -> None:
    documented = first_column(section("## Watching a run"))
    assert documented == [f"cifar10_job_{name}" for name in (*GAUGES, "info", "phase", "state")]


def test_completion_works_as_documented(tmp_path: Path) -> None:
    lines = re.findall(r"^.*_CIFAR10_JOB_COMPLETE=.*$", README, re.MULTILINE)
    program = tmp_path / "cifar10-job"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m job "$@"\n')
    program.chmod(0o755)
    bash, zsh, fish = (line.replace(".venv/bin/cifar10-job", str(program)) for line in lines)

    def said(script: str) -> list[str]:
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
        assert said(f"{bash}\nCOMP_WORDS=(cifar10-job {words})\n{complete}\n{show}") == expected
    # These shells need not be there; this is what they are given.
    assert "compdef _cifar10_job_completion cifar10-job" in "\n".join(
        said(zsh.split('"$(')[1][:-2])
    )
    assert "--command cifar10-job" in "\n".join(said(fish.partition("|")[0]))


def test_every_exit_code_is_documented() -> None:
    codes = re.findall(r"^\| (\d+) \|", section("## Commands"), re.MULTILINE)
    assert [int(code) for code in codes] == [code.value for code in ExitCode]


def test_every_command_is_documented() -> None:
    assert set(first_column(section("## Commands"))) >= set(cli.commands)


def test_artifact_tables_name_what_the_program_writes(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    add_evaluation(output)
    line, *_ = (output.path / "metrics.jsonl").read_text().splitlines()
    assert first_column(section("### `metrics.jsonl`")) == list(json.loads(line))
    evaluation = json.loads((output.path / "evaluation.json").read_text())
    assert first_column(section("### `evaluation.json`")) == list(evaluation)
    manifest = json.loads((output.path / "run.json").read_text())
    assert first_column(section("### `run.json`")) == [*manifest, *manifest["attempts"][0]]
    kept = [field.name for field in fields(Predictions)]
    assert first_column(section("### `report.html`")) == kept


def test_every_make_target_named_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9-]+)|^make ([a-z0-9-]+)", README, re.MULTILINE))
    assert {first or second for first, second in named} <= targets
    assert {"demo", "train", "test", "k8s-run"} <= targets


def test_every_file_named_exists() -> None:
    for name in re.findall(r"`((?:job|tests|locks|docs|k8s|slurm)/[^`]*)`|\]\(([^#)]+)\)", README):
        assert (REPOSITORY / (name[0] or name[1])).exists(), name


def test_every_overlay_is_documented() -> None:
    overlays = sorted(folder.name for folder in (REPOSITORY / "k8s" / "overlays").iterdir())
    assert first_column(section("## Kubernetes")) == overlays


# Where the commands of the README are run, by how they begin, and how that file calls them. GPUs,
# clusters and package sources are stood in for where the gate has none.
RUN_BY = {
    "make demo": (".ci/run", "make demo"),
    "make train": ("tests/docs/test_readme.py", '"make", "train"'),
    "make install": (".ci/run", "make install"),
    "mkdir -p output data": ("tests/integration/test_image.py", "README.md"),
    "docker run": ("tests/integration/test_image.py", "README.md"),
    ".venv/bin/cifar10-job": ("tests/docs/test_readme.py", "commands()"),
    'eval "$(_CIFAR10_JOB_COMPLETE': ("tests/docs/test_readme.py", "_CIFAR10_JOB_COMPLETE"),
    "_CIFAR10_JOB_COMPLETE": ("tests/docs/test_readme.py", "_CIFAR10_JOB_COMPLETE"),
    "kubectl apply -f k8s/job.yaml": ("tests/integration/test_kube_play.py", '"play"'),
    "kubectl apply -k k8s/overlays/multi-node": ("tests/k8s/test_manifests.py", "MULTI_NODE"),
    "make k8s-fetch": ("tests/k8s/test_targets.py", '"k8s-fetch"'),
    "sbatch slurm/train.sh": ("tests/integration/test_slurm.py", "sbatch"),
    "TF_CONFIG=": ("tests/integration/test_workers.py", "TF_CONFIG="),
    "sbatch --nodes=2 slurm/train.sh": ("tests/integration/test_multi_node.py", '"--nodes=2"'),
}


def every_command() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def commands() -> list[str]:
    return [line for line in every_command() if line.startswith(".venv/bin/cifar10-job")]


def test_every_command_is_run_somewhere() -> None:
    for command in every_command():
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
    # Its 50 epochs are left out; everything before the first of them is looked at.
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
    """Run make with a stand-in for the installed program and no other programs than a shell's."""
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


def test_make_passes_options_on_and_refuses_variables_that_it_does_not_have(tmp_path: Path) -> None:
    passed = run_make(tmp_path, "train", "ARGS=--epochs 3 --seed 7", script='echo "given $*"')
    assert passed.returncode == 0, passed.stderr
    assert re.search("^given train .* --epochs 3 --seed 7$", passed.stdout, re.MULTILINE)
    refused = run_make(tmp_path, "train", "EPOCHS=3", script="echo started")
    assert refused.returncode == 2
    assert "received EPOCHS, which is no variable of this Makefile" in refused.stderr
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
    assert "make: exit code 75 is no failure: run the same command again to" in stopped.stderr
    failed = run_make(tmp_path, "train", script="exit 2")
    assert "stopped" not in failed.stderr
    for target, program in (
        *((target, "docker") for target in ("image", "docker-run", "push")),
        *((target, "kubectl") for target in ("k8s-run", "k8s-fetch")),
    ):
        result = run_make(tmp_path, target, "IMAGE=registry/image:1")
        assert result.returncode == 2
        first = result.stderr.splitlines()[0]
        assert first.startswith(f"{program} is not there, which make {target} needs; install it")


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

    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = f"{snippet}\nassert model.output_shape == (None, 10)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True)
