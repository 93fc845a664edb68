"""Measure the prediction of image files against the evaluation of the same images.

The real test images are written as PNG files, and each round is a process of its own in which both
go over them with the same network, four times by turns. The first pass compiles and is all that a
command does; the others tell the speed once everything is warm. Every other round the prediction
begins. Each figure is the median over the rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from job import log
from job.config import DataConfig, TrainConfig
from job.dataset import load_dataset

SIDES = ("evaluation", "prediction")
PASSES = 4


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--folder", help="Measure one round with the PNG files of this folder.")
@click.option("--begin", type=click.Choice(SIDES), default="evaluation")
def main(data_dir: Path, output_dir: Path, rounds: int, folder: str | None, begin: str) -> None:
    """Print images per second, and write bench_predict.json."""
    if folder:
        click.echo(json.dumps(_measure(data_dir, folder, begin)))
        return
    images = load_dataset(DataConfig(data_dir=data_dir)).test_images
    results: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as pngs:
        _write_pngs(Path(pngs), images)
        for number in range(rounds):
            options = ["--folder", pngs, "--begin", SIDES[number % 2]]
            command = [sys.executable, "-m", "tests.benchmarks.bench_predict", *options]
            folders = ["--data-dir", str(data_dir), "--output-dir", str(output_dir)]
            result = subprocess.run([*command, *folders], check=True, stdout=subprocess.PIPE)
            results.append(json.loads(result.stdout))
            click.echo(f"round {number + 1}/{rounds}  {_line(results[-1], 'first')}")
    document: dict[str, Any] = {"time": log.utc_now(), "images": len(images), "rounds": results}
    for which in ("first", "warm"):
        document[which] = {
            side: statistics.median(result[which][side] for result in results) for side in SIDES
        }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "bench_predict.json").write_text(json.dumps(document, indent=2) + "\n")
    click.echo(f"first pass  {_line(document, 'first')}\nwarm        {_line(document, 'warm')}")


def _measure(data_dir: Path, folder: str, begin: str) -> dict[str, dict[str, float]]:
    """Images per second of both sides in this process: the first pass, and the fastest later."""
    from job.startup import load_tensorflow

    load_tensorflow()
    from job import classic
    from job.devices import open_promised_devices
    from job.evaluate import ROWS_PER_REPLICA, Evaluator
    from job.images import find_images
    from job.predict import Classifier, Predictor, json_line, predict_batches

    dataset = load_dataset(DataConfig(data_dir=data_dir))
    devices = open_promised_devices(TrainConfig())
    with devices.strategy.scope():
        model = classic.build_model(42, len(dataset.class_names))
    evaluate = Evaluator(model, classic.RECIPE, devices, dataset.test_images, dataset.test_labels)
    classifier = Classifier(model, dataset.class_names, classic.RECIPE.evaluation_views)
    predictor = Predictor(classifier, devices, ROWS_PER_REPLICA)

    def predict() -> None:
        for batch in predict_batches(classifier, predictor, find_images([folder]), 3):
            for prediction in batch:
                json_line(prediction)

    calls: dict[str, Callable[[], object]] = {"evaluation": evaluate, "prediction": predict}
    order = sorted(SIDES, key=lambda side: side != begin)
    passes = [{side: _seconds(calls[side]) for side in order} for _ in range(PASSES)]
    images = len(dataset.test_images)
    return {
        "first": {side: images / passes[0][side] for side in SIDES},
        "warm": {side: images / min(one[side] for one in passes[1:]) for side in SIDES},
    }


def _write_pngs(folder: Path, images: npt.NDArray[np.uint8]) -> None:
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:05}.png")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _line(document: dict[str, Any], which: str) -> str:
    evaluation, prediction = (document[which][side] for side in SIDES)
    return (
        f"evaluation {evaluation:7,.0f} images/s   prediction {prediction:7,.0f} images/s   "
        f"ratio {prediction / evaluation:.2f}"
    )


if __name__ == "__main__":
    main()
