import json
import sys
from datetime import UTC, datetime
from typing import Any

import click
import pytest
import tensorflow as tf

from job.cluster.devices import Compilation
from job.data import Dataset
from job.training.engine import Plan
from tests.benchmarks.bench import Kernels, kernels_in
from tests.benchmarks.bench_peers import THIS_JOB, Run, import_error, run_of_job, summarize
from tests.benchmarks.bench_start import STAGES, middle_run, stages_of
from tests.benchmarks.harness import Training, interleave, run_python, table
from tests.benchmarks.multiply_adds import count, count_run
from tests.conftest import MakeDevices


def test_overlapping_kernels_cover_their_time_once() -> None:
    spans = [(2.0, 4.0), (3.0, 6.0), (8.0, 9.0)]
    assert kernels_in(spans, start=0.0, end=10.0) == Kernels(covered=0.5, summed=0.6)


def test_kernels_outside_of_the_measured_time_do_not_count() -> None:
    # `_measure_kernels` clips spans to the measured time, so a span outside ends before it begins.
    assert kernels_in([(5.0, 3.0)], start=5.0, end=10.0) == Kernels(0.0, 0.0)
    assert kernels_in([(5.0, 10.0)], start=5.0, end=10.0).covered == pytest.approx(1.0)


def make_training(**seconds: float) -> Training:
    """A run with events at the given number of seconds after its start.

    Its epochs train for 6 and 1 s. The first takes another 3 s for other work.
    """
    times = {"start": 4.0, "epoch": 15.5, "checkpoint": 16.0, "evaluation": 18.5, "report": 20.5}
    events: list[tuple[float, dict[str, Any]]] = [
        (13.0, {"event": "epoch", "seconds": 6.0, "elapsed_seconds": 9.0}),
        *((second, {"event": name, "seconds": 1.0}) for name, second in (times | seconds).items()),
    ]
    lines = ["what a library prints"]
    for second, fields in sorted(events, key=lambda event: event[0]):
        moment = datetime.fromtimestamp(second, UTC).isoformat()
        lines.append(json.dumps({"time": moment, **fields}))
    return Training(lines, {"attempts": [{"start": "1970-01-01T00:00:00.500Z"}]}, 0.0, 20.75)


@pytest.mark.parametrize(("first_checkpoint", "pause"), [(None, 0.0), (10.5, 0.0), (13.25, 0.25)])
def test_a_run_is_divided_into_its_stages(first_checkpoint: float | None, pause: float) -> None:
    # Versions save their first checkpoint at different times.
    run = make_training()
    if first_checkpoint:
        other = make_training(checkpoint=first_checkpoint)
        early = next(line for line in other.lines if "check" in line)
        run.lines.insert(2 if first_checkpoint < 13 else 3, early)
    lengths = (0.5, 3.5, 5.25, 4.75 + pause, 2.0 - pause, 2.5, 2.0, 0.25)
    assert stages_of(run) == pytest.approx(dict(zip(STAGES, lengths, strict=True)))


def test_work_done_early_results_in_a_stage_of_zero_length() -> None:
    stages = stages_of(make_training(evaluation=15.9, report=15.8))
    assert (stages["saved model evaluated"], stages["report"]) == (0, 0)
    assert sum(stages.values()) == pytest.approx(20.75)


def test_a_run_without_a_required_event_is_rejected() -> None:
    run = make_training()
    del run.lines[-1]
    with pytest.raises(click.ClickException, match="no event report"):
        stages_of(run)


def test_the_picture_shows_the_run_of_median_length() -> None:
    first, second, third = ({"report": 5.0, "exit": one} for one in (3.0, 1.0, 2.0))
    assert middle_run([first, second, third]) is third


def test_each_round_measures_all_sides_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def measure(side: str) -> int:
        calls.append(side)
        return len(calls)

    results = interleave(2, "ab", measure, lambda side, result: f"{side}{result}")
    assert (calls, results) == (["a", "b", "a", "b"], {"a": [1, 3], "b": [2, 4]})
    assert capsys.readouterr().out.splitlines()[-1] == "round 2/2  b4"


def test_job_options_in_the_environment_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_LIMIT", "256")
    show = "import os; print(os.environ.get('JOB_LIMIT'), os.environ['ADDED'])"
    assert run_python(["-c", show], env={"ADDED": "1"}) == ["None 1"]
    with pytest.raises(click.ClickException, match=r"(?s)exit code 1.*what went wrong"):
        run_python(["-c", "raise SystemExit('what went wrong')"])


def test_a_table_is_aligned_markdown() -> None:
    lines = table(("", "s"), [("this job", "1.5"), ("it", "10.25")]).splitlines()
    assert lines[1:3] == ["| -------- | ----: |", "| this job |   1.5 |"]
    assert len({len(line) for line in lines}) == 1


def test_the_import_error_of_a_peer_that_is_not_installed() -> None:
    assert import_error("json", sys.executable) is None
    assert "No module named 'no_peer'" in str(import_error("no_peer", sys.executable))


def test_only_multiply_adds_that_are_computed_count() -> None:
    images, kernel, matrix = tf.ones([2, 8, 8, 3]), tf.ones([3, 3, 3, 4]), tf.ones([256, 5])
    convolution, product = 2 * 8 * 8 * 4 * (9 * 3), 2 * 5 * 256

    def compute(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(matrix)
            hidden = tf.reshape(tf.nn.conv2d(images, kernel, 1, "SAME"), [2, 256])
            loss = tf.reduce_sum((hidden @ matrix) ** 2)
        return tape.gradient(loss, matrix)

    # Two products with the matrix; the gradient of the convolution is not computed.
    assert count(compute, images) == convolution + 2 * product
    assert count(tf.function(compute), images) == convolution + 2 * product


def test_multiply_adds_of_the_fast_recipe(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    devices = make_devices(1, compilation=Compilation(False, False))
    counts = count_run("fast", small_dataset, devices, Plan(16, 1, epochs=8, seed=1), 10)
    whitening, second, forward = 276_768, 13_284_864, 118_147_360
    muon = 3_166_765_056
    # No gradients of the whitening filters and of the images; later none of the whitening outputs.
    early = 16 * (3 * forward - 2 * whitening) + muon
    assert counts == {
        "training": 8 * early - 5 * 16 * second,
        "validations": 8 * 10 * forward,
        "evaluation": 6 * 10 * forward,
    }


def test_peers_are_compared_by_their_later_epochs() -> None:
    times = {THIS_JOB: ([5, 1, 1, 1], [7, 4, 4, 4], [9, 2, 2, 8]), "JAX": ([3, 1], [4, 1], [5, 1])}
    runs = {name: [Run(one, "cpu", {}) for one in own] for name, own in times.items()}
    job, jax = summarize(runs, images=100).values()
    assert (job["seconds_first_epoch"], job["seconds_an_epoch"], job["ratio"]) == (7, 2, 1)
    assert (jax["seconds_first_epoch"], jax["images_per_second"], jax["ratio"]) == (4, 100, 0.5)


def test_this_job_is_compared_only_on_one_device() -> None:
    lines = ['{"event": "epoch", "seconds": 2.5}', '{"event": "checkpoint", "seconds": 0.1}']
    manifest: dict[str, Any] = {"replicas": 1, "devices": [{"model": "a GPU"}], "versions": {}}
    assert run_of_job(Training(lines, manifest, 0, 1)) == Run([2.5], "a GPU", {})
    with pytest.raises(click.UsageError, match="on 2 devices, expected one"):
        run_of_job(Training(lines, manifest | {"replicas": 2}, 0, 1))
