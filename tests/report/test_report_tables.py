from dataclasses import replace
from typing import Any

import pytest

from job.report import page
from job.run.folder import OutputDir
from job.run.record import RunRecord


@pytest.fixture
def record(whole: OutputDir) -> RunRecord:
    return RunRecord.load(whole.path)


def test_every_epoch_has_a_row(record: RunRecord) -> None:
    table = page.epochs(record)
    assert len(table.head) == 7
    assert table.rows[1] == ("2", "1.0000", "40.00%", "0.9500", "45.00%", "5.00", "502")
    assert len(table.rows) == 3


def test_the_confusion_matrix_has_the_classes_on_both_sides(record: RunRecord) -> None:
    table = page.confusion(record)
    assert list(table.head) == ["True class", "cat", "dog", "eel"]
    assert [row[0] for row in table.rows] == ["cat", "dog", "eel"]
    assert sum(int(cell) for row in table.rows for cell in row[1:]) == 200


def test_an_undefined_precision_is_said(record: RunRecord) -> None:
    classes = record.evaluation["classes"] | {
        "dog": {"precision": None, "recall": 0.0, "support": 7}
    }
    table = page.classes(replace(record, evaluation={"classes": classes}))
    assert table.rows[1] == ("dog", "undefined", "0.0%", "7")


def test_mistakes_are_listed_with_what_they_were_taken_for(record: RunRecord) -> None:
    table = page.mistakes(record)
    assert len(table.rows) == 16
    assert all(true != taken for _, true, taken, _ in table.rows)
    assert page.mistakes(replace(record, predictions=None)).rows == []


def test_every_attempt_tells_its_steps_and_its_end(record: RunRecord) -> None:
    attempts = record.manifest["attempts"]
    attempts[1] |= {"first_step": None, "end": None, "changes": ["threads: 1 -> 2"]}
    rows = page.attempts(record).rows
    assert [row[3] for row in rows] == ["0 to 15", "none", "30 to 45"]
    assert rows[1][1:3] == ("not known", "failed")
    assert rows[1][5] == "a broken GPU; threads: 1 -> 2"


def test_facts_are_told_with_units_and_words(record: RunRecord) -> None:
    record.manifest["precision"] = "bfloat16"
    facts: dict[str, Any] = {
        heading: dict(rows) for heading, _, rows in page.facts(record.manifest)
    }
    assert facts["Configuration"]["--batch-size"] == "256"
    assert facts["Devices"]["precision"].startswith("bfloat16, numbers of 16 bits with the range")
    assert facts["Devices"]["xla"] == "false"
    assert facts["Devices"]["device 1"] == "name CPU:0, model a processor, memory 23.5 GiB"
    assert facts["Versions"]["recipe fingerprint"] == "ef" * 32
    record.manifest["precision"] = "float8"
    assert ("precision", "float8") in page.facts(record.manifest)[1][2]
    assert page.facts({}) == []


def test_a_run_that_never_trained_has_facts_too(record: RunRecord) -> None:
    for name in ("devices", "data", "precision", "recipe_fingerprint"):
        record.manifest[name] = None
    headings = [heading for heading, _, _ in page.facts(record.manifest)]
    assert headings == ["Configuration", "Devices", "Data", "Versions"]
