"""What commands print besides the log: safe names, whole lines, tables and progress bars."""

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
    r"""A name in one line, without anything that a terminal obeys: a newline becomes ``\n``.

    Args:
        name: As `os.fsdecode` gives it; bytes that are no UTF-8 become ``\xff``.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def padded(text: str, width: int) -> str:
    """Text with spaces behind it, to a width in columns of the terminal."""
    return text + " " * (width - cell_len(text))


def say(message: str) -> None:
    """Write a line of the program's own to stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        click.echo(f"cifar10-job: {message}", err=True)


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to stdout at once, so that whoever reads it never gets half a line.

    Raises:
        SystemExit: With exit code 0, if whoever read it has gone, as ``head`` does.
        UserError: If it cannot be written.
    """
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(ExitCode.DONE) from None
    except OSError as error:
        raise UserError(
            f"cannot write to standard output: {error.strerror}; {remedy(error)}, or send it "
            f"elsewhere"
        ) from error


def write_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]
) -> None:
    """Write a table to stdout.

    Args:
        columns: Their headings.
        rows: A cell for each column; what a terminal would obey in it is escaped.
        left: Headings of the columns that begin at the left, as text does.
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
    """A console on stdout, whatever variables such as FORCE_COLOR and COLUMNS say of it.

    They make no terminal of a pipe, and the size of a terminal is its own.
    """
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return Console(
        file=sys.stdout, force_terminal=log.on_terminal(), highlight=False, _environ=environ
    )


_GAP = "  "
_LEAST_BAR, _MOST_BAR = 8, 40


class DownloadBar:
    """A download's progress, a `job.data.ProgressBar`; it appears with the first bytes.

    Args:
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
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
        """Leave the screen."""
        self._progress.stop()


class EpochBar(Observer):
    """Where the training is, in one line.

    It appears when the training begins, until `close`.

    Args:
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
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
        """Leave the screen; from any thread."""
        self._live.stop()

    def begin(self, start: Start) -> None:
        if self._enabled:
            self._live.start()

    def evaluate(self) -> None:
        self.close()

    def show(self, status: Status) -> None:
        self._status = status


class StatusLine:
    """A status, the most important first, as far as the terminal has room for it."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if (status := self._status) is None:
            return
        # Room for the ^C that a terminal shows.
        width = options.max_width - 2
        head, text = f"epoch {status.epoch}/{status.epochs}", ""
        for part in (f"{status.steps}/{status.steps_per_epoch}", *_details(status)):
            if len(f"{head} {text}{_GAP}{part}") + _LEAST_BAR > width:
                break
            text += _GAP + part
        bar_width = min(width - len(f"{head} {text}"), _MOST_BAR)
        if bar_width < _LEAST_BAR:
            yield Text(head[:width])
            return
        is_known = status.phase == "training"
        yield Text(f"{head} ", end="")
        yield ProgressBar(status.steps_per_epoch, status.steps, width=bar_width, pulse=not is_known)
        yield Text(text)


def _details(status: Status) -> list[str]:
    """What there is to report of the phase, the most important first."""
    texts: list[str] = [] if status.phase == "training" else [status.phase]
    if status.seconds_left is not None:
        least = ">" if status.seconds_left_is_least else ""
        texts.append(f"{least}{timedelta(seconds=round(status.seconds_left))} left")
    if status.loss is not None and status.accuracy is not None:
        texts += [f"loss {status.loss:.4f}", f"acc {status.accuracy:.1%}"]
    if status.phase == "training" and status.images_per_second:
        texts.append(f"{status.images_per_second:,.0f} img/s")
    return texts
