import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from job import __version__
from job.commands.cli import cli
from tests.conftest import REPOSITORY, RunJob


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_help_lists_the_commands_and_exit_codes(runner: CliRunner) -> None:
    result = runner.invoke(cli, ["--help"])
    assert result.exit_code == 0
    commands = ("train", "evaluate", "report", "predict", "compare", "doctor")
    for text in (*commands, "3 a GPU is missing"):
        assert text in result.output


def test_version(runner: CliRunner) -> None:
    assert __version__ in runner.invoke(cli, ["--version"]).output


@pytest.mark.parametrize(
    "option",
    [
        "output-dir",
        "data-dir",
        "dataset",
        "recipe",
        "epochs",
        "batch-size",
        "learning-rate",
        "seed",
        "limit",
        "precision",
        "jit",
        "devices",
        "require-gpus",
        "deterministic",
        "checkpoint-every",
        "stop-after",
        "fresh",
        "tensorboard",
        "metrics-textfile",
        "dry-run",
        "stall-timeout",
        "run-id",
        "expect-mount",
        "log-format",
    ],
)
def test_train_takes_every_option_from_its_environment_variable_too(
    runner: CliRunner, option: str
) -> None:
    output = runner.invoke(cli, ["train", "--help"]).output
    assert f"--{option} " in output
    assert f"JOB_{option.replace('-', '_').upper()}" in output


@pytest.mark.parametrize("command", ["train", "predict", "compare"])
def test_help_does_not_import_tensorflow(command: str) -> None:
    script = (
        "import sys\nfrom job.cli import cli\n"
        f"try: cli(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'tensorflow', 'keras', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, capture_output=True)


BAD_OPTIONS = [
    (["--epochs", "0"], "'--epochs'"),
    (["--epochs", "-3"], "'--epochs'"),
    (["--epochs", "many"], "'many' is not a valid integer"),
    (["--batch-size", "-256"], "'--batch-size'"),
    (["--learning-rate", "-0.1"], "'--learning-rate'"),
    (["--learning-rate", "nan"], "'--learning-rate'"),
    (["--learning-rate", "inf"], "'--learning-rate'"),
    (["--learning-rate", "fast"], "'fast' is not a valid float"),
    (["--seed", "-1"], "'--seed'"),
    (["--limit", "0"], "'--limit'"),
    (["--stall-timeout", "0"], "'--stall-timeout'"),
    (["--checkpoint-every", "0"], "'--checkpoint-every'"),
    (["--stop-after", "soon"], "'soon' is not a valid float"),
    (["--deterministic", "yes"], "'yes' is not one of 'auto', 'on', 'off'"),
    (["--recipe", "modern"], "'modern' is not 'classic'"),
    (["--dataset", "mnist"], "'mnist' is not one of 'cifar10', 'synthetic'"),
    (["--precision", "float16"], "'float16' is not one of"),
    (["--devices", "tpu:1"], "expected auto, cpu:N or gpu:N"),
    (["--require-gpus", "-1"], "'--require-gpus'"),
    (["--metrics-textfile", "job.txt"], "received 'job.txt', expected a name that ends in .prom"),
    (["--metrics-textfile", "/"], "'--metrics-textfile'"),
    (["--epoch", "3"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_exit_code_2(
    run_job: RunJob, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run_job("train", *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("cifar10-job: error: ")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_environment_variable_is_named(run_job: RunJob) -> None:
    result = run_job("train", env={"JOB_EPOCHS": "ten"})
    assert result.returncode == 2
    assert "JOB_EPOCHS" in result.stderr


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_misspelt_environment_variable_is_warned_of(run_job: RunJob, command: str) -> None:
    misspelt = {"JOB_DATA": "JOB_DATA_DIR", "JOB_SEEDS": "JOB_SEED"}
    # Kubernetes', Jenkins', or of another program.
    others = "COMPLETION_INDEX SERVICE_HOST NAME URL STATE TMP_DIR INPUT_DIR TIME_LIMIT TIMEOUT"
    names = ("JOB_DATA_DIR", *misspelt, *(f"JOB_{name}" for name in others.split()))
    # Where neither finds anything to do.
    no_folder = ("--output-dir", "/dev/null/a", "--log-format", "text")
    result = run_job(command, *no_folder, env=dict.fromkeys(names, "3"))
    assert [line.partition("warning: ")[2] for line in result.stdout.splitlines()] == [
        f"the environment variable {name} is no option and is ignored; did you mean {option}?"
        for name, option in misspelt.items()
    ]


def completions(*words: str) -> list[str]:
    script = (
        "import sys\nfrom job.cli import cli\n"
        "try: cli(prog_name='cifar10-job')\n"
        "except SystemExit: pass\n"
        "assert not {'tensorflow', 'keras', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    environ = {
        "COMP_WORDS": " ".join(("cifar10-job", *words)),
        "COMP_CWORD": str(len(words)),
        "_CIFAR10_JOB_COMPLETE": "bash_complete",
    }
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environ, check=True, capture_output=True, text=True
    )
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_commands_options_and_choices_are_completed_without_tensorflow() -> None:
    assert {"train", "evaluate", "doctor"} <= set(completions(""))
    assert completions("train", "--prec") == ["--precision"]
    assert completions("train", "--precision", "") == ["auto", "float32", "bfloat16"]
    assert completions("train", "--dataset", "syn") == ["synthetic"]
