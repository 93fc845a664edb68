"""Compare the speed of predicting image files with evaluating the same images.

The real test images are written as PNG files. In each round, each side runs in its own process and
processes them four times with the same network. The first pass includes compilation and is all that
a command does; the fastest later pass is the speed when warm. Each figure is the median over the
rounds.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from job.config import TrainConfig
from job.data import load_dataset
from tests.benchmarks.harness import (
    interleave,
    json_lines,
    options,
    run_python,
    table,
    write_results,
)

SIDES = ("evaluation", "prediction")
PASSES = 4


@click.command()
@options
@click.option("--side", type=click.Choice(SIDES), help="Measure only this side, in this process.")
@click.option("--folder", help="Folder of the PNG files, for --side.")
def main(
    data_dir: Path, output_dir: Path, rounds: int, side: str | None, folder: str | None
) -> None:
    """Print images per second, and write bench_predict.json."""
    if side and folder:
        click.echo(json.dumps(_measure(data_dir, folder, side)))
        return
    images = load_dataset(TrainConfig(data_dir=data_dir)).test_images
    with tempfile.TemporaryDirectory() as pngs:
        _write_pngs(Path(pngs), images)
        speeds = interleave(
            rounds,
            SIDES,
            lambda side: _run_side(data_dir, pngs, side),
            lambda side, speed: f"{side:<10} {speed['first']:7,.0f} images/s, first pass",
        )
    medians = {
        key: {side: statistics.median(run[key] for run in speeds[side]) for side in SIDES}
        for key in ("first", "warm")
    }
    results = {"images": len(images), "medians": medians, "rounds": speeds}
    write_results(output_dir, "bench_predict", results)
    rows = []
    for key, speed in medians.items():
        evaluation, prediction = speed.values()
        ratio = prediction / evaluation
        rows.append((key, f"{evaluation:,.0f}", f"{prediction:,.0f}", f"{ratio:.2f}"))
    click.echo(table(("images/s", *SIDES, "ratio"), rows))


def _run_side(data_dir: Path, pngs: str, side: str) -> dict[str, float]:
    arguments = ["--data-dir", data_dir, "--output-dir", pngs, "--folder", pngs, "--side", side]
    (speeds,) = json_lines(run_python(["-m", "tests.benchmarks.bench_predict", *arguments]))
    return speeds


def _measure(data_dir: Path, folder: str, side: str) -> dict[str, float]:
    """Measure a side in this process: images per second in the first and the fastest later pass."""
    from job.commands.cli import load_tensorflow

    load_tensorflow()
    from job.cluster.devices import open_visible_devices
    from job.commands.predict import Predictor, json_line, predict_batches
    from job.data.image_files import find_images
    from job.recipes import classic
    from job.training.evaluate import Evaluator

    dataset = load_dataset(TrainConfig(data_dir=data_dir))
    devices = open_visible_devices(TrainConfig())
    with devices.strategy.scope():
        model = classic.build_model(42, len(dataset.class_names))
    evaluate = Evaluator(model, classic.RECIPE, devices, dataset.test_images, dataset.test_labels)
    predictor = Predictor(model, dataset.class_names, classic.RECIPE.tta_views, devices)

    def predict() -> None:
        for batch in predict_batches(predictor, find_images([folder]), 3):
            for prediction in batch:
                json_line(prediction)

    call = evaluate if side == "evaluation" else predict
    first, *others = (_seconds(call) for _ in range(PASSES))
    images = len(dataset.test_images)
    return {"first": images / first, "warm": images / min(others)}


def _write_pngs(folder: Path, images: npt.NDArray[np.uint8]) -> None:
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:05}.png")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
