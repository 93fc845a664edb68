"""What commands print besides the log: safe names, whole lines, tables and progress bars."""

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

import click
from rich import cells
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
from rich.table import Table
from rich.text import Text

from job import log
from job.config import ExitCode, UserError
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
    return text + " " * (width - cells.cell_len(text))


def plural(number: int, noun: str) -> str:
    """A number of things: ``1 image``, ``10,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
    if sys.stdout is None:
        return
    text = "".join(f"{line}\n" for line in lines)
    encoding = sys.stdout.encoding
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(ExitCode.DONE) from None
    except OSError as error:
        raise UserError(
            f"cannot write to standard output: {error.strerror}; free some space, or send it "
            f"elsewhere"
        ) from error


def write_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]
) -> None:
    """Write a table to stdout; on a terminal too narrow for it, each row as a list.

    Args:
        columns: Their headings.
        rows: A cell for each column; what a terminal would obey in it is escaped.
        left: Headings of the columns that begin at the left, as text does.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    rows = [[printable(cell) for cell in row] for row in rows]
    for row in rows:
        table.add_row(*map(Text, row))
    console = open_console()
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    if not console.is_terminal or needed <= console.width:
        console.width = needed
        tables = [table]
    else:
        tables = [_record(columns, row) for row in rows]
    with console.capture() as captured:
        for number, part in enumerate(tables):
            console.print(*([""] if number else []), part, sep="\n")
    write_lines(line.rstrip() for line in captured.get().splitlines())


def _record(columns: Sequence[str], row: Sequence[str]) -> Table:
    record = Table(box=None, pad_edge=False, show_header=False)
    record.add_column(no_wrap=True, style="bold")
    record.add_column(overflow="fold")
    for heading, cell in zip(columns, row, strict=True):
        record.add_row(heading, Text(cell))
    return record


def open_console() -> Console:
    """A console on stdout, whatever variables such as FORCE_COLOR and COLUMNS say of it.

    They make no terminal of a pipe, and the size of a terminal is its own.
    """
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    on_terminal = log.on_terminal()
    # rich would keep bold letters; with NO_COLOR there is to be no escape sequence at all.
    plain = bool(environ.get("NO_COLOR")) or not on_terminal
    return Console(
        file=sys.stdout,
        force_terminal=on_terminal,
        color_system=None if plain else "auto",
        highlight=False,
        _environ=environ,
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

    def __enter__(self) -> Self:
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
        self._progress.start()
        self._progress.update(self._task, advance=amount, total=self.total)

    def reset(self) -> None:
        """Start again from zero bytes."""
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        """Leave the screen."""
        self._progress.stop()


class EpochBar(Observer):
    """Where the training is: one line where it fits, else two; never longer than the terminal.

    It appears when the training begins and leaves the screen with its context.

    Args:
        enabled: Whether to draw at all; JSON logs and a bar do not mix.
    """

    def __init__(self, *, enabled: bool) -> None:
        console = open_console()
        self._status: Status | None = None
        self._live = Live(
            console=console,
            get_renderable=lambda: StatusLines(self._status),
            transient=True,
            redirect_stderr=bool(sys.stderr and sys.stderr.isatty()),
        )
        self._enabled = enabled and console.is_interactive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def erase(self, _exit_code: ExitCode, _reason: str) -> None:
        """Clear the screen up before the process ends at once; from any thread."""
        self._live.stop()

    def begin(self, start: Start) -> None:
        if self._enabled:
            self._live.start()

    def evaluate(self) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        self._status = status


class StatusLines:
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
