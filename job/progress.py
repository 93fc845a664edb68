"""Progress bars on a terminal; nothing at all where stdout is not one."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def _console() -> Console:
    return Console(file=sys.stdout)


class DownloadBar:
    """A download's progress, with the four members of a tqdm bar that pooch asks for.

    Args:
        label: What is downloaded.
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
    """

    def __init__(self, label: str, *, enabled: bool) -> None:
        console = _console()
        self.total = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, amount: int) -> None:
        """Advance by this many bytes."""
        self._progress.update(self._task, advance=amount, total=self.total)

    def reset(self) -> None:
        """Start again from zero bytes."""
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        """Do nothing; the bar leaves the screen with its context."""


class EpochBar:
    """The steps of the epoch that is running.

    Args:
        epochs: Epochs of the whole run.
        steps_per_epoch: Steps until the bar is full.
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, *, enabled: bool) -> None:
        console = _console()
        self._epochs = epochs
        self._steps = steps_per_epoch
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps_per_epoch, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, epoch: int, steps_done: int, status: str) -> None:
        """Show an epoch's position and a short status such as its running loss."""
        self._progress.update(
            self._task,
            description=f"epoch {epoch}/{self._epochs}",
            completed=steps_done,
            status=status,
        )
