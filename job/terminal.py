"""What commands print besides the log: safe names, whole lines, tables that nothing is cut off."""

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Sequence

import click
from rich import cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from job import log
from job.config import ExitCode, UserError


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


def count(number: int, noun: str) -> str:
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
