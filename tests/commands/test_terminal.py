import io
import os
import sys

import pytest

from job.commands.terminal import padded, printable, write_lines, write_table
from job.config import UserError

COLUMNS = ("run", "learning rate", "model")
ROWS = [("output/[a] sweep/seed-42", "0.001", "66.73%"), ("output/seed-7", "0.0003", "6.82%")]


class Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.seek(0)
        return self.read()


def open_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, **env: str) -> Terminal:
    # Not a fixture: pytest sets stdout anew before it calls the test.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # The variable is stale, as a script's may be.
    for name, value in {"TERM": "xterm", "COLUMNS": "1000", **env}.items():
        monkeypatch.setenv(name, value)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: size)
    return terminal


def test_names_are_printed_in_one_line_that_no_terminal_obeys() -> None:
    assert printable("größe 日本.png") == "größe 日本.png"
    assert printable("a\nb\x1b[31m\u202e") == r"a\nb\x1b[31m\u202e"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert printable("\ud800") == r"\ud800"  # JSON may hold it


def test_wide_letters_take_two_columns() -> None:
    assert padded("日本", 6) == "日本  "
    assert padded("longer", 3) == "longer"


def test_lines_are_written_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    write_lines(["größe", "b"])
    assert buffer.getvalue() == b"gr\\xf6\\xdfe\nb\n"


def test_a_reader_that_has_gone_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        write_lines(["a"])
    assert end.value.code == 0
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    with pytest.raises(UserError, match="cannot write to standard output: No space left"):
        write_lines(["a"])
    with pytest.raises(OSError, match="No space left"):
        sys.stdout.close()


def test_a_piped_table_is_plain_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    write_table(COLUMNS, ROWS, left=("run",))
    assert capsys.readouterr().out.splitlines() == [
        "run                       learning rate   model",
        "output/[a] sweep/seed-42          0.001  66.73%",
        "output/seed-7                    0.0003   6.82%",
    ]


def test_a_terminal_that_is_wide_enough_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch, 47)
    write_table(COLUMNS, ROWS, left=("run",))
    heading, first, _ = terminal.text().splitlines()
    assert "\x1b[1m" in heading
    assert first.split() == ["output/[a]", "sweep/seed-42", "0.001", "66.73%"]


@pytest.mark.parametrize("columns", [46, 20])
def test_a_narrow_terminal_gets_lists_in_which_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal = open_terminal(monkeypatch, columns, NO_COLOR="1")
    write_table(COLUMNS, ROWS, left=("run",))
    text = terminal.text()
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    for row in ROWS:
        for cell in row:
            assert cell.replace(" ", "") in "".join(text.split()), cell


@pytest.mark.parametrize("columns", [33, 80])
def test_no_cell_can_command_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = open_terminal(monkeypatch, columns, NO_COLOR="1")
    write_table(COLUMNS, [("a\x1b[2J\nb", "\x9b2J", "\r")], left=("run",))
    text = terminal.text()
    assert not {"\x1b", "\x9b", "\r"} & set(text)
    for cell in (r"a\x1b[2J\nb", r"\x9b2J", r"\r"):
        assert cell in text
