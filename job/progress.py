"""Progress bars on a terminal; nothing at all where stdout is not one."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.text import Text

from job.observer import Observer, Status
from job.terminal import open_console

_GAP = "  "
_LEAST_BAR, _MOST_BAR = 8, 40


class DownloadBar:
    """A download's progress, with the four members of a tqdm bar that pooch asks for.

    Args:
        label: What is downloaded.
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
    """

    def __init__(self, label: str, *, enabled: bool) -> None:
        console = open_console()
        self.total = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_interactive),
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


class EpochBar(Observer):
    """Where the training is: one line where it fits, else two; never longer than the terminal.

    Args:
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
    """

    def __init__(self, *, enabled: bool) -> None:
        console = open_console()
        self._status: Status | None = None
        self._live = Live(
            console=console,
            get_renderable=lambda: _StatusLines(self._status),
            transient=True,
            redirect_stderr=bool(sys.stderr and sys.stderr.isatty()),
        )
        self._enabled = enabled and console.is_interactive

    def __enter__(self) -> Self:
        if self._enabled:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def erase(self, _reason: str) -> None:
        """Clear the screen up before the process ends at once; from any thread."""
        self._live.stop()

    def show(self, status: Status) -> None:
        self._status = status


class _StatusLines:
    """A status laid out for the width of the terminal."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status = self._status
        if status is None:
            return
        # Room for the ^C that a terminal shows.
        width = options.max_width - 2
        head = f"epoch {status.epoch}/{status.epochs} "
        count = f" {status.steps}/{status.steps_per_epoch}"
        details = _details(status)
        left = [_time_left(status)] if status.seconds_left is not None else []
        one_line = _GAP.join(["", *details, *left])
        if len(head + count + one_line) + _LEAST_BAR <= width:
            first, second = count + one_line, ""
        else:
            first, second = _GAP.join([count, *left]), _as_many_as_fit(details, width)
        bar_width = min(width - len(head + first), _MOST_BAR)
        if bar_width < _LEAST_BAR:
            yield Text((head + first.lstrip())[:width])
        else:
            yield Text(head, end="")
            yield ProgressBar(
                status.steps_per_epoch,
                status.steps,
                width=bar_width,
                pulse=status.phase != "training",
            )
            yield Text(first)
        if second:
            yield Text(second)


def _details(status: Status) -> list[str]:
    """What there is to say about the phase, the most important first."""
    if status.phase == "compiling":
        return ["compiling"]
    texts = ["validating"] if status.phase == "validating" else []
    if status.loss is not None and status.accuracy is not None:
        texts += [f"loss {status.loss:.4f}", f"acc {status.accuracy:.1%}"]
    if status.phase == "training" and status.steps_per_second and status.images_per_second:
        texts += [
            f"{status.steps_per_second:,.1f} steps/s",
            f"{status.images_per_second:,.0f} img/s",
        ]
    return texts


def _time_left(status: Status) -> str:
    minutes, seconds = divmod(round(status.seconds_left or 0.0), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{'>' if status.seconds_left_is_least else ''}{clock} left"


def _as_many_as_fit(texts: list[str], width: int) -> str:
    for count in range(len(texts), 0, -1):
        line = _GAP.join(texts[:count])
        if len(line) <= width:
            return line
    return ""
