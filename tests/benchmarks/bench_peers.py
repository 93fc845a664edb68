"""Measure this job, PyTorch and JAX in turn on the same device: the same recipe in each.

PyTorch and JAX are installed apart, as their CUDA libraries and TensorFlow's do not fit into one
environment; --python names the interpreter that has them. One that it lacks is left out.

An epoch counts by its training alone. A run counts by its first epoch, which compiles, and by the
median of the others; each figure is the median over interleaved rounds.
"""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from job.config import TrainConfig
from job.registry import recipe_defaults
from tests.benchmarks.harness import (
    Record,
    Training,
    interleave,
    json_lines,
    options,
    run_python,
    table,
    train,
    write_results,
)

THIS_JOB = "this job"
# The package that each needs.
PEERS = {"PyTorch": "torch", "JAX": "jax"}
# For each recipe the module by which each of them trains it.
MODULES = {
    "classic": {"PyTorch": "peer_pytorch", "JAX": "peer_jax"},
    "fast": {"PyTorch": "peer_pytorch_fast"},
}


class Run(NamedTuple):
    """A training of one of them.

    Attributes:
        seconds: Of the training in each epoch.
        device: The model of its first device.
        versions: Of its libraries.
    """

    seconds: Sequence[float]
    device: str
    versions: dict[str, str | None]

    @property
    def later(self) -> float:
        """Seconds of an epoch after the first: their median."""
        return statistics.median(self.seconds[1:])


@click.command()
@options
@click.option("--recipe", type=click.Choice([*MODULES]), default="classic", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="bfloat16",
    show_default=True,
    help="What all of them compute in.",
)
@click.option(
    "--peer",
    type=click.Choice([*PEERS]),
    multiple=True,
    default=[*PEERS],
    help="Measure this one; all. On CPUs JAX takes very long, above all in bfloat16.",
)
@click.option("--epochs", type=click.IntRange(min=2), default=3, show_default=True)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50_000,
    show_default=True,
    help="Only the first N training images.",
)
@click.option(
    "--python", default=sys.executable, help="The interpreter that has PyTorch and JAX; this one."
)
def main(
    data_dir: Path,
    output_dir: Path,
    rounds: int,
    recipe: str,
    precision: str,
    peer: tuple[str, ...],
    epochs: int,
    limit: int,
    python: str,
) -> None:
    """Print a table and write bench_peers-RECIPE-PRECISION.json."""
    if not shutil.which(python):
        raise click.BadParameter(
            f"received {python}, expected a Python interpreter; name its path",
            param_hint="--python",
        )
    batch_size = int(recipe_defaults(recipe).get("batch_size", TrainConfig().batch_size))
    if limit < batch_size:
        raise click.BadParameter(
            f"received {limit}, expected at least a batch of {batch_size}", param_hint="--limit"
        )
    arguments = f"--precision {precision} --epochs {epochs} --limit {limit}"
    modules = MODULES[recipe]
    for name in peer:
        if name not in modules:
            click.echo(f"{name} is left out: it has no form of {recipe}", err=True)
    peers = _installed([one for one in peer if one in modules], python)
    runs = interleave(
        rounds,
        [THIS_JOB, *peers],
        lambda name: _run(modules.get(name), recipe, data_dir, arguments, python),
        lambda name, run: f"{name:<10} {run.later:7.3f} s an epoch, the first {run.seconds[0]:.1f}",
    )
    results = summarize(runs, limit // batch_size * batch_size)
    document = {"recipe": recipe, "options": arguments, "results": results}
    write_results(output_dir, f"bench_peers-{recipe}-{precision}", document)
    click.echo(f"\n{_table(results, precision)}")
    for name, result in results.items():
        libraries = ", ".join(f"{library} {one}" for library, one in result["versions"].items())
        click.echo(f"{name}: {result['device']}; {libraries}")


def problem_with(package: str, python: str) -> str | None:
    """Why an interpreter cannot load a package, in one line; None if it can."""
    command = [python, "-c", f"import numpy, {package}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if not result.returncode:
        return None
    return (result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]


def _installed(peers: Iterable[str], python: str) -> list[str]:
    """The peers that the interpreter can run; why it cannot run others goes to stderr."""
    installed = []
    for name in peers:
        package = PEERS[name]
        if problem := problem_with(package, python):
            click.echo(
                f"{name} is left out: {python} cannot load it ({problem}); install it there by "
                f"{python} -m pip install {package} numpy, or name another interpreter",
                err=True,
            )
        else:
            installed.append(name)
    return installed


def _run(module: str | None, recipe: str, data_dir: Path, arguments: str, python: str) -> Run:
    """Train by a peer's module, or by this job."""
    if module is None:
        return run_of_job(train(data_dir, f"--recipe {recipe} {arguments}"))
    command = ["-m", f"tests.benchmarks.{module}", "--data-dir", data_dir, *arguments.split()]
    *epochs, summary = json_lines(run_python(command, python=python))
    return Run([one["seconds"] for one in epochs], summary["device"], summary["versions"])


def run_of_job(training: Training) -> Run:
    """What counts of a training by this job.

    Raises:
        UsageError: If it trained on several devices, as no peer does.
    """
    manifest = training.manifest
    if manifest["replicas"] > 1:
        raise click.UsageError(
            f"this job trained on {manifest['replicas']} devices, expected one, as the peers take "
            f"one; set CUDA_VISIBLE_DEVICES=0"
        )
    events = json_lines(training.lines)
    seconds = [event["seconds"] for event in events if event["event"] == "epoch"]
    return Run(seconds, manifest["devices"][0]["model"], manifest["versions"])


def summarize(runs: dict[str, list[Run]], images: int) -> dict[str, Record]:
    """Medians over the rounds of each, and their ratios to this job's.

    Args:
        runs: Of each, one a round; this job's among them.
        images: That an epoch trains on.
    """
    base = statistics.median(run.later for run in runs[THIS_JOB])
    results = {}
    for name, own in runs.items():
        seconds = statistics.median(run.later for run in own)
        results[name] = {
            "device": own[0].device,
            "versions": own[0].versions,
            "seconds_first_epoch": statistics.median(run.seconds[0] for run in own),
            "seconds_an_epoch": seconds,
            "images_per_second": images / seconds,
            "ratio": seconds / base,
            "rounds": [run.seconds for run in own],
        }
    return results


def _table(results: dict[str, Record], precision: str) -> str:
    header = (precision, "first epoch, compiles, s", "an epoch, s", "images/s", "ratio")
    rows: list[Sequence[str]] = [
        (
            name,
            f"{result['seconds_first_epoch']:.2f}",
            f"{result['seconds_an_epoch']:.3f}",
            f"{result['images_per_second']:,.0f}",
            f"{result['ratio']:.2f}",
        )
        for name, result in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
