"""Measure a training step for different numbers of workers and replicas, all on this machine.

This measures the overhead of the communication between workers, not how training scales over
machines: the workers share the machine's CPUs. As root it runs in its own network namespace, whose
loopback carries only the traffic between the workers.
"""

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tests.benchmarks.harness import Record, interleave, options, table, write_results
from tests.integration.team import Team

LAYOUTS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
BATCH, STEPS, EPOCHS = 256, 30, 4
OPTIONS = f"--limit {BATCH * STEPS} --batch-size {BATCH} --epochs {EPOCHS} --precision float32"


@click.command()
@options
def main(data_dir: Path, output_dir: Path, rounds: int) -> None:
    """Print a table and write bench_workers.json."""
    measured = interleave(
        rounds,
        LAYOUTS,
        lambda layout: _measure(data_dir, *layout),
        lambda layout, result: (
            f"{layout[0]} worker(s) x {layout[1]} replica(s)  "
            f"{result[0] * 1000:7.1f} ms per step  {result[1]:7.2f} MiB per step"
        ),
    )
    rows = [
        {
            "workers": workers,
            "replicas_per_worker": replicas,
            "milliseconds_per_step": statistics.median(seconds for seconds, _ in results) * 1000,
            "mebibytes_per_step": statistics.median(mib for _, mib in results),
        }
        for (workers, replicas), results in measured.items()
    ]
    results = {"rounds": rounds, "options": OPTIONS, "rows": rows}
    write_results(output_dir, "bench_workers", results)
    header = ("workers", "replicas each", "ms per step", "MiB exchanged per step")
    lines = [
        (
            f"{row['workers']}",
            f"{row['replicas_per_worker']}",
            f"{row['milliseconds_per_step']:.0f}",
            f"{row['mebibytes_per_step']:.2f}",
        )
        for row in rows
    ]
    click.echo(table(header, lines))


def _measure(data_dir: Path, workers: int, replicas: int) -> tuple[float, float]:
    """Seconds and MiB on loopback per step, of the median epoch after the first."""
    with tempfile.TemporaryDirectory() as folder:
        team = Team(
            Path(folder),
            workers,
            *("train", *OPTIONS.split(), "--devices", f"cpu:{replicas}"),
            *("--data-dir", data_dir, "--log-format", "json"),
            module="tests.integration.cpu_replicas",
        ).start()
        try:
            lines: list[Record] = []
            sent = []
            for _ in range(EPOCHS):
                lines.append(team.workers[0].wait_for("epoch"))
                sent.append(_bytes_on_loopback())
            if any(team.finish()):
                raise click.ClickException(f"a worker failed: {team.errors}")
        finally:
            team.kill()
    seconds = statistics.median(line["seconds"] for line in lines[1:]) / STEPS
    # Includes the validation of the epoch, which adds less than 1%.
    exchanged = statistics.median(b - a for a, b in itertools.pairwise(sent)) / STEPS
    return seconds, exchanged / 2**20


def _bytes_on_loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    return 0


if __name__ == "__main__":
    isolated = os.environ.get("BENCH_WORKERS_APART")
    if not isolated and os.getuid() == 0 and shutil.which("unshare") and shutil.which("ip"):
        inner = 'ip link set lo up && exec "$@"'
        command = ["unshare", "--net", "sh", "-c", inner, "sh", sys.executable, "-m"]
        command += ["tests.benchmarks.bench_workers", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "BENCH_WORKERS_APART": "1"}).returncode)
    main()
