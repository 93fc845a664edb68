import functools
import hashlib
import http.server
import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job import log
from job.config import TrainConfig, UserError
from job.data import Dataset, cifar10, load_dataset

NOWHERE = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # the discard port: nothing listens


def batch(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    whole = {
        "data": rng.integers(0, 256, (10_000, 3_072), np.uint8),
        "labels": [index % 10 for index in range(10_000)],
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


@pytest.fixture(scope="module")
def good_batch() -> bytes:
    return pickle.dumps(batch(), protocol=3)


def write_folder(data_dir: Path, good: bytes, **files: bytes) -> Path:
    folder = data_dir / cifar10.FOLDER_NAME
    folder.mkdir(parents=True)
    for name in (*cifar10.TRAIN_FILES, cifar10.TEST_FILE):
        (folder / name).write_bytes(files.get(name, good))
    return folder


@pytest.fixture(scope="module")
def good_archive(good_batch: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / cifar10.ARCHIVE_NAME
    write_archive(path, good_batch, ("batches.meta", *cifar10.TRAIN_FILES, cifar10.TEST_FILE))
    return path


def write_archive(path: Path, good: bytes, names: tuple[str, ...]) -> None:
    # Noise cannot be compressed; it would only take its time.
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name in names:
            member = tarfile.TarInfo(f"{cifar10.FOLDER_NAME}/{name}")
            member.size = len(good)
            tar.addfile(member, io.BytesIO(good))


def load(data_dir: Path, url: str = NOWHERE) -> Dataset:
    """Load CIFAR-10 as a run does, which downloads it from an address if it is not there."""
    return load_dataset(TrainConfig(data_dir=data_dir, cifar10_url=url))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[str]:
    """Serve the folder ``served`` of the test on loopback; gives the archive's address."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{cifar10.ARCHIVE_NAME}"
        server.shutdown()
        thread.join()


def test_reads_a_folder_in_order_and_channels_last(tmp_path: Path, good_batch: bytes) -> None:
    write_folder(tmp_path, good_batch)
    dataset = load(tmp_path)
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    row = batch()["data"][7]
    assert dataset.test_images[7, 2, 5, 1] == row[1 * 1024 + 2 * 32 + 5]
    np.testing.assert_array_equal(dataset.train_labels[:12], [*range(10), 0, 1])
    assert dataset.train_labels.dtype == np.int32


def test_reads_the_archive(good_archive: Path) -> None:
    assert len(load(good_archive.parent).train_images) == 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": np.zeros((9_999, 3_072), np.uint8)},
            r"data uint8 \(9999, 3072\), expected uint8",
        ),
        ({"data": np.zeros((10_000, 3_072), np.float32)}, "data float32 .*, expected uint8"),
        ({"data": [1, 2]}, r"data int64 \(2,\)"),
        ({"labels": None}, r"KeyError: 'labels'\), expected a pickled dictionary with 'data'"),
        ({"labels": [10] * 10_000}, "labels from 10 to 10, expected labels from 0 to 9"),
        ({"labels": [-1] * 10_000}, "labels from -1 to -1"),
        ({"labels": [0] * 9_999}, r"labels int64 \(9999,\), expected 10000 integers"),
        ({"labels": ["cat"] * 10_000}, "labels <U3 .*, expected 10000 integers"),
    ],
)
def test_a_wrong_batch_file_is_refused_by_name(
    tmp_path: Path, good_batch: bytes, changes: dict[str, Any], message: str
) -> None:
    bad = pickle.dumps(batch(**changes), protocol=3)
    folder = write_folder(tmp_path, good_batch, data_batch_3=bad)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert str(folder / "data_batch_3") in str(error.value)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, good_batch: bytes) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "attacked",))

    write_folder(tmp_path, good_batch, test_batch=pickle.dumps(Attack(), protocol=3))
    with pytest.raises(UserError, match="only NumPy arrays are allowed"):
        load(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_truncated_batch_file_is_refused(tmp_path: Path, good_batch: bytes) -> None:
    write_folder(tmp_path, good_batch, data_batch_1=good_batch[:5_000])
    with pytest.raises(UserError, match=r"data_batch_1.*cannot be read"):
        load(tmp_path)


def test_a_missing_batch_file_is_named(tmp_path: Path, good_batch: bytes) -> None:
    folder = write_folder(tmp_path, good_batch)
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4: No such file"):
        load(tmp_path)


def test_a_truncated_or_damaged_archive_is_refused(tmp_path: Path, good_archive: Path) -> None:
    archive, content = tmp_path / cifar10.ARCHIVE_NAME, good_archive.read_bytes()
    wrong_checksum = bytearray(content)
    wrong_checksum[-8] ^= 1  # of the CRC-32 that ends a gzip stream
    size = len(content)
    for damaged in (b"", content[: size // 2], content[: int(0.999 * size)], wrong_checksum):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or damaged"):
            load(tmp_path)


def test_an_archive_of_something_else_is_refused(tmp_path: Path, good_batch: bytes) -> None:
    write_archive(tmp_path / cifar10.ARCHIVE_NAME, good_batch, ("data_batch_1",))
    with pytest.raises(UserError, match="holds no cifar-10-batches-py/data_batch_2"):
        load(tmp_path)


def test_no_data_and_no_network_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not give it .*--dataset synthetic"):
        load(tmp_path / "data", NOWHERE)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_with_the_wrong_checksum_is_not_kept(tmp_path: Path, serve: str) -> None:
    (tmp_path / "served" / cifar10.ARCHIVE_NAME).write_bytes(b"not the archive")
    with pytest.raises(UserError, match="not the official archive: expected SHA-256 6d958be0"):
        load(tmp_path / "data", serve)
    assert list((tmp_path / "data").iterdir()) == []


def test_an_address_without_the_archive_is_named_with_its_answer(
    tmp_path: Path, serve: str
) -> None:
    with pytest.raises(UserError, match=r"does not give it \(HTTP 404\)"):
        load(tmp_path / "data", serve)


def test_no_secret_of_an_address_is_told(
    tmp_path: Path, serve: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    url = serve.replace("://", "://me:hunter2@") + "?token=hunter2"
    with pytest.raises(UserError, match="REMOVED@") as error:
        load(tmp_path / "data", url)
    said = f"{error.value} {capsys.readouterr().out}"
    assert "hunter2" not in said
    found = cifar10.find(TrainConfig(data_dir=tmp_path / "nothing", cifar10_url=url))
    assert "hunter2" not in found.description


def test_a_verified_download_is_kept_and_read(
    tmp_path: Path, serve: str, good_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served" / cifar10.ARCHIVE_NAME
    shutil.copy(good_archive, served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", digest)
    dataset = load(tmp_path / "data", serve)
    assert len(dataset.test_images) == 10_000
    served.unlink()
    again = load(tmp_path / "data", serve)
    assert again.fingerprint == dataset.fingerprint


def test_a_data_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data-dir .* cannot be written there: Not a directory"):
        load(tmp_path / "file" / "data", NOWHERE)
