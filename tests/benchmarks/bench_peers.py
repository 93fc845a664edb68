"""Compare this job, PyTorch and JAX with the same recipe on the same device.

PyTorch and JAX need their own environment, because their CUDA libraries conflict with those of
TensorFlow; --python is its interpreter. A framework that is not installed there is skipped.

Only the training part of an epoch is timed. The results of a run are its first epoch, which
includes compilation, and the median of the others. Each figure is the median over interleaved
rounds.
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
# The package that each peer needs.
PEERS = {"PyTorch": "torch", "JAX": "jax"}
# For each recipe, the module with which each peer trains it.
MODULES = {
    "classic": {"PyTorch": "peer_pytorch", "JAX": "peer_jax"},
    "fast": {"PyTorch": "peer_pytorch_fast"},
}


class Run(NamedTuple):
    """A training by this job or a peer.

    Attributes:
        seconds: Training time of each epoch.
        device: Model of its first device.
        versions: Versions of its libraries.
    """

    seconds: Sequence[float]
    device: str
    versions: dict[str, str | None]

    @property
    def later(self) -> float:
        """Median seconds of the epochs after the first."""
        return statistics.median(self.seconds[1:])


@click.command()
@options
@click.option("--recipe", type=click.Choice([*MODULES]), default="classic", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="bfloat16",
    show_default=True,
    help="Precision that all of them compute in.",
)
@click.option(
    "--peer",
    type=click.Choice([*PEERS]),
    multiple=True,
    default=[*PEERS],
    help="Measure this peer [default: all]. On CPUs JAX is very slow, most of all in bfloat16.",
)
@click.option("--epochs", type=click.IntRange(min=2), default=3, show_default=True)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50_000,
    show_default=True,
    help="Use only the first N training images.",
)
@click.option(
    "--python", default=sys.executable, help="Interpreter with PyTorch and JAX [default: this one]."
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
            f"received {python}, expected a Python interpreter; pass its path",
            param_hint="--python",
        )
    batch_size = int(recipe_defaults(recipe).get("batch_size", TrainConfig().batch_size))
    if limit < batch_size:
        raise click.BadParameter(
            f"received {limit}, expected at least one batch of {batch_size}", param_hint="--limit"
        )
    arguments = f"--precision {precision} --epochs {epochs} --limit {limit}"
    modules = MODULES[recipe]
    for name in peer:
        if name not in modules:
            click.echo(f"skipping {name}: the recipe {recipe} has no {name} version", err=True)
    peers = _installed([one for one in peer if one in modules], python)
    runs = interleave(
        rounds,
        [THIS_JOB, *peers],
        lambda name: _run(modules.get(name), recipe, data_dir, arguments, python),
        lambda name, run: f"{name:<10} {run.later:7.3f} s per epoch, first {run.seconds[0]:.1f} s",
    )
    results = summarize(runs, limit // batch_size * batch_size)
    document = {"recipe": recipe, "options": arguments, "results": results}
    write_results(output_dir, f"bench_peers-{recipe}-{precision}", document)
    click.echo(f"\n{_table(results, precision)}")
    for name, result in results.items():
        libraries = ", ".join(f"{library} {one}" for library, one in result["versions"].items())
        click.echo(f"{name}: {result['device']}; {libraries}")


def import_error(package: str, python: str) -> str | None:
    """The error when an interpreter imports a package, in one line; None if it succeeds."""
    command = [python, "-c", f"import numpy, {package}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if not result.returncode:
        return None
    return (result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]


def _installed(peers: Iterable[str], python: str) -> list[str]:
    """Return the peers that the interpreter can run; print to stderr why others are skipped."""
    installed = []
    for name in peers:
        package = PEERS[name]
        if problem := import_error(package, python):
            click.echo(
                f"skipping {name}: {python} cannot import it ({problem}); install it there with "
                f"{python} -m pip install {package} numpy, or pass another --python",
                err=True,
            )
        else:
            installed.append(name)
    return installed


def _run(module: str | None, recipe: str, data_dir: Path, arguments: str, python: str) -> Run:
    """Train with a peer's module, or with this job."""
    if module is None:
        return run_of_job(train(data_dir, f"--recipe {recipe} {arguments}"))
    command = ["-m", f"tests.benchmarks.{module}", "--data-dir", data_dir, *arguments.split()]
    *epochs, summary = json_lines(run_python(command, python=python))
    return Run([one["seconds"] for one in epochs], summary["device"], summary["versions"])


def run_of_job(training: Training) -> Run:
    """Extract the results of a training by this job.

    Raises:
        UsageError: If it trained on several devices, which no peer supports.
    """
    manifest = training.manifest
    if manifest["replicas"] > 1:
        raise click.UsageError(
            f"this job trained on {manifest['replicas']} devices, expected one, because the peers "
            f"use one; set CUDA_VISIBLE_DEVICES=0"
        )
    events = json_lines(training.lines)
    seconds = [event["seconds"] for event in events if event["event"] == "epoch"]
    return Run(seconds, manifest["devices"][0]["model"], manifest["versions"])


def summarize(runs: dict[str, list[Run]], images: int) -> dict[str, Record]:
    """Compute the medians over the rounds, and their ratios to those of this job.

    Args:
        runs: The runs of this job and of each peer, one per round.
        images: Number of images that an epoch trains on.
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
    header = (precision, "first epoch with compilation, s", "later epochs, s", "images/s", "ratio")
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
