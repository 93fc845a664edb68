"""A data set that needs no files: ten classes of shapes, drawn from a seed.

It replaces CIFAR-10 where there is no network, with the same shapes, dtypes and counts. Every image
has its own position, size, tilt, colours and noise. The flips, shifts and small rotations of the
training augmentation do not change the class of an image.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from job.config import TrainConfig
from job.data import Dataset, Location, Source

CLASS_NAMES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "bars across",
    "bars upright",
    "checkers",
    "two discs",
)
TRAIN_EXAMPLES = 50_000
TEST_EXAMPLES = 10_000

_SIZE = 32
_CHUNK = 1_000  # images drawn at once; few enough for their intermediate arrays to fit the cache
_MIN_CONTRAST = 40
# Small, because augmentation smooths away the noise of training images, but not of test images.
_NOISE = 10

Array = npt.NDArray[Any]  # float32


def make_dataset(seed: int, limit: int | None = None) -> Dataset:
    """Draw the data set.

    Args:
        seed: Any non-negative integer; equal seeds draw equal bytes.
        limit: Number of training images to draw, from the first; None means all.

    Returns:
        50,000 training images, or the first `limit`, and 10,000 test images, all of 32x32x3. In the
        whole set the ten classes are equally frequent.
    """
    train_images, train_labels = draw(TRAIN_EXAMPLES, seed, stream=0, limit=limit)
    test_images, test_labels = draw(TEST_EXAMPLES, seed, stream=1)
    return Dataset("synthetic", CLASS_NAMES, train_images, train_labels, test_images, test_labels)


def save_examples(folder: str) -> None:
    """Save one image of each class under the name of the class; no training set contains it.

    The images are drawn from the default seed.

    Args:
        folder: The folder to save to; created if it is missing.
    """
    images, labels = draw(len(CLASS_NAMES), TrainConfig().seed, stream=2)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for pixels, label in zip(images, labels, strict=True):
        name = CLASS_NAMES[label].replace(" ", "-")
        Image.fromarray(pixels).save(Path(folder, f"{name}.png"))


def draw(
    examples: int, seed: int, stream: int, limit: int | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Draw labelled images.

    Args:
        examples: Number of images.
        seed: Seed of the data set.
        stream: Separates draws from the same seed, such as training and test images.
        limit: Number of images to draw, from the first; the same images as without a limit. None
            means all.

    Returns:
        Images [examples or limit, 32, 32, 3] uint8 and as many labels, int32, in random order.
    """
    rng = np.random.default_rng([seed, stream])
    labels = rng.permutation(np.arange(examples, dtype=np.int32) % len(CLASS_NAMES))
    # Whole chunks, because a shorter chunk would contain other images.
    needed = examples if limit is None else min(examples, -(-limit // _CHUNK) * _CHUNK)
    images = np.empty((needed, _SIZE, _SIZE, 3), np.uint8)
    for start in range(0, needed, _CHUNK):
        chunk = labels[start : start + _CHUNK]
        images[start : start + _CHUNK] = _paint(_cover(chunk, rng), rng)
    return images[:limit], labels[:limit]


def _cover(labels: npt.NDArray[np.int32], rng: np.random.Generator) -> Array:
    """Compute how much of each pixel the shape covers, [examples, 32, 32], 0 to 1."""
    shape = (len(labels), 1, 1)

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, shape).astype(np.float32)

    axis = np.arange(_SIZE, dtype=np.float32) - (_SIZE - 1) / 2
    across = axis[None, None, :] - uniform(-4, 4)
    down = axis[None, :, None] - uniform(-4, 4)
    tilt, radius = uniform(-0.3, 0.3), uniform(6, 11)
    u = np.cos(tilt) * across + np.sin(tilt) * down
    v = np.cos(tilt) * down - np.sin(tilt) * across

    cover = np.empty(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for label in range(len(CLASS_NAMES)):
        rows = labels == label
        # A shape is defined by its signed distance in pixels. Its edge is one pixel wide.
        cover[rows] = np.clip(0.5 - _distance(label, u[rows], v[rows], radius[rows]), 0, 1)
    return cover


def _distance(label: int, u: Array, v: Array, radius: Array) -> Array:
    """Signed distance in pixels to the outline of a class's shape; negative inside.

    Args:
        label: The class.
        u: [examples, 32, 32], across, in pixels from the shape's centre.
        v: [examples, 32, 32], down, in pixels from the shape's centre.
        radius: [examples, 1, 1], half the shape's extent in pixels.
    """
    width = 0.3 * radius

    def square(half: Array) -> Array:
        return np.maximum(np.abs(u), np.abs(v)) - half

    def bars(along: Array) -> Array:
        gap: Array = np.abs(along % (2 * width) - width)
        return gap - width / 2

    distance: Array
    match CLASS_NAMES[label]:
        case "disc":
            distance = np.hypot(u, v) - radius
        case "ring":
            distance = np.abs(np.hypot(u, v) - radius + width / 2) - width / 2
        case "square":
            distance = square(0.9 * radius)
        case "frame":
            distance = np.abs(square(0.9 * radius - width / 2)) - width / 2
        case "triangle":
            distance = np.maximum(0.87 * np.abs(u) - 0.5 * v - radius / 2, v - radius / 2)
        case "cross":
            arms = np.minimum(np.abs(u), np.abs(v)) - width
            distance = np.maximum(arms, square(radius))
        case "bars across":
            distance = np.maximum(bars(v), square(radius))
        case "bars upright":
            distance = np.maximum(bars(u), square(radius))
        case "checkers":
            signs = np.sign(bars(u)) * np.sign(bars(v))
            edges = np.minimum(np.abs(bars(u)), np.abs(bars(v)))
            distance = np.maximum(signs * edges, square(radius))
        case _:
            distance = np.hypot(np.abs(u) - 0.6 * radius, v) - 0.5 * radius
    return distance


def _paint(cover: Array, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Colour the shape and its background and add noise: [examples, 32, 32, 3] uint8."""
    examples = len(cover)
    background = rng.integers(0, 256, (examples, 1, 1, 3)).astype(np.float32)
    # Each channel becomes brighter or darker, whichever has more room, so every shape is visible.
    contrast = rng.integers(_MIN_CONTRAST, 129, background.shape)
    contrast = np.where(background < 128, contrast, -contrast).astype(np.float32)
    noise = rng.integers(-_NOISE, _NOISE + 1, (*cover.shape, 3), np.int8)
    painted: Array = np.clip(background + cover[..., None] * contrast + noise, 0, 255)
    return painted.astype(np.uint8)


SOURCE = Source(
    load=lambda config: make_dataset(config.seed, config.limit),
    find=lambda config: Location(f"drawn from seed {config.seed}"),
)
