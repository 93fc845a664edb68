"""The README is executed and compared with the program, so that it cannot rot."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from job.cli import cli
from job.cluster import RunIdentity
from job.config import ExitCode, TrainConfig
from job.evaluate import Evaluation
from job.manifest import RunManifest
from job.output import OutputDir
from tests.conftest import REPOSITORY
from tests.test_train import METRICS_KEYS

README = (REPOSITORY / "README.md").read_text()


def section(heading: str) -> str:
    text = README.split(f"\n{heading}\n", 1)[1]
    return re.split(r"\n#{2,3} ", text, maxsplit=1)[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_option_is_documented_with_its_variable() -> None:
    rows = re.findall(r"^\| `--([a-z0-9-]+)` \| `(JOB_[A-Z0-9_]+)` \|", README, re.MULTILINE)
    options = {
        option.opts[0].removeprefix("--"): option.envvar
        for command in cli.commands.values()
        for option in command.params
        if getattr(option, "envvar", None)
    }
    assert dict(rows) == options


def test_every_command_is_documented() -> None:
    named = re.findall(r"^\| `([a-z]+)` \| [^`]", section("## Commands"), re.MULTILINE)
    assert sorted(named) == sorted(cli.commands)


def test_every_exit_code_is_documented() -> None:
    codes = re.findall(r"^\| (\d+) \|", section("## Commands"), re.MULTILINE)
    assert [int(code) for code in codes] == [code.value for code in ExitCode]


def test_artifact_tables_name_what_the_program_writes(tmp_path: Path) -> None:
    assert first_column(section("### `metrics.jsonl`")) == METRICS_KEYS
    evaluation = Evaluation(0.0, np.eye(2, dtype=np.int64)).document(("a", "b"))
    keys = [*evaluation, "model", "model_sha256"]
    assert first_column(section("### `evaluation.json`")) == keys
    manifest = RunManifest(OutputDir(tmp_path), RunIdentity(None))
    manifest.begin(TrainConfig())
    written = json.loads((tmp_path / "run.json").read_text())
    assert first_column(section("### `run.json`")) == [*written, *written["attempts"][0]]


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


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(".venv/bin/python")]


def test_commands_run_and_the_model_loads_as_shown(tmp_path: Path) -> None:
    # `make demo` runs in the gate, and `make train` is the real job's 50 epochs.
    assert len(commands()) == 5
    for command in commands():
        words = shlex.split(command)
        result = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr

    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    snippet = snippet.replace("output/demo/", "output/try/")  # where the commands above wrote
    check = f"{snippet}\nassert model.output_shape == (None, 10)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True)
