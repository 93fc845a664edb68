"""The arrays that a run trains and evaluates on, from any data set."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from job.config import TrainConfig, UserError
from job.registry import is_user_module, load_member, module_path, require_parameters


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

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
            ValueError: If they do not fit together.
        """
        classes = len(self.class_names)
        if classes < 2 or len(set(self.class_names)) < classes:
            raise ValueError(f"received the classes {self.class_names}, expected 2 or more names")
        shape = self.train_images.shape[1:]
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
                raise ValueError(
                    f"received {part} images {images.dtype} {images.shape}, expected uint8 "
                    f"(examples, height, width, channels), the same shape in training and test"
                )
            if not len(images) or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"received {part} labels {labels.dtype} {labels.shape} for {len(images)} "
                    f"images, expected at least one image, and one integer label per image"
                )
            if labels.min() < 0 or labels.max() >= classes:
                raise ValueError(
                    f"received {part} labels from {labels.min()} to {labels.max()}, expected 0 to "
                    f"{classes - 1} for {classes} classes"
                )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the shapes and bytes of the four arrays."""
        return _sha256(self.train_images, self.train_labels, self.test_images, self.test_labels)

    @cached_property
    def test_fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the shapes and bytes of the test images and labels."""
        return _sha256(self.test_images, self.test_labels)

    def limited_to(self, train_examples: int) -> "Dataset":
        """Return this data set with only its first training images, and all its test images.

        Raises:
            UserError: If it has fewer training images.
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
    """Refuse a limit above the number of training images of a data set.

    Raises:
        UserError: If the data set has fewer training images.
    """
    if train_examples > available:
        raise UserError(
            f"--limit received {train_examples}, expected at most the {available} training "
            f"images of {name}; lower --limit or leave it out"
        )


@dataclass(frozen=True)
class Location:
    """The location from which a data set is loaded.

    Attributes:
        description: Text for people.
        download: Numbers of training and test examples if the data must be downloaded first; None
            if no download is needed.
    """

    description: str
    download: tuple[int, int] | None = None


class ProgressBar(Protocol):
    """Shows a download's progress: the four members of a tqdm bar that pooch requires."""

    total: int

    def update(self, amount: int) -> None:
        """Advance by this many bytes."""

    def reset(self) -> None:
        """Start again from zero bytes."""

    def close(self) -> None:
        """End."""


@dataclass(frozen=True)
class Source:
    """The source of a data set. The module ``job.data.<name>`` defines one as ``SOURCE``.

    Attributes:
        load: Reads or draws the data set.
        find: Describes the location that `load` reads from, and writes nothing.
        download: Downloads data that `find` does not find into the data folder.
    """

    load: Callable[[TrainConfig], Dataset]
    find: Callable[[TrainConfig], Location] = lambda config: Location(
        f"read by job/data/{config.dataset}.py"
    )
    download: Callable[[TrainConfig, ProgressBar | None], None] | None = None

    def __post_init__(self) -> None:
        """Refuse functions with other parameters.

        Raises:
            TypeError: If a function has other parameters.
        """
        require_parameters(self.load, "load", "config")
        require_parameters(self.find, "find", "config")
        if self.download:
            require_parameters(self.download, "download", "config", "bar")


def get_source(name: str) -> Source:
    """Import the data set of this name: the ``SOURCE`` of the module ``job.data.<name>``."""
    return load_member("data", name, "SOURCE", Source)


def find_dataset(config: TrainConfig) -> Location:
    """Find the location from which `load_dataset` would load the configured data set."""
    location = get_source(config.dataset).find(config)
    if not isinstance(location, Location):
        raise _wrong_result("find", config.dataset, location, Location)
    return location


def _wrong_result(function: str, dataset: str, result: object, expected: type) -> UserError:
    return UserError(
        f"{function} of --dataset {dataset} returns a {type(result).__name__}, expected a "
        f"{expected.__name__}; fix job/data/{dataset}.py"
    )


def load_dataset(config: TrainConfig, bar: ProgressBar | None = None) -> Dataset:
    """Read, download or draw the data set of a configuration.

    Args:
        config: Names the data set and its folder.
        bar: Shows the progress of a download.

    Raises:
        UserError: If the files are missing, damaged or other files than expected.
        DownloadError: If they cannot be downloaded now.
    """
    source = get_source(config.dataset)
    if source.download and find_dataset(config).download:
        source.download(config, bar)
    dataset = source.load(config)
    if not isinstance(dataset, Dataset):
        raise _wrong_result("load", config.dataset, dataset, Dataset)
    return dataset if config.limit is None else dataset.limited_to(config.limit)


def load_ahead(
    config: TrainConfig, bar: ProgressBar | None = None
) -> Callable[[TrainConfig], Dataset]:
    """Start loading the data set in a thread, to have it ready once TensorFlow is imported.

    A download starts only when the returned function is called, because the program's output is
    hidden while TensorFlow is imported. A module of the user's own is also imported only then,
    because it can import TensorFlow itself.

    Args:
        config: Names the data set and its folder.
        bar: Shows the progress of a download.

    Returns:
        `load_dataset` for this configuration; it waits for the thread and raises its error.
    """

    def load() -> Dataset | None:
        if is_user_module(module_path("data", config.dataset)) or find_dataset(config).download:
            return None
        dataset = load_dataset(config)
        # A run records them, and hashing takes time too.
        dataset.fingerprint, dataset.test_fingerprint  # noqa: B018
        return dataset

    thread = ThreadPoolExecutor(1)
    loading = thread.submit(load)
    thread.shutdown(wait=False)
    return lambda config: loading.result() or load_dataset(config, bar)
