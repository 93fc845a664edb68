"""What the benchmarks share: options, interleaved rounds, the runs of programs, and results."""

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
    """Add the options that every benchmark has: folders (absolute paths) and number of rounds."""
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
            f"archive there, or name another"
        )
    return folder


def interleave(
    rounds: int,
    sides: Iterable[Side],
    measure: Callable[[Side], Result],
    describe: Callable[[Side, Result], str],
) -> dict[Side, list[Result]]:
    """Measure all sides in turn, round after round: a machine whose speed drifts is fair to all.

    Args:
        rounds: How often.
        sides: What is compared.
        measure: Measures a side once.
        describe: Words a result in a line, which is printed when it is there.

    Returns:
        The results of each side, one a round.
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
    """Run a Python program to its end and return the lines of its stdout.

    Options of the job that the environment sets are left out, as the benchmark's own count.

    Args:
        arguments: Of the interpreter.
        python: The interpreter.
        cwd: Folder to run in, whose modules come first.
        env: Variables to add to the environment.

    Raises:
        ClickException: If it fails.
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
    """A training that has ended.

    Attributes:
        lines: Of its stdout: its events and what libraries print.
        manifest: Its run.json.
        began: Time before its process was started, seconds since the epoch.
        ended: Time after its process had ended.
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
        data_dir: Has CIFAR-10.
        arguments: Options of `train`, but for folders and log format.
        checkout: Whose program it is.
        env: Variables to add to the environment.

    Raises:
        ClickException: If it fails.
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
    """The JSON objects among lines of output."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def write_results(output_dir: Path, name: str, results: Record) -> None:
    """Write a benchmark's results and what they were measured on to a JSON file of this name."""
    document = {
        "time": log.utc_now(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tensorflow", "keras", "numpy")},
        **results,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def align(cells: Sequence[str]) -> str:
        numbers = map(str.rjust, cells[1:], widths[1:])
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    return "\n".join(map(align, [lines[0], rule, *lines[1:]]))
