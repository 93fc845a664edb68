import contextlib
import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from job import log
from job.cluster.devices import Compilation, Devices
from job.config import StoppedError, TrainConfig, UserError
from job.run.checkpoint import CheckpointStore
from job.run.folder import OutputDir
from job.run.lease import LeaseLostError
from job.training import compile_cache
from job.training.compile_cache import CompileCache, Entry, Store, open_compile_cache
from tests.conftest import REPOSITORY, MakeDevices

# Protobuf messages: a string, and an integer followed by a string.
KERNELS = b"\x0a\xc8\x01" + b"k" * 200
AUTOTUNING = b"\x08\x03\x12\x04best"
NEW = KERNELS + b"\x0a\x03new"

Damage = Callable[[Path], object]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    log.configure("text")
    return TrainConfig(output_dir=tmp_path / "output")


@pytest.fixture
def gpu(make_devices: MakeDevices) -> Devices:
    """Devices with the compilation settings of a single GPU."""
    return make_devices(1, compilation=Compilation(network=True, elementwise=True, loops=True))


def file_of(cache: CompileCache, flag: str) -> Path:
    """The file in a flag for XLA."""
    found = re.search(rf"--{flag}=(\S+)", cache.flags)
    assert found
    return Path(found[1])


def compile_all(cache: CompileCache, kernels: bytes, autotuning: bytes = AUTOTUNING) -> None:
    """Write the files that XLA writes after compiling."""
    file_of(cache, "xla_gpu_kernel_cache_file").write_bytes(kernels)
    file_of(cache, "xla_gpu_dump_autotune_results_to").write_bytes(autotuning)


@contextlib.contextmanager
def opened(config: TrainConfig, devices: Devices) -> Iterator[CompileCache | None]:
    with open_compile_cache(config, devices) as caches:
        cache = next(iter(caches), None)
        assert cache is None or isinstance(cache, CompileCache)
        yield cache


def attempt(config: TrainConfig, devices: Devices, kernels: bytes) -> bytes | None:
    """Run an attempt that compiles. Return the kernels that XLA finds; None without a cache."""
    with opened(config, devices) as cache:
        if cache is None:
            return None
        found = file_of(cache, "xla_gpu_kernel_cache_file").read_bytes()
        compile_all(cache, kernels)
    return found


def entry_of(config: TrainConfig) -> Path:
    return entry_in(config.output_dir / "compile-cache")


def entry_in(folder: Path) -> Path:
    (entry,) = folder.glob("*.xla-cache")
    return entry


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def exchange(path: Path, make: Damage) -> None:
    path.rename(path.with_name("before"))
    make(path)


def of_another_key(path: Path) -> None:
    other = Store(path.parent, "0" * 64)
    other.write(Entry("0" * 64, KERNELS, AUTOTUNING))
    other.path.replace(path)


def of_another_version(path: Path) -> None:
    payload = msgspec.msgpack.encode({"kernels": KERNELS})
    path.write_bytes(compile_cache._head(payload) + payload)


def link_to(path: Path) -> None:
    """Create a link to a file that the job wrote."""
    path.symlink_to(path.with_name("before"))


DAMAGED_ENTRIES: dict[str, Damage] = {
    "truncated": cut,
    "altered byte": alter,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign content": lambda path: path.write_bytes(b"\x7fELF" + path.read_bytes()[4:]),
    "other key": of_another_key,
    "other version": of_another_version,
    "others can write": lambda path: path.chmod(0o620),
    "foreign owner": lambda path: os.chown(path, 12345, -1),
    "link": lambda path: exchange(path, link_to),
    "pipe": lambda path: exchange(path, os.mkfifo),
    "too large": lambda path: os.truncate(path, compile_cache.MAX_BYTES + 1),
}


@pytest.mark.parametrize("damage", DAMAGED_ENTRIES)
def test_a_damaged_entry_costs_one_compilation(
    config: TrainConfig, gpu: Devices, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    if damage == "foreign owner" and os.geteuid():
        pytest.skip("only root can give files away")
    assert attempt(config, gpu, KERNELS) == b""
    assert attempt(config, gpu, KERNELS) == KERNELS
    assert "warning" not in capsys.readouterr().out
    DAMAGED_ENTRIES[damage](entry_of(config))
    assert attempt(config, gpu, NEW) == b""
    assert capsys.readouterr().out.count("warning: compile cache: ") == 1
    assert attempt(config, gpu, NEW) == NEW
    assert "warning" not in capsys.readouterr().out


DAMAGED_FOLDERS: dict[str, Damage] = {
    "others can write": lambda folder: folder.chmod(0o770),
    "foreign owner": lambda folder: os.chown(folder, 12345, -1),
    "link": lambda folder: exchange(folder, link_to),
    "file": lambda folder: exchange(folder, Path.touch),
    "folder in the entry's place": lambda folder: exchange(entry_in(folder), Path.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGED_FOLDERS)
def test_an_unusable_folder_is_one_warning(
    config: TrainConfig, gpu: Devices, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    if damage == "foreign owner" and os.geteuid():
        pytest.skip("only root can give folders away")
    attempt(config, gpu, KERNELS)
    DAMAGED_FOLDERS[damage](config.output_dir / "compile-cache")
    assert attempt(config, gpu, NEW) in (None, b"")
    assert capsys.readouterr().out.count("warning: compile cache: ") == 1


def test_a_folder_that_cannot_be_created_is_one_warning(
    config: TrainConfig, gpu: Devices, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, compile_cache=Path("/proc/self/cache"))
    assert attempt(config, gpu, KERNELS) is None
    assert "warning: compile cache: cannot use /proc/self/cache: " in capsys.readouterr().out


def test_a_folder_that_becomes_unwritable_is_one_warning(
    config: TrainConfig, gpu: Devices, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(config, gpu) as cache:
        assert cache
        compile_all(cache, KERNELS)
        (config.output_dir / "compile-cache").rmdir()
    assert capsys.readouterr().out.count("warning: compile cache: cannot write ") == 1


def test_a_full_disk_is_one_warning_and_the_previous_entry_is_kept(
    config: TrainConfig, gpu: Devices, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(config, gpu, KERNELS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with opened(config, gpu) as cache:
            assert cache
            compile_all(cache, NEW)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            cache.keep()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("warning: compile cache: cannot write ") == 1
    assert [path.name for path in entry_of(config).parent.iterdir()] == [entry_of(config).name]
    assert attempt(config, gpu, KERNELS) == KERNELS


def test_after_two_concurrent_writers_the_entry_of_the_last_is_complete(
    config: TrainConfig, gpu: Devices
) -> None:
    with opened(config, gpu) as last:
        assert attempt(config, gpu, NEW) == b""
        assert last
        compile_all(last, KERNELS)
    assert attempt(config, gpu, KERNELS) == KERNELS


def test_a_stop_after_the_first_epoch_does_not_read_files_that_xla_can_be_writing(
    config: TrainConfig, gpu: Devices
) -> None:
    with contextlib.suppress(StoppedError), opened(config, gpu) as cache:
        assert cache
        compile_all(cache, KERNELS)
        cache.finish_epoch(None)  # type: ignore[arg-type]
        compile_all(cache, NEW[:-1])
        raise StoppedError
    assert attempt(config, gpu, KERNELS) == KERNELS


def test_the_code_of_the_first_epoch_is_kept_if_the_process_is_killed_later(
    config: TrainConfig, gpu: Devices
) -> None:
    with opened(config, gpu) as cache:
        assert cache
        compile_all(cache, KERNELS)
        cache.finish_epoch(None)  # type: ignore[arg-type]
        assert attempt(config, gpu, KERNELS) == KERNELS


def test_a_stop_keeps_the_entry_and_only_an_unknown_error_removes_it(
    config: TrainConfig, gpu: Devices
) -> None:
    with contextlib.suppress(StoppedError), opened(config, gpu) as cache:
        assert cache
        compile_all(cache, KERNELS)
        raise StoppedError
    for error in (UserError("a batch that is too large"), LeaseLostError("another attempt")):
        with contextlib.suppress(type(error)), opened(config, gpu):
            raise error
    assert attempt(config, gpu, KERNELS) == KERNELS
    with contextlib.suppress(RuntimeError), opened(config, gpu):
        raise RuntimeError("INTERNAL: a kernel cannot be loaded")
    assert attempt(config, gpu, KERNELS) == b""


def native_flags() -> str:
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return (getenv(b"XLA_FLAGS") or b"").decode()


def test_only_native_code_receives_the_flags_and_the_users_flags_are_last(
    config: TrainConfig, gpu: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = "--xla_gpu_autotune_level=0"
    monkeypatch.setenv("XLA_FLAGS", users)
    for has_autotuning in (False, True):
        with opened(config, gpu) as cache:
            assert cache
            assert native_flags() == f"{cache.flags} {users}"
            assert ("load_autotune_results_from" in cache.flags) == has_autotuning
            assert os.environ["XLA_FLAGS"] == users
            compile_all(cache, KERNELS)
        assert native_flags() == users


def test_other_flags_and_devices_have_other_entries(
    config: TrainConfig, gpu: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(config, gpu, KERNELS)
    assert attempt(config, replace(gpu, deterministic=True), KERNELS) == b""
    named = replace(gpu, descriptions=(msgspec.structs.replace(gpu.descriptions[0], model="X"),))
    assert attempt(config, named, KERNELS) == b""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_ftz=true")
    assert attempt(config, gpu, KERNELS) == b""
    assert attempt(config, gpu, KERNELS) == KERNELS


def test_without_a_cache_no_folder_is_created(
    config: TrainConfig, gpu: Devices, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attempt(config, make_devices(1), KERNELS) is None
    monkeypatch.setenv("XLA_FLAGS", "a-file-with-flags")
    assert attempt(config, gpu, KERNELS) is None
    assert not config.output_dir.exists()


def test_the_oldest_entries_are_removed_and_other_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 1000)
    (tmp_path / "mine").write_bytes(b"m" * 2000)
    (tmp_path / ".killed.xla-cache").write_bytes(b"h" * 500)
    os.utime(tmp_path / ".killed.xla-cache", (0, 0))
    for number in range(4):
        store = Store(tmp_path, str(number))
        store.write(Entry(str(number), KERNELS))
        os.utime(store.path, (1 + number, 1 + number))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("mine", "1.xla-cache", "2.xla-cache", "3.xla-cache")
    }
    store.write(Entry("3", KERNELS * 10))
    assert store.read() == Entry("3")


RUN = """
import sys
from dataclasses import replace
from pathlib import Path

from job import log
from job.commands.cli import load_tensorflow
from job.config import TrainConfig
from job.run.attempt import open_attempt
from job.run.stop import StopRequest, Watchdog

load_tensorflow()
from job.cluster.devices import open_devices
from job.data import load_dataset
from job.training import compile_cache
from job.training.train import run_attempt

log.configure("text")
config = TrainConfig(Path(sys.argv[1]), dataset="synthetic", limit=512, epochs=1)
stop, cpu = StopRequest(), open_devices(config)
gpu = replace(cpu, compilation=replace(cpu.compilation, loops=True))
folder = config.output_dir / compile_cache.FOLDER
folder.mkdir(mode=0o700, parents=True)
(folder / f"{compile_cache._key(gpu)}.xla-cache").write_bytes(b"damaged")
with (
    open_attempt(config, stop) as attempt,
    compile_cache.open_compile_cache(config, gpu) as observers,
):
    watchdog = Watchdog(config.stall_timeout, stop.end_hung)
    run_attempt(config, attempt, lambda *_: cpu, load_dataset, watchdog, observers)
"""


@pytest.mark.slow
def test_xla_accepts_the_flags_and_a_run_with_a_damaged_entry_succeeds(tmp_path: Path) -> None:
    output, users_flags = tmp_path / "output", f"--xla_dump_to={tmp_path / 'dump'}"
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(output)],
        cwd=REPOSITORY,
        env={**os.environ, "XLA_FLAGS": users_flags},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: compile cache: ") == 1
    assert "is damaged; it was removed" in result.stdout
    assert (output / "report.html").exists()
    assert (tmp_path / "dump").exists()  # XLA has read the flags
    checkpoint = CheckpointStore(OutputDir(output)).load_latest()
    assert checkpoint
    assert checkpoint.fingerprint.environment.variables["XLA_FLAGS"] == users_flags
