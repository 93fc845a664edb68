import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import job.data
from job.config import TrainConfig, UserError
from job.data import (
    Dataset,
    Location,
    ProgressBar,
    Source,
    get_source,
    load_ahead,
    load_dataset,
)


def test_limit_keeps_the_first_training_images_and_every_test_image(small_dataset: Dataset) -> None:
    limited = small_dataset.limited_to(100)
    np.testing.assert_array_equal(limited.train_images, small_dataset.train_images[:100])
    np.testing.assert_array_equal(limited.train_labels, small_dataset.train_labels[:100])
    assert len(limited.test_images) == len(small_dataset.test_images)


def test_a_limit_above_the_number_of_images_is_refused(small_dataset: Dataset) -> None:
    with pytest.raises(UserError, match="--limit received 513, expected at most the 512"):
        small_dataset.limited_to(513)


def test_fingerprint_changes_with_any_byte_or_label(small_dataset: Dataset) -> None:
    images, labels = small_dataset.train_images.copy(), small_dataset.test_labels.copy()
    images[3, 2, 1, 0] ^= 1
    labels[5] = (labels[5] + 1) % 10
    prints = {
        small_dataset.fingerprint,
        replace(small_dataset, train_images=images).fingerprint,
        replace(small_dataset, test_labels=labels).fingerprint,
        small_dataset.limited_to(511).fingerprint,
    }
    assert len(prints) == 4
    assert replace(small_dataset).fingerprint == small_dataset.fingerprint


@pytest.fixture
def downloads(small_dataset: Dataset) -> Iterator[list[ProgressBar | None]]:
    """The bars of the downloads of a custom data set, which must be downloaded once."""
    bars: list[ProgressBar | None] = []

    def find(config: TrainConfig) -> Location:
        return Location("here") if bars else Location("not here", download=(512, 300))

    module = ModuleType("job.data.mine")
    module.__dict__["SOURCE"] = Source(
        lambda config: small_dataset, find, lambda config, bar: bars.append(bar)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield bars


def test_a_missing_data_set_is_downloaded_and_limited(
    downloads: list[ProgressBar | None], small_dataset: Dataset
) -> None:
    class Bar:
        total = 0

        def update(self, amount: int) -> None: ...
        def reset(self) -> None: ...
        def close(self) -> None: ...

    bar = Bar()
    config = TrainConfig(dataset="mine", limit=100)
    assert len(load_dataset(config, bar).train_images) == 100
    assert load_dataset(replace(config, limit=None)) is small_dataset
    assert downloads == [bar]


def test_a_data_set_is_loaded_ahead_and_its_error_is_raised_later(
    monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    loaded = threading.Event()

    def load(config: TrainConfig) -> Dataset:
        loaded.set()
        return small_dataset

    monkeypatch.setattr("job.data.synthetic.SOURCE", Source(load))
    config = TrainConfig(dataset="synthetic", limit=100)
    ahead = load_ahead(config)
    assert loaded.wait(10)
    np.testing.assert_array_equal(ahead(config).train_images, small_dataset.train_images[:100])
    too_many = replace(config, limit=513)
    ahead = load_ahead(too_many)
    with pytest.raises(UserError, match="--limit received 513"):
        ahead(too_many)


def test_a_module_of_the_users_own_is_not_loaded_ahead(
    monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    threads = []

    def load(config: TrainConfig) -> Dataset:
        threads.append(threading.current_thread())
        return small_dataset

    module = ModuleType("job.data.mine")
    module.__dict__["SOURCE"] = Source(load)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = TrainConfig(dataset="mine")
    assert load_ahead(config)(config) is small_dataset
    assert threads == [threading.main_thread()]


def test_a_download_is_not_started_ahead(
    downloads: list[ProgressBar | None], monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    monkeypatch.setattr("job.data.is_user_module", lambda path: False)
    config = TrainConfig(dataset="mine")
    ahead = load_ahead(config)
    time.sleep(0.2)
    assert downloads == []
    assert ahead(config) is small_dataset
    assert len(downloads) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"test_labels": np.arange(1, 301) % 11}, "test labels from 0 to 10, expected 0 to 9"),
        ({"train_labels": np.zeros(511, np.int32)}, "training labels int32 (511,) for 512 images"),
        ({"train_images": np.zeros((512, 32, 32, 3))}, "training images float64 (512, 32, 32, 3)"),
        ({"test_images": np.zeros((300, 8, 8, 3), np.uint8)}, "test images uint8 (300, 8, 8, 3)"),
        ({"class_names": ("one",) * 10}, "expected 2 or more names"),
    ],
    ids=["label", "count", "type", "shape", "names"],
)
def test_arrays_that_do_not_fit_together_are_refused(
    small_dataset: Dataset, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        replace(small_dataset, **changes)


def test_a_data_set_without_its_own_find_is_described_by_its_module() -> None:
    source = Source(get_source("synthetic").load)
    config = TrainConfig(dataset="synthetic", data_dir=Path("nowhere"))
    assert source.find(config) == Location("read by job/data/synthetic.py")
    assert get_source("synthetic").find(config) == Location("drawn from seed 42")


def test_the_error_for_a_module_that_is_not_a_data_set_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("SOURCE = (")
    monkeypatch.setattr(job.data, "__path__", [*job.data.__path__, str(tmp_path)])
    with pytest.raises(
        UserError, match=r"job/data/broken.py: SyntaxError: .*\(broken.py, line 1\)"
    ):
        get_source("broken")
    with pytest.raises(
        UserError, match=r"job/data/image_files.py defines no SOURCE, expected Source"
    ):
        get_source("image_files")
