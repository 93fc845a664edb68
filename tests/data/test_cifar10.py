import bz2
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job import log
from job.config import DownloadError, TrainConfig, UserError
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
    # Noise cannot be compressed; trying would only take time.
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name in names:
            member = tarfile.TarInfo(f"{cifar10.FOLDER_NAME}/{name}")
            member.size = len(good)
            tar.addfile(member, io.BytesIO(good))


def load(data_dir: Path, url: str = NOWHERE) -> Dataset:
    """Load CIFAR-10 as a run does, and download it from an address if it is missing."""
    return load_dataset(TrainConfig(data_dir=data_dir, cifar10_url=url))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waits between two tries of a download, and do not wait."""
    waits: list[float] = []
    sleep = time.sleep

    def record(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
        else:  # a thread that an earlier test has started
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", record)
    return waits


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def answering(*answers: Answer) -> Iterator[str]:
    """Yield the address of a server that sends these answers, one per request."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left.pop(0)(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{cifar10.ARCHIVE_NAME}"
        finally:
            server.shutdown()
            thread.join()
    assert left == []


def status(code: int, **headers: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()

    return answer


def content(sent: bytes, length: int | None = None, **headers: str) -> Answer:
    """Send these bytes, and announce them or another length."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        length_header = {"Content_Length": str(len(sent) if length is None else length)}
        status(200, **length_header, **headers)(request)
        request.wfile.write(sent)

    return answer


def reset(request: http.server.BaseHTTPRequestHandler) -> None:
    """Drop the connection, like a server that restarts."""
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[str]:
    """Serve the folder ``served`` of the test on loopback, and yield the archive's address."""
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
def test_the_error_for_a_wrong_batch_file_names_it(
    tmp_path: Path, good_batch: bytes, changes: dict[str, Any], message: str
) -> None:
    bad = pickle.dumps(batch(**changes), protocol=3).ljust(len(good_batch))
    folder = write_folder(tmp_path, good_batch, data_batch_3=bad)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert str(folder / "data_batch_3") in str(error.value)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, good_batch: bytes) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "attacked",))

    attack = pickle.dumps(Attack(), protocol=3).ljust(len(good_batch))
    write_folder(tmp_path, good_batch, test_batch=attack)
    with pytest.raises(UserError, match="only NumPy arrays are allowed"):
        load(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_missing_or_truncated_batch_file_is_named(tmp_path: Path, good_batch: bytes) -> None:
    folder = write_folder(tmp_path, good_batch, test_batch=good_batch[:20_000_000])
    for name in ("test_batch", "data_batch_4"):
        for data_dir in (tmp_path, folder):
            with pytest.raises(UserError, match=rf"received {folder}/ without a complete {name}"):
                load(data_dir)
        (folder / "data_batch_4").unlink(missing_ok=True)


def test_a_truncated_or_damaged_archive_is_refused(tmp_path: Path, good_archive: Path) -> None:
    content = good_archive.read_bytes()
    wrong_checksum = bytearray(content)
    wrong_checksum[-8] ^= 1  # of the CRC-32 that ends a gzip stream
    size = len(content)
    small = bytes(100_000)
    for name, damaged in (
        (".gz", content[: size // 2]),
        (".gz", content[: int(0.999 * size)]),
        (".gz", wrong_checksum),
        (".xz", lzma.compress(small)[:-20]),
        (".xz", lzma.compress(small)[:40] + bytes(60)),
        (".bz2", bz2.compress(small)[:-5]),
        (".bz2", bz2.compress(small)[:-5] + bytes(5)),
    ):
        archive = tmp_path / f"cifar-10-python.tar{name}"
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{archive} is truncated, damaged or not an archive"):
            load(tmp_path)
        archive.unlink()


def test_an_archive_of_something_else_is_refused(tmp_path: Path, good_batch: bytes) -> None:
    write_archive(tmp_path / cifar10.ARCHIVE_NAME, good_batch, ("data_batch_1",))
    with pytest.raises(UserError, match="contains no cifar-10-batches-py/data_batch_2"):
        load(tmp_path)


def place(path: Path, source: Path) -> None:
    """Link a file to another path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.hardlink_to(source)


@pytest.mark.parametrize(
    "name",
    [
        "cifar-10-python (1).tar.gz",
        "cifar-10-python.tar.gz.1",
        "cifar-10-python.tgz",
        "cifar-10-batches-py.tar.gz",
        "Copy of cifar-10-python.tar.gz",
        "cifar10/cifar-10-python.tar.gz",
    ],
)
def test_an_archive_is_found_under_another_name(
    tmp_path: Path, good_archive: Path, name: str
) -> None:
    place(tmp_path / name, good_archive)
    write_folder(tmp_path, b"half unpacked")
    (tmp_path / cifar10.ARCHIVE_NAME).touch()
    found = cifar10.find(TrainConfig(data_dir=tmp_path))
    assert (found.description, found.download) == (f"in {tmp_path / name}", None)
    assert cifar10.find(TrainConfig(data_dir=tmp_path / name)) == found


def test_data_in_other_folders_and_archives_is_found(tmp_path: Path, good_batch: bytes) -> None:
    folder = write_folder(tmp_path / "mine", good_batch)
    for name in ("mine/batches", "Cifar-10-Batches-py (1)"):
        folder = folder.rename(tmp_path / name)
        for data_dir in (folder, folder.parent, tmp_path):
            assert cifar10.find(TrainConfig(data_dir=data_dir)).description == f"in {folder}"
    (tmp_path / "too/deep").mkdir(parents=True)
    folder = folder.rename(tmp_path / "too/deep/batches")
    with tarfile.open(tmp_path / "cifar-10-python.tar", "w") as tar:
        tar.add(folder, "./somewhere")
    assert len(load(tmp_path).test_images) == 10_000


@pytest.mark.parametrize(
    "name",
    [
        "cifar-10-binary.tar.gz",
        "data_batch_1.bin",
        "cifar-10-batches-mat/data_batch_1.mat",
        "trainLabels.csv",
        "train.7z",
        "train/1.png",
        "cifar-10-python.tar.gz.part",
        "cifar-10.zip",
        "mine/data_batch_1",
        "cifar-10-python.tar.gz",
        "cifar-10-python.tar.gz -> nowhere",
        "cifar-10-batches-py -> nowhere",
    ],
)
def test_files_that_only_look_like_the_data_are_an_error(tmp_path: Path, name: str) -> None:
    name, _, target = name.partition(" -> ")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if target:
        path.symlink_to(target)
    else:
        path.touch()
    named = path.parent if path.name == "data_batch_1" else path
    with pytest.raises(UserError, match=rf"received {named}.*, expected one cifar-10-batches-py/"):
        load(tmp_path)


def test_the_name_of_a_missing_archive_is_not_used_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"typo/c.tgz received .*/c.tgz, which does not exist"):
        load(tmp_path / "typo" / "c.tgz")


def test_other_files_do_not_prevent_a_download(tmp_path: Path) -> None:
    for name in (
        "cifar-100-python.tar.gz",
        "cifar-100-python/train",
        "cifar-10-batches-py",
        "cifar10/",
        "cifar10.py",
        "cifar10.log",
        "cifar-10-python.tar.gz.sha256",
        "1.png",
        "photos/1.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
    assert cifar10.find(TrainConfig(data_dir=tmp_path)).download == (50_000, 10_000)


def test_two_archives_are_an_error(tmp_path: Path, good_archive: Path) -> None:
    for number in (1, 2):
        place(tmp_path / f"cifar-10-python ({number}).tar.gz", good_archive)
    with pytest.raises(UserError, match=r"\(1\).tar.gz, .*\(2\).tar.gz, expected one"):
        load(tmp_path)


def test_without_data_and_network_the_error_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"failed \(Connection refused, 6 tries\)"):
        load(tmp_path / "data", NOWHERE)
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(UserError, match=r"received 'file:///x', expected .* begins with https://"):
        load(tmp_path / "data", "file:///x")


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Bytes that count as the official archive."""
    archive = gzip.compress(bytes(range(256)) * 1_000, 0)
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    return archive


def test_after_a_passing_network_error_the_download_is_tried_again(
    tmp_path: Path, official: bytes, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    data_dir = tmp_path / "data"
    cut = content(official[:1_000], len(official))

    def ends_early(request: http.server.BaseHTTPRequestHandler) -> None:
        status(200)(request)
        request.wfile.write(official[:1_000])

    busy = status(429, Retry_After="25")
    answers = (status(503, Retry_After="soon"), busy, cut, reset, ends_early, content(official))
    with answering(*answers) as url:
        cifar10.download(TrainConfig(data_dir=data_dir, cifar10_url=url), None)
    assert waits == [2, 25, 8, 16, 30]
    reasons = [json.loads(line).get("reason") for line in capsys.readouterr().out.splitlines()]
    assert reasons[:3] == [None, "HTTP 503", "HTTP 429"]
    assert "more expected" in reasons[3]
    assert reasons[4:6] == ["Connection reset by peer", "the transfer ended early"]
    assert [path.name for path in data_dir.iterdir()] == [cifar10.ARCHIVE_NAME]
    assert (data_dir / cifar10.ARCHIVE_NAME).read_bytes() == official


@pytest.mark.parametrize(
    ("variables", "url", "reason"),
    [
        ({"REQUESTS_CA_BUNDLE": "/nowhere"}, "https://127.0.0.1:9/x", "bundle, .* path: /nowhere"),
        ({"REQUESTS_CA_BUNDLE": __file__}, "https://127.0.0.1:PORT/x", "NO_CERTIFICATE"),
        ({"http_proxy": "socks5://127.0.0.1:9"}, "http://mirror/x", "SOCKS proxies are not"),
        ({"http_proxy": "http://"}, "http://mirror/x", "the proxy's address is not valid"),
        ({}, "http://me:hunter2@[/x?token=hunter2", "the address is not valid"),
    ],
)
def test_after_a_lasting_error_the_download_is_not_tried_again(
    tmp_path: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    listener: socket.socket,
    variables: dict[str, str],
    url: str,
    reason: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"failed \(.*{reason}") as error:
        load(tmp_path / "data", url.replace("PORT", str(listener.getsockname()[1])))
    assert "hunter2" not in str(error.value)
    assert waits == []


def test_a_download_labelled_as_compressed_is_accepted(tmp_path: Path, official: bytes) -> None:
    archive = tmp_path / cifar10.ARCHIVE_NAME
    for sent in (official, gzip.compress(official, 0)):
        with answering(content(sent, Content_Encoding="gzip")) as url:
            cifar10.download(TrainConfig(data_dir=tmp_path, cifar10_url=url), None)
        assert archive.read_bytes() == official
        archive.unlink()


def test_a_download_with_a_wrong_checksum_is_deleted(tmp_path: Path, serve: str) -> None:
    (tmp_path / "served" / cifar10.ARCHIVE_NAME).write_bytes(b"not the archive")
    with pytest.raises(UserError, match=r"not the official archive: .* expected SHA-256 6d958be0"):
        load(tmp_path / "data", serve)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_error_for_an_address_without_the_archive_has_the_http_status(
    tmp_path: Path, serve: str, waits: list[float]
) -> None:
    with pytest.raises(UserError, match=r"failed \(HTTP 404\)"):
        load(tmp_path / "data", serve)
    assert waits == []


def test_no_message_contains_a_secret_of_an_address(
    tmp_path: Path, serve: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    url = serve.replace("://", "://me:hunter2@") + "?token=hunter2"
    with pytest.raises(UserError, match="REMOVED@") as error:
        load(tmp_path / "data", url)
    messages = f"{error.value} {capsys.readouterr().out}"
    assert "hunter2" not in messages
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


def test_a_data_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data-dir .* cannot be written there: Not a directory"):
        load(tmp_path / "file" / "data", NOWHERE)
