"""Measure the prediction of image files against the evaluation of the same images.

The real test images are written as PNG files. In each round either side is a process of its own
that goes over them four times with the same network. The first pass compiles and is all that a
command does; the fastest of the others is the speed once everything is warm. Each figure is the
median over the rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from job import log
from job.config import TrainConfig
from job.data import load_dataset

SIDES = ("evaluation", "prediction")
PASSES = 4


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--side", type=click.Choice(SIDES), help="Measure it in this process.")
@click.option("--folder", help="Where the PNG files are then.")
def main(
    data_dir: Path, output_dir: Path, rounds: int, side: str | None, folder: str | None
) -> None:
    """Print images per second, and write bench_predict.json."""
    if side and folder:
        click.echo(json.dumps(_measure(data_dir, folder, side)))
        return
    images = load_dataset(TrainConfig(data_dir=data_dir)).test_images
    results: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as pngs:
        _write_pngs(Path(pngs), images)
        for number in range(rounds):
            results.append({side: _run_side(data_dir, pngs, side) for side in SIDES})
            click.echo(f"round {number + 1}/{rounds}  {_line(results[-1], 'first')}")
    medians = {
        side: {
            key: statistics.median(result[side][key] for result in results)
            for key in ("first", "warm")
        }
        for side in SIDES
    }
    document = {"time": log.utc_now(), "images": len(images), **medians, "rounds": results}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "bench_predict.json").write_text(json.dumps(document, indent=2) + "\n")
    click.echo(f"first pass  {_line(medians, 'first')}\nwarm        {_line(medians, 'warm')}")


def _run_side(data_dir: Path, pngs: str, side: str) -> dict[str, float]:
    options = ["--data-dir", str(data_dir), "--output-dir", pngs, "--folder", pngs, "--side", side]
    command = [sys.executable, "-m", "tests.benchmarks.bench_predict", *options]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    speeds: dict[str, float] = json.loads(result.stdout)
    return speeds


def _measure(data_dir: Path, folder: str, side: str) -> dict[str, float]:
    """Images per second of a side in this process: the first pass, and the fastest later."""
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


def _line(result: dict[str, dict[str, float]], key: str) -> str:
    evaluation, prediction = (result[side][key] for side in SIDES)
    return (
        f"evaluation {evaluation:7,.0f} images/s   prediction {prediction:7,.0f} images/s   "
        f"ratio {prediction / evaluation:.2f}"
    )


if __name__ == "__main__":
    main()
