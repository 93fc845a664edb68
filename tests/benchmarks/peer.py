"""Shared code of the peers: programs that train this job's recipes in other frameworks.

It imports only NumPy and the standard library, because peers run in environments without
TensorFlow. The numbers are those of `job/recipes/classic.py` and of Keras's defaults. They are
repeated here because that module imports TensorFlow.
"""

import argparse
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BATCH_SIZE = 256
IMAGE_SIZE = 32
CLASSES = 10
PIXELS = IMAGE_SIZE * IMAGE_SIZE

LEARNING_RATE = 1e-4
BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-7
NORM_MOMENTUM, NORM_EPSILON = 0.99, 1e-3
DROPOUT = 0.5

ROTATION_DEGREES = 20.0
SHIFT_PIXELS = 0.2 * IMAGE_SIZE
SHEAR_DEGREES = 0.2
ZOOM = 0.2


class Cifar10(NamedTuple):
    """CIFAR-10: images [examples, 32, 32, 3] uint8, labels [examples] int32."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int32]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int32]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; the others are skipped, different ones in each epoch."""
        return len(self.train_images) // BATCH_SIZE


def option_parser(description: str | None, epochs: int = 50) -> argparse.ArgumentParser:
    """Make a parser with the options of every peer; each peer adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with cifar-10-batches-py/"
    )
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--limit", type=int, help="use only the first LIMIT training images (default: all 50,000)"
    )
    return parser


def load(data_dir: Path, limit: int | None, batch_size: int = BATCH_SIZE) -> Cifar10:
    """Load CIFAR-10 with the first `limit` training images, which must be at least one batch."""
    folder = data_dir / "cifar-10-batches-py"
    if not folder.is_dir():
        raise SystemExit(f"no cifar-10-batches-py in {data_dir}; use another --data-dir")
    if limit is not None and limit < batch_size:
        raise SystemExit(f"received --limit {limit}, expected at least one batch of {batch_size}")
    train_images, train_labels = _read(folder, [f"data_batch_{number}" for number in range(1, 6)])
    return Cifar10(train_images[:limit], train_labels[:limit], *_read(folder, ["test_batch"]))


def _read(folder: Path, names: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int32)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels


def affine_maps(unit: Any, ops: Any) -> list[Any]:
    """Compute `job.recipes._augment.draw_parameters` and `affine_transforms` in any framework.

    Args:
        unit: Array of the framework, [7, ...], uniform from 0 to 1.
        ops: Module with the framework's `cos` and `sin`.

    Returns:
        The columns (a, b, c, d, e, f), [...] each: output pixel (x, y) shows the input at
        (a*x + b*y + c, d*x + e*y + f), with x across and y down.
    """
    theta, shift_x, shift_y, shear, zoom_x, zoom_y = 2 * unit[:6] - 1
    theta = theta * math.radians(ROTATION_DEGREES)
    shear = shear * math.radians(SHEAR_DEGREES)
    shift_x, shift_y = shift_x * SHIFT_PIXELS, shift_y * SHIFT_PIXELS
    zoom_x, zoom_y = 1 + zoom_x * ZOOM, 1 + zoom_y * ZOOM
    flip = unit[6] < 0.5
    cos, sin = ops.cos(theta), ops.sin(theta)
    centre = IMAGE_SIZE / 2 - 0.5
    a, b = cos * zoom_x, -ops.sin(theta + shear) * zoom_y
    d, e = sin * zoom_x, ops.cos(theta + shear) * zoom_y
    c = cos * shift_x - sin * shift_y + centre - centre * (a + b)
    f = sin * shift_x + cos * shift_y + centre - centre * (d + e)
    sign, last = 1 - 2 * flip, flip * (IMAGE_SIZE - 1)
    return [sign * a, b, c + last * a, sign * d, e, f + last * d]


def train(
    epochs: int,
    train_epoch: Callable[[int], float],
    validate: Callable[[], float],
    about: dict[str, Any],
) -> None:
    """Train, and print one JSON line per epoch and a last one with the summary.

    Args:
        epochs: Number of passes over the training set.
        train_epoch: Trains the epoch with this number, from 0, waits for the device and returns
            the mean loss.
        validate: Waits for the device and returns the accuracy on the test images.
        about: Framework, device and options, for the summary.
    """
    seconds, accuracies = [], []
    begin = time.perf_counter()
    for epoch in range(epochs):
        start = time.perf_counter()
        loss = train_epoch(epoch)
        trained = time.perf_counter()
        accuracies.append(validate())
        validated = time.perf_counter()
        seconds.append(trained - start)
        record = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_accuracy": accuracies[-1],
            "seconds": seconds[-1],
            "validation_seconds": validated - trained,
        }
        print(json.dumps(record), flush=True)
    summary = {
        **about,
        "epochs": epochs,
        # Includes compilation.
        "first_epoch_seconds": seconds[0],
        "median_epoch_seconds": statistics.median(seconds[1:]) if epochs > 1 else None,
        "total_seconds": time.perf_counter() - begin,
        "val_accuracy_mean_last_5": statistics.fmean(accuracies[-5:]),
    }
    print(json.dumps(summary), flush=True)
