import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from job import log


def test_a_json_line_contains_time_level_event_and_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("json")
    log.event("epoch", epoch=3, loss=0.5)
    line = json.loads(capsys.readouterr().out)
    assert list(line) == ["time", "level", "event", "epoch", "loss"]
    assert (line["level"], line["event"], line["epoch"], line["loss"]) == ("info", "epoch", 3, 0.5)
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert line["time"].endswith("Z")


def test_text_shows_the_message_or_otherwise_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text")
    log.event("epoch", epoch=3, message="epoch 3 of 5")
    log.event("retry", logging.WARNING, count=2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" epoch 3 of 5")
    assert second.endswith(" warning: retry count=2")


def test_auto_is_json_if_stdout_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("auto")
    assert log.is_json()
    log.configure("text")
    assert not log.is_json()


def test_an_event_is_one_line_even_if_it_is_longer_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log.configure("auto")
    log.event("epoch", message="epoch 3 of 5 " + "and so on " * 20)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" epoch 3 of 5 " + "and so on " * 20)


def test_events_contain_the_rank_of_their_worker(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        log.configure("json", worker=rank)
        log.event("retry", count=2)
        log.configure("text", worker=rank)
        log.event("retry", count=2)
    chief, chief_text, other, other_text = capsys.readouterr().out.splitlines()
    assert list(json.loads(chief)) == ["time", "level", "event", "worker", "count"]
    assert [json.loads(line)["worker"] for line in (chief, other)] == [0, 1]
    assert (
        chief_text[len("12:00:00") :] == " retry count=2"
    )  # the chief's lines concern the whole run
    assert other_text[len("12:00:00") :] == " worker 1: retry count=2"
