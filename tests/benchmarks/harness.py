"""Shared code of the benchmarks: options, interleaved rounds, running programs, and results."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from job import log

REPOSITORY = Path(__file__).parents[2]

Record = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])
Side = TypeVar("Side")
Result = TypeVar("Result")


def options(command: Command) -> Command:
    """Add the options of every benchmark: folders (made absolute) and the number of rounds."""
    folder = click.Path(path_type=Path, resolve_path=True)
    for add in (
        click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True),
        click.option("--output-dir", type=folder, required=True),
        click.option("--data-dir", type=folder, required=True, callback=_require_data),
    ):
        command = add(command)
    return command


def _require_data(_context: click.Context, _option: click.Parameter, folder: Path) -> Path:
    if not (folder / "cifar-10-batches-py").is_dir():
        raise click.BadParameter(
            f"received {folder}, expected a folder with cifar-10-batches-py/; unpack CIFAR-10's "
            f"archive there, or pass another folder"
        )
    return folder


def interleave(
    rounds: int,
    sides: Iterable[Side],
    measure: Callable[[Side], Result],
    describe: Callable[[Side, Result], str],
) -> dict[Side, list[Result]]:
    """Measure all sides in turn in each round, so that a drift of the machine's speed affects all.

    Args:
        rounds: Number of rounds.
        sides: The sides to compare.
        measure: Measures a side once.
        describe: Formats a result as a line, which is printed at once.

    Returns:
        The results of each side, one per round.
    """
    results: dict[Side, list[Result]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side, measured in results.items():
            measured.append(measure(side))
            click.echo(f"round {number}/{rounds}  {describe(side, measured[-1])}")
    return results


def run_python(
    arguments: Iterable[Any],
    *,
    python: str = sys.executable,
    cwd: Path = REPOSITORY,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Run a Python program until it exits and return the lines of its stdout.

    The program does not inherit JOB_… variables: only the benchmark sets the job's options.

    Args:
        arguments: Arguments of the interpreter.
        python: The interpreter.
        cwd: Working directory, whose modules are imported first.
        env: Variables to add to the environment.

    Raises:
        ClickException: If the program fails.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    environ = {**inherited, **(env or {})}
    command = [python, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    if result.returncode:
        text = f"exit code {result.returncode} of {' '.join(command)}:\n{result.stderr}"
        raise click.ClickException(text)
    return result.stdout.splitlines()


class Training(NamedTuple):
    """A finished training.

    Attributes:
        lines: Lines of its stdout: its events, and the output of libraries.
        manifest: Contents of its run.json.
        began: Time before its process started, in seconds since the Unix epoch.
        ended: Time after its process exited, in the same unit.
    """

    lines: list[str]
    manifest: Record
    began: float
    ended: float


def train(
    data_dir: Path,
    arguments: str,
    *,
    checkout: Path = REPOSITORY,
    env: Mapping[str, str] | None = None,
) -> Training:
    """Train with these options in a folder that is removed afterwards.

    Args:
        data_dir: Folder with CIFAR-10.
        arguments: Options of `train`, except folders and log format.
        checkout: Checkout of the program to run.
        env: Variables to add to the environment.

    Raises:
        ClickException: If the training fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        folders = ("--data-dir", data_dir, "--output-dir", folder)
        command = ["-m", "job", "train", *arguments.split(), "--log-format", "json", *folders]
        began = time.time()
        lines = run_python(command, cwd=checkout, env=env)
        ended = time.time()
        manifest = json.loads(Path(folder, "run.json").read_text())
    return Training(lines, manifest, began, ended)


def json_lines(lines: Iterable[str]) -> list[Record]:
    """Parse the lines of an output that are JSON objects."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def write_results(output_dir: Path, name: str, results: Record) -> None:
    """Write the results of a benchmark, with machine and versions, to the JSON file `name`.json."""
    document = {
        "time": log.utc_now(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tensorflow", "keras", "numpy")},
        **results,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table, with the first column left-aligned and the others right-aligned."""
    lines = [header, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def align(cells: Sequence[str]) -> str:
        numbers = map(str.rjust, cells[1:], widths[1:])
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    return "\n".join(map(align, [lines[0], rule, *lines[1:]]))
