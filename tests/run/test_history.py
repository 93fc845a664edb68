import json
from pathlib import Path
from typing import Any

from job.run.checkpoint import History, Progress
from job.run.folder import OutputDir


def line(epoch: int, val_accuracy: float) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": val_accuracy}


def test_the_best_epoch_is_the_first_of_equals() -> None:
    history = History()
    assert history.best is None
    for epoch, accuracy in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        history.finish_epoch(line(epoch, accuracy))
    assert history.best == {"epoch": 2, "val_accuracy": 0.7}


def test_finishing_an_epoch_begins_the_next_one() -> None:
    history = History(progress=Progress(3, 1.5, 2), epoch_seconds=4.0)
    history.finish_epoch(line(1, 0.5))
    assert (history.progress, history.epoch_seconds) == (Progress(), 0.0)


def test_a_history_survives_json_to_the_last_bit() -> None:
    history = History([line(1, 0.1 + 0.2)], Progress(7, 1 / 3, 5), 0.7, 2.5)
    assert History.from_document(json.loads(json.dumps(history.document()))) == history


def test_metrics_are_the_whole_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    History([line(1, 0.5)]).write_metrics(OutputDir(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in lines] == [line(1, 0.5)]
