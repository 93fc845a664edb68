"""Terminal output other than the log: safe names, whole lines, tables and progress bars."""

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta

import click
from rich.cells import cell_len
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

from job import log
from job.config import ExitCode, UserError
from job.environment import remedy
from job.training.observer import Observer, Start, Status


def printable(name: str) -> str:
    r"""Escape a name so that it fits in one line and cannot control a terminal.

    Args:
        name: As returned by `os.fsdecode`.

    Returns:
        The name in which a newline is ``\n`` and a byte that is not UTF-8 is, for example,
        ``\xff``.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def padded(text: str, width: int) -> str:
    """Pad a text with spaces on the right, to a width in terminal columns."""
    return text + " " * (width - cell_len(text))


def print_message(message: str) -> None:
    """Write a message of the program to stderr; write errors are ignored."""
    with contextlib.suppress(OSError):
        click.echo(f"cifar10-job: {message}", err=True)


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to stdout in one call, so that the reader never gets half a line.

    Raises:
        SystemExit: With exit code 0, if the reader has closed the pipe, as ``head`` does.
        UserError: If stdout cannot be written.
    """
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(ExitCode.DONE) from None
    except OSError as error:
        raise UserError(
            f"cannot write to standard output: {error.strerror}; {remedy(error)}, or redirect it "
            f"elsewhere"
        ) from error


def write_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]
) -> None:
    """Write a table to stdout.

    Args:
        columns: Their headings.
        rows: One cell per column; control characters are escaped.
        left: Headings of the columns that are aligned left, as for text.
    """
    cells = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        aligned = [
            padded(cell, width) if heading in left else " " * (width - cell_len(cell)) + cell
            for cell, width, heading in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    write_lines(lines)


def open_console() -> Console:
    """Open a console on stdout that ignores variables such as FORCE_COLOR and COLUMNS.

    A pipe is never treated as a terminal, and the size is always that of the real terminal.
    """
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return Console(
        file=sys.stdout, force_terminal=log.on_terminal(), highlight=False, _environ=environ
    )


_GAP = "  "
_MIN_BAR, _MAX_BAR = 8, 40


class DownloadBar:
    """The progress bar of a download, a `job.data.ProgressBar`; it appears with the first bytes.

    Args:
        enabled: Whether to draw the bar; it cannot be combined with JSON logs.
    """

    def __init__(self, *, enabled: bool) -> None:
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
        self._task = self._progress.add_task("download", total=None)

    def update(self, amount: int) -> None:
        """Advance by this many bytes."""
        self._progress.start()
        self._progress.update(self._task, advance=amount, total=self.total)

    def reset(self) -> None:
        """Start again from zero bytes."""
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._progress.stop()


class EpochBar(Observer):
    """The progress of the training in one line.

    It is shown from the start of the training until `close`.

    Args:
        enabled: Whether to draw the bar; it cannot be combined with JSON logs.
    """

    def __init__(self, *, enabled: bool) -> None:
        console = open_console()
        self._status: Status | None = None
        self._live = Live(
            console=console,
            get_renderable=lambda: StatusLine(self._status),
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._enabled = enabled and console.is_interactive

    def close(self) -> None:
        """Remove the bar from the screen; can be called from any thread."""
        self._live.stop()

    def begin(self, start: Start) -> None:
        if self._enabled:
            self._live.start()

    def evaluate(self) -> None:
        self.close()

    def show(self, status: Status) -> None:
        self._status = status


class StatusLine:
    """A status in one line: the most important parts first, as many as fit on the terminal."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if (status := self._status) is None:
            return
        # Leaves room for the ^C that a terminal shows.
        width = options.max_width - 2
        head, text = f"epoch {status.epoch}/{status.epochs}", ""
        for part in (f"{status.steps}/{status.steps_per_epoch}", *_details(status)):
            if len(f"{head} {text}{_GAP}{part}") + _MIN_BAR > width:
                break
            text += _GAP + part
        bar_width = min(width - len(f"{head} {text}"), _MAX_BAR)
        if bar_width < _MIN_BAR:
            yield Text(head[:width])
            return
        is_training = status.phase == "training"
        yield Text(f"{head} ", end="")
        yield ProgressBar(
            status.steps_per_epoch, status.steps, width=bar_width, pulse=not is_training
        )
        yield Text(text)


def _details(status: Status) -> list[str]:
    """Return the parts of a status, the most important first."""
    texts: list[str] = [] if status.phase == "training" else [status.phase]
    if status.seconds_left is not None:
        least = ">" if status.seconds_left_is_least else ""
        texts.append(f"{least}{timedelta(seconds=round(status.seconds_left))} left")
    if status.loss is not None and status.accuracy is not None:
        texts += [f"loss {status.loss:.4f}", f"acc {status.accuracy:.1%}"]
    if status.phase == "training" and status.images_per_second:
        texts.append(f"{status.images_per_second:,.0f} img/s")
    return texts
