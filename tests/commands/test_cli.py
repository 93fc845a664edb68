import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from job import __version__, log
from job.cluster import Environment
from job.commands.cli import cli, main, train
from job.config import (
    DeviceRequest,
    GpuMissingError,
    JobError,
    StoppedError,
    TrainConfig,
    UserError,
    option_name,
    run_options,
)
from job.run.checkpoint import Checkpoint, CheckpointStore, History
from job.run.fingerprint import Fingerprint
from job.run.folder import OutputDir
from job.run.stop import StopRequest
from tests.conftest import REPOSITORY, RunJob

# Every option with a value that differs from its default.
OTHERS = TrainConfig(
    output_dir=Path("elsewhere"),
    data_dir=Path("images"),
    dataset="synthetic",
    cifar10_url="https://mirror/c.tar.gz",
    seed=7,
    recipe="fast",
    epochs=3,
    batch_size=96,
    learning_rate=0.5,
    limit=512,
    precision="bfloat16",
    jit="off",
    deterministic="on",
    devices=DeviceRequest("cpu:2"),
    require_gpus=2,
    join_timeout=30.5,
    stall_timeout=60.5,
    checkpoint_every=0.5,
    stop_after=1.5,
    fresh=True,
    run_id="mine",
    compile_cache=Path("code"),
    tensorboard=True,
    metrics_textfile=Path("job.prom"),
)
FIELDS = [field.name for field in fields(TrainConfig)]
TEXTS = {name: str(getattr(OTHERS, name)) for name in FIELDS}


def values_of(config: TrainConfig) -> list[tuple[str, type, Any]]:
    values = [(name, getattr(config, name)) for name in FIELDS]
    return [(name, type(value), value) for name, value in values]


def parse(*arguments: str) -> TrainConfig:
    params = train.make_context("train", [*arguments]).params
    return TrainConfig(**{name: params[name] for name in FIELDS})


def test_every_config_field_is_an_option_of_train_with_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in FIELDS:
        monkeypatch.delenv(f"JOB_{name.upper()}", raising=False)
    assert values_of(parse()) == values_of(TrainConfig())
    # A new option needs another value above.
    assert not [one for one in values_of(OTHERS) if one in values_of(TrainConfig())]
    arguments = []
    for name, kind, _ in values_of(OTHERS):
        arguments += [option_name(name)] if kind is bool else [option_name(name), TEXTS[name]]
    assert values_of(parse(*arguments)) == values_of(OTHERS)
    for name, text in TEXTS.items():
        monkeypatch.setenv(f"JOB_{name.upper()}", text)
    assert values_of(parse()) == values_of(OTHERS)


def test_a_recipe_sets_the_defaults_of_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = TrainConfig(recipe="fast", epochs=8, batch_size=2000, learning_rate=0.24)
    assert parse("--recipe", "fast") == fast
    assert parse("--epochs", "3", "--recipe", "fast") == replace(fast, epochs=3)
    # A given value counts even if it equals the default of another recipe.
    assert parse("--recipe", "fast", "--batch-size", "256") == replace(fast, batch_size=256)
    monkeypatch.setenv("JOB_RECIPE", "fast")
    monkeypatch.setenv("JOB_LEARNING_RATE", "0.1")
    assert parse() == replace(fast, learning_rate=0.1)
    assert parse("--recipe", "classic") == replace(TrainConfig(), learning_rate=0.1)
    for arguments in (["train", "--help"], ["train", "--recipe", "classic", "--help"]):
        text = " ".join(CliRunner().invoke(cli, arguments).output.split())
        assert "default: 50 (fast: 8);" in text
        assert "default: 256 (fast: 2000);" in text
        assert "default: 0.0001 (fast: 0.24);" in text


def test_help_lists_commands_exit_codes_variables_and_ranges() -> None:
    runner = CliRunner()
    text = " ".join(runner.invoke(cli, ["--help"]).output.split())
    for word in (*cli.commands, "3 a GPU is missing"):
        assert word in text
    text = " ".join(runner.invoke(cli, ["train", "--help"]).output.split())
    for name in FIELDS:
        assert f" {option_name(name)} " in text
        assert f"JOB_{name.upper()}" in text
    assert "x>0]" in text
    assert "inf" not in text
    assert __version__ in runner.invoke(cli, ["--version"]).output


def test_help_and_completion_do_not_import_slow_libraries() -> None:
    script = """if True:
        import json, sys
        from click.shell_completion import ShellComplete
        from job.commands.cli import cli

        for command in ([], *([name] for name in cli.commands)):
            cli.main([*command, "--help"], standalone_mode=False)
        complete = ShellComplete(cli, {}, "cifar10-job", "_COMPLETE").get_completions
        given = json.loads(sys.argv[1])
        print(json.dumps([[item.value for item in complete(*words)] for words in given]))
        print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
    """
    given = [[[], ""], [["train"], "--prec"], [["train", "--precision"], ""]]
    given.append([["train", "--dataset"], "syn"])
    command = [sys.executable, "-c", script, json.dumps(given)]
    result = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    completed, modules = map(json.loads, result.stdout.splitlines()[-2:])
    assert {*completed[0]} == {*cli.commands} >= {"train", "evaluate", "doctor"}
    assert completed[1:] == [["--precision"], ["auto", "float32", "bfloat16"], ["synthetic"]]
    assert not {"tensorflow", "keras", "numpy", "matplotlib", "PIL"} & {*modules}


def test_tensorflow_is_loaded_without_matplotlib_which_can_still_be_imported_later() -> None:
    script = """if True:
        import sys
        from job.commands.cli import load_tensorflow

        load_tensorflow()
        assert "keras" in sys.modules and "matplotlib" not in sys.modules
        import job.report.pictures
    """
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_letters_missing_in_the_output_encoding_are_escaped(
    whole: OutputDir, run_job: RunJob
) -> None:
    folder = whole.path.rename(whole.path.with_name("größe\udcff"))
    result = run_job(*("report", folder, "--log-format", "text"), env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    shown = rf"{folder.parent}/gr\xf6\xdfe\udcff/report.html"
    assert result.stdout.split(" ", 1)[1] == f"report in {shown}\n"


@pytest.mark.slow
def test_closed_streams_and_the_users_keras_settings_have_no_effect(
    model_output: OutputDir, tmp_path: Path
) -> None:
    settings = {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "job", "predict", "-", "--output-dir"]
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command, str(model_output.path)],
        cwd=REPOSITORY,
        env={**os.environ, "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "jax"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    message = "cannot read -: the file is empty; pass an image, or a folder with images"
    assert (result.returncode, result.stderr) == (2, f"cifar10-job: error: {message}\n")


RunMain = Callable[..., tuple[object, list[str]]]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunMain:
    """Run the program in this process; return its exit code and its error lines."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        stderr = io.StringIO()
        with pytest.raises(SystemExit) as ending:
            main(StopRequest(), stderr)
        return ending.value.code, stderr.getvalue().splitlines()

    return run


@pytest.mark.parametrize(
    ("users", "begun", "expected"),
    [
        (None, "a new run", "1"),
        ("0", "a new run", "0"),
        (None, {}, None),
        (None, {"TF_ENABLE_ONEDNN_OPTS": "1"}, "1"),
        ("1", {}, "1"),
    ],
)
def test_a_run_resumes_with_its_onednn_setting(
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    users: str | None,
    begun: str | dict[str, str],
    expected: str | None,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if users:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", users)
    if isinstance(begun, dict):
        environment = Environment("cpu", [], 1, 2, "float32", "auto", True, {}, None, begun)
        fingerprint = Fingerprint({**run_options(TrainConfig())}, environment)
        Path("output").mkdir()
        store = CheckpointStore(OutputDir(Path("output")))
        store.save(Checkpoint(1, {}, fingerprint, History()))
    values: list[str | None] = []

    def train(*_: Any) -> None:
        values.append(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))

    monkeypatch.setattr("job.training.train.run_attempt", train)
    assert run_main("train") == (0, [])
    assert values == [expected]


BAD_OPTIONS = [
    ("--epochs 0", "'--epochs' (env var: 'JOB_EPOCHS'): received '0', expected a whole number fro"),
    ("--epochs -3", "'--epochs'"),
    ("--epochs many", "received 'many', expected a whole number from 1."),
    ("--batch-size -256", "'--batch-size'"),
    ("--learning-rate -0.1", "'--learning-rate'"),
    ("--learning-rate nan", "received 'nan', expected a finite number above 0."),
    ("--learning-rate inf", "received 'inf', expected a finite number above 0."),
    ("--learning-rate fast", "received 'fast', expected a finite number above 0."),
    ("--seed -1", "received '-1', expected a whole number from 0 to 2,147,483,647."),
    ("--limit 0", "'--limit'"),
    ("--stall-timeout 0", "'--stall-timeout'"),
    ("--join-timeout 604801", "'604801', expected a number above 0, at most 604,800."),
    ("--checkpoint-every 0", "'--checkpoint-every'"),
    ("--stop-after soon", "received 'soon', expected a finite number above 0."),
    ("--deterministic yes", "received 'yes', expected auto, on or off."),
    ("--recipe modern", "received 'modern', expected classic or fast."),
    ("--dataset mnist", "received 'mnist', expected cifar10 or synthetic."),
    ("--precision float16", "received 'float16', expected auto, float32 or bfloat16."),
    ("--devices tpu:1", "expected auto, cpu:N or gpu:N"),
    ("--require-gpus -1", "'--require-gpus'"),
    ("--metrics-textfile job.txt", "received 'job.txt', expected a name that ends in .prom"),
    ("--metrics-textfile /", "received '/', expected a file"),
    ("--epoch 3", "No such option '--epoch'. Did you mean --epochs?"),
    ("--lr 3", "No such option '--lr'. Did you mean --learning-rate?"),
    ("--batch 3", "No such option '--batch'. Did you mean --batch-size?"),
    ("--hidden 3", "No such option '--hidden'."),
]


def test_a_bad_option_causes_one_error_line_and_exit_code_2(
    run_main: RunMain, tmp_path: Path
) -> None:
    for arguments, message in BAD_OPTIONS:
        exit_code, lines = run_main("train", *arguments.split())
        assert (exit_code, len(lines)) == (2, 1), arguments
        assert lines[0].startswith("cifar10-job: error: ")
        assert message in lines[0]
        assert "Did you mean" not in lines[0].removesuffix(message)
        assert "after the command" not in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_an_option_before_the_command_causes_one_error_line_and_one_event(run_job: RunJob) -> None:
    result = run_job("--epochs", "3")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "No such option '--epochs'. Options go after the command: train --epochs 3." in line
    (event,) = result.stdout.splitlines()
    assert json.loads(event)["exit_code"] == 2


def test_help_is_printed_without_a_command(
    run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main() == (2, [])
    output, errors = capsys.readouterr()
    assert (output, errors.splitlines()[0]) == (
        "",
        "Usage: cifar10-job [OPTIONS] COMMAND [ARGS]...",
    )


def test_an_invalid_environment_variable_is_named_in_the_error(
    run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_EPOCHS", "ten")
    exit_code, (line,) = run_main("train")
    assert exit_code == 2
    assert "JOB_EPOCHS" in line
    monkeypatch.delenv("JOB_EPOCHS")
    monkeypatch.setenv("JOB_FRESH", "perhaps")
    _, (line,) = run_main("train")
    assert line.endswith("(env var: 'JOB_FRESH'): received 'perhaps', expected true or false.")


@pytest.mark.parametrize(
    ("command", "misspelt"),
    [
        ("train --log-format text", {"JOB_DATA": "JOB_DATA_DIR", "JOB_OD": "JOB_OUTPUT_DIR"}),
        ("predict a.png", {"JOB_MODELS": "JOB_MODEL"}),
        ("compare a", {"JOB_JSN": "JOB_JSON"}),
    ],
)
def test_a_misspelt_environment_variable_causes_a_warning(
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    misspelt: dict[str, str],
) -> None:
    # Variables of Kubernetes, Jenkins or another program.
    others = "COMPLETION_INDEX SERVICE_HOST NAME URL STATE TMP_DIR INPUT_DIR TIME_LIMIT TIMEOUT"
    for name in ("JOB_DATA_DIR", *misspelt, *(f"JOB_{name}" for name in others.split())):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("JOB_OUTPUT_DIR", "/dev/null/a")  # no command can run there
    run_main(*command.split())
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("warning: ")[2] for line in lines] == [
        f"the environment variable {name} is not an option and is ignored; did you mean {option}?"
        for name, option in misspelt.items()
    ]


@pytest.mark.parametrize(("log_format", "lines"), [("text", 0), ("json", 1), ("nonsense", 1)])
def test_a_usage_error_is_logged_in_the_format_set_by_the_variable(
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log_format: str,
    lines: int,
) -> None:
    monkeypatch.setenv("JOB_LOG_FORMAT", log_format)
    exit_code, errors = run_main("train", "--epoch", "3")
    assert (exit_code, len(errors)) == (2, 1)
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize("arguments", ["", "--lr 3", "/dev/null/a", "a --png /dev/null/a.png"])
@pytest.mark.parametrize("command", ["predict", "compare"])
def test_usage_errors_of_commands_that_print_results_leave_stdout_empty(
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: str,
) -> None:
    monkeypatch.setenv("JOB_LOG_FORMAT", "json")
    exit_code, errors = run_main(command, *arguments.split())
    assert (exit_code, len(errors)) == (2, 1)
    log.event("warning")  # devices can log warnings
    output, events = capsys.readouterr()
    assert (output, events.split()[1:]) == ("", ["warning"])


@pytest.mark.parametrize("command", ["predict", "compare"])
def test_machine_errors_of_commands_that_print_results_leave_stdout_empty(
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("job.commands.cli.require_threads", refuse)
    monkeypatch.setenv("JOB_LOG_FORMAT", "json")
    exit_code, (error,) = run_main(command, "a")
    assert (exit_code, "can't start new thread" in error) == (2, True)
    assert capsys.readouterr().out == ""


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, run_main: RunMain) -> RunMain:
    """Run a command that raises an error, or succeeds."""
    monkeypatch.setenv("JOB_LOG_FORMAT", "json")

    def end(error: BaseException | None) -> tuple[object, list[str]]:
        def callback() -> None:
            if error:
                raise error

        monkeypatch.setitem(cli.commands, "end", click.Command("end", callback=callback))
        return run_main("end")

    return end


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (JobError("the loss\nis not finite"), 1, "error: the loss is not finite"),
        (UserError("use another"), 2, "error: use another"),
        (GpuMissingError("no GPU"), 3, "error: no GPU"),
        (StoppedError("SIGTERM"), 75, "stopped: SIGTERM"),
    ],
)
def test_an_explained_error_is_one_line_and_one_event_with_its_exit_code(
    end: RunMain, capsys: pytest.CaptureFixture[str], error: JobError, exit_code: int, line: str
) -> None:
    assert end(error) == (exit_code, [f"cifar10-job: {line}"])
    event = json.loads(capsys.readouterr().out)
    assert (event["exit_code"], event["event"]) == (exit_code, line.partition(":")[0])
    assert event["level"] == ("warning" if exit_code == 75 else "error")


def test_a_defect_prints_its_traceback_above_the_error_line(end: RunMain) -> None:
    exit_code, (*trace, line) = end(ZeroDivisionError("broken"))
    assert exit_code == 1
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ZeroDivisionError: broken"
    assert line.endswith("this is a defect in the job; report the traceback above")


def test_a_command_that_returns_exits_with_0_and_no_message(
    end: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(None) == (0, [])
    assert capsys.readouterr() == ("", "")
