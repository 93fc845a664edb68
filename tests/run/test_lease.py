import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from job import log
from job.cluster.scheduler import RunIdentity
from job.config import ExitCode, UserError
from job.run import lease
from job.run.lease import Holder, Lease, LeaseLostError
from job.run.stop import StopRequest
from tests.conftest import REPOSITORY

NOBODY = RunIdentity(None)
JOB = RunIdentity("slurm job 1")
OTHER_JOB = RunIdentity("slurm job 2")

HOLDER = """
import sys, time
from pathlib import Path
from job.cluster.scheduler import RunIdentity
from job.run.stop import StopRequest
from job.run.lease import acquire
stop = StopRequest()
stop.defer()
held = acquire(Path(sys.argv[1]), RunIdentity(sys.argv[2] or None), stop)
print("held", flush=True)
while not stop.reason: time.sleep(0.05)
print(stop.reason, flush=True)
try: held.check()
except Exception as error: print(type(error).__name__, flush=True)
held.release()
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "UNRENEWED_SECONDS", 1.0)
    monkeypatch.setattr(lease, "HANDOVER_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)


@pytest.fixture
def different_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call reports another kernel, so that only the counter in the lease decides."""
    numbers = itertools.count()
    monkeypatch.setattr(lease, "kernel_of", lambda path: f"kernel {next(numbers)}")


def make_stop() -> StopRequest:
    stop = StopRequest()
    stop.defer()
    return stop


def acquire(folder: Path, identity: RunIdentity = NOBODY, stop: StopRequest | None = None) -> Lease:
    return lease.acquire(folder, identity, stop or make_stop())


def leave_dead(folder: Path, identity: RunIdentity = NOBODY) -> Lease:
    """Leave the lease of a holder that has died without releasing it."""
    held = acquire(folder, identity)
    (path,) = (folder / ".lease").iterdir()
    content = path.read_bytes()
    held.release()
    path.write_bytes(content)
    return held


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def test_a_released_lease_is_free_immediately(tmp_path: Path) -> None:
    for _ in range(3):
        assert seconds(lambda: acquire(tmp_path).release()) < 0.5
    assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["00000003"]


def test_a_live_holder_is_named_and_keeps_the_folder(tmp_path: Path) -> None:
    held = acquire(tmp_path, OTHER_JOB)
    with pytest.raises(
        UserError, match=f"{tmp_path} is in use by slurm job 2, process .* on host .* since"
    ) as error:
        acquire(tmp_path, JOB)
    assert error.value.exit_code == ExitCode.USER_ERROR
    held.check()
    held.release()


@pytest.mark.usefixtures("different_hosts")
def test_a_lease_released_on_another_host_is_free_immediately(tmp_path: Path) -> None:
    held = acquire(tmp_path)
    assert lease.read_holder(tmp_path) is not None
    held.release()
    assert lease.read_holder(tmp_path) is None
    assert seconds(lambda: acquire(tmp_path).release()) < 0.5


@pytest.mark.usefixtures("different_hosts")
def test_a_live_holder_on_another_host_is_recognized_by_its_counter(tmp_path: Path) -> None:
    held = acquire(tmp_path)
    with pytest.raises(UserError, match=r"is in use by process \d+ on host"):
        acquire(tmp_path)
    held.release()


@pytest.mark.usefixtures("different_hosts")
@pytest.mark.parametrize("first", [NOBODY, JOB, OTHER_JOB])
def test_a_dead_holder_on_another_host_is_waited_for(
    tmp_path: Path, first: RunIdentity, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    dead = leave_dead(tmp_path, first)
    assert 0.9 <= seconds(lambda: acquire(tmp_path, JOB).release()) < 5
    event = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (event["event"], event["level"]) == ("waiting", "warning")
    with pytest.raises(LeaseLostError, match="was taken over by slurm job 1"):
        dead.check()


@contextmanager
def holding(folder: Path, run: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, run],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_holder_killed_on_the_same_host_is_replaced_immediately(tmp_path: Path) -> None:
    with holding(tmp_path), pytest.raises(UserError, match="in use"):
        acquire(tmp_path)
    assert seconds(lambda: acquire(tmp_path).release()) < 0.5


def test_the_holder_is_read_without_requesting_the_folder(tmp_path: Path) -> None:
    assert lease.read_holder(tmp_path) is None
    with holding(tmp_path, "slurm job 1"):
        for _ in range(2):
            holder = lease.read_holder(tmp_path)
            assert holder is not None
            assert (holder.run, holder.attempt) == ("slurm job 1", 0)
    assert lease.read_holder(tmp_path) is None  # it was killed
    held = acquire(tmp_path)
    assert str(lease.read_holder(tmp_path)).startswith("process ")
    held.release()
    assert lease.read_holder(tmp_path) is None
    for path in (tmp_path / ".lease").iterdir():
        path.unlink()
    assert lease.read_holder(tmp_path) is None
    (tmp_path / ".lease" / "00000001").mkdir()
    with pytest.raises(UserError, match=r"cannot use the lease .*: Is a directory"):
        lease.read_holder(tmp_path)


def test_a_holder_that_was_suspended_finds_its_lease_taken(tmp_path: Path) -> None:
    with holding(tmp_path, "slurm job 1") as holder:
        holder.send_signal(signal.SIGSTOP)
        held = acquire(tmp_path, JOB)
        holder.send_signal(signal.SIGCONT)
        output, _ = holder.communicate(timeout=30)
    reason, error = output.splitlines()
    assert "was taken over by slurm job 1" in reason
    assert error == "LeaseLostError"
    held.check()
    held.release()


def test_an_older_attempt_of_the_same_run_is_requested_to_stop_and_then_replaced(
    tmp_path: Path,
) -> None:
    stop = make_stop()
    held = acquire(tmp_path, JOB, stop)

    def save_and_release() -> None:
        while not stop.reason:
            time.sleep(0.01)
        held.check()  # it can still save its work
        held.release()

    thread = threading.Thread(target=save_and_release)
    thread.start()
    acquire(tmp_path, JOB).release()
    thread.join()
    assert stop.reason
    assert stop.reason.startswith("a newer attempt of slurm job 1 on host")
    assert stop.advice == "that attempt resumes the run"


def test_an_older_attempt_that_does_not_stop_is_replaced(tmp_path: Path) -> None:
    stop = make_stop()
    held = acquire(tmp_path, JOB, stop)
    assert 0.9 <= seconds(lambda: acquire(tmp_path, JOB).release()) < 5
    with pytest.raises(LeaseLostError):
        held.check()


def test_an_attempt_that_could_not_resume_the_run_requests_no_stop(tmp_path: Path) -> None:
    stop = make_stop()
    held = acquire(tmp_path, JOB, stop)

    def refuse() -> None:
        raise UserError("--seed received 43, expected 42")

    with pytest.raises(UserError, match="--seed"):
        lease.acquire(tmp_path, JOB, make_stop(), refuse)
    time.sleep(0.5)
    assert stop.reason is None
    held.check()
    held.release()


@pytest.mark.usefixtures("different_hosts")
def test_a_volume_that_does_not_respond_does_not_make_a_holder_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead(tmp_path)
    read = lease.read_lease
    reads = itertools.count()

    def slow(path: Path) -> Holder | None:
        holder = read(path)
        if next(reads) == 1:
            time.sleep(2.0)  # longer than the lease; the holder could not write either
        return holder

    monkeypatch.setattr(lease, "read_lease", slow)
    assert seconds(lambda: acquire(tmp_path).release()) > 3.0


def test_a_newer_attempt_of_the_same_run_is_not_replaced(tmp_path: Path) -> None:
    held = acquire(tmp_path, RunIdentity("slurm job 1", attempt=2))
    with pytest.raises(LeaseLostError, match="is held by a newer attempt of this run"):
        acquire(tmp_path, RunIdentity("slurm job 1", attempt=1))
    held.check()
    held.release()


def test_a_second_training_in_the_same_allocation_is_refused(tmp_path: Path) -> None:
    held = acquire(tmp_path, RunIdentity("slurm job 1", attempt=0))
    with pytest.raises(UserError, match="is in use by slurm job 1, process"):
        acquire(tmp_path, RunIdentity("slurm job 1", attempt=0))
    held.check()
    held.release()


@pytest.mark.usefixtures("different_hosts")
def test_one_of_many_waiters_replaces_a_dead_holder(tmp_path: Path) -> None:
    leave_dead(tmp_path)

    def attempt(_: int) -> Lease | None:
        try:
            return acquire(tmp_path)
        except UserError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [held for held in pool.map(attempt, range(8)) if held]
    assert len(winners) == 1
    winners[0].check()
    winners[0].release()


def test_only_one_of_two_waiters_takes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waiter read the latest lease before the first one took the folder."""
    winner = acquire(tmp_path)
    latest, outdated = lease.latest_generation, [0]

    def read_latest(folder: Path) -> int:
        is_second = threading.current_thread() is threading.main_thread()
        return outdated.pop() if is_second and outdated else latest(folder)

    monkeypatch.setattr(lease, "latest_generation", read_latest)
    with pytest.raises(UserError, match="is in use by"):
        acquire(tmp_path)
    assert not outdated
    winner.check()
    winner.release()


def test_the_lease_of_a_holder_that_died_while_creating_it_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".lease" / "00000001").touch()
    assert 1.4 <= seconds(lambda: acquire(tmp_path).release()) < 5


def test_clocks_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(1_000_000, -1)
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    held = acquire(tmp_path)
    time.sleep(0.5)
    held.check()
    with pytest.raises(UserError, match="in use"):
        acquire(tmp_path)
    held.release()
    acquire(tmp_path).release()


def test_a_removed_lease_is_reported(tmp_path: Path) -> None:
    held = acquire(tmp_path)
    (tmp_path / ".lease" / "00000001").unlink()
    with pytest.raises(UserError, match=r"the lease .* is missing, expected it to exist"):
        held.check()
    held.release()


def test_a_missing_volume_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    stop = make_stop()
    held = acquire(folder, stop=stop)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"lease .*00000001: No such file or directory"):
        held.check()
    deadline = time.monotonic() + 10
    while not stop.reason and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stop.reason
    assert "the lease cannot be renewed" in stop.reason
    with pytest.raises(UserError, match="cannot use the lease"):
        acquire(folder)
