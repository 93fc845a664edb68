"""The arrays that a run trains and evaluates on, whatever data set they come from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from job.config import TrainConfig, UserError, load_member


@dataclass(frozen=True)
class Dataset:
    """One data set in memory.

    Attributes:
        name: Its name on the command line.
        class_names: Name of each label, in the order of the labels.
        train_images: [train_examples, height, width, channels] uint8, 0 to 255.
        train_labels: [train_examples] int32, 0 to len(class_names) - 1.
        test_images: [test_examples, height, width, channels] uint8, 0 to 255.
        test_labels: [test_examples] int32, 0 to len(class_names) - 1.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int32]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int32]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the shapes and bytes of the four arrays."""
        return _sha256(self.train_images, self.train_labels, self.test_images, self.test_labels)

    @cached_property
    def test_fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the shapes and bytes of the test images and labels."""
        return _sha256(self.test_images, self.test_labels)

    def limited_to(self, train_examples: int) -> "Dataset":
        """This data set with only its first training images; the test images stay complete.

        Raises:
            UserError: If there are fewer training images than asked for.
        """
        require_limit(train_examples, len(self.train_images), self.name)
        return replace(
            self,
            train_images=self.train_images[:train_examples],
            train_labels=self.train_labels[:train_examples],
        )


def _sha256(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def require_limit(train_examples: int, available: int, name: str) -> None:
    """Refuse to take more training images than a data set has.

    Raises:
        UserError: If there are fewer.
    """
    if train_examples > available:
        raise UserError(
            f"--limit received {train_examples}, expected at most the {available} training "
            f"images of {name}; lower --limit or leave it out"
        )


@dataclass(frozen=True)
class Location:
    """What a data set would be loaded from.

    Attributes:
        description: For people.
        download: Training and test examples of what has to be downloaded first; None where nothing
            has to.
    """

    description: str
    download: tuple[int, int] | None = None


class ProgressBar(Protocol):
    """Shows a download's progress: the four members of a tqdm bar that pooch asks for."""

    total: int

    def update(self, amount: int) -> None:
        """Advance by this many bytes."""

    def reset(self) -> None:
        """Start again from zero bytes."""

    def close(self) -> None:
        """End."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from. The module ``job.data.<name>`` has one as ``SOURCE``.

    Attributes:
        load: Reads or draws the data set.
        find: Describes what `load` would take, and writes nothing.
        download: Brings into the data folder what `find` misses there.
    """

    load: Callable[[TrainConfig], Dataset]
    find: Callable[[TrainConfig], Location] = lambda config: Location(
        f"read by job/data/{config.dataset}.py"
    )
    download: Callable[[TrainConfig, ProgressBar | None], None] | None = None


def get_source(name: str) -> Source:
    """Import the data set of this name: the ``SOURCE`` of the module ``job.data.<name>``."""
    source: Source = load_member("data", name, "SOURCE")
    return source


def load_dataset(config: TrainConfig, bar: ProgressBar | None = None) -> Dataset:
    """Read, download or draw the data set that the configuration names.

    Args:
        config: Names it, and its folder.
        bar: Shows the progress of a download.

    Raises:
        UserError: If its files are missing, damaged or not what they should be.
        DownloadError: If they cannot be downloaded now.
    """
    source = get_source(config.dataset)
    if source.download and source.find(config).download:
        source.download(config, bar)
    dataset = source.load(config)
    return dataset if config.limit is None else dataset.limited_to(config.limit)
