from pathlib import Path

from job.run.checkpoint import History
from job.training.train import UnwrittenDir


def test_a_worker_that_is_not_the_chief_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("the chief's")
    output = UnwrittenDir(tmp_path)
    output.write_json("run.json", {"of": "another"})
    output.write_text("report.html", "text")
    output.append_bytes("events", b"content")
    output.make_folder("checkpoints")
    History().write_metrics(output)
    output.remove([tmp_path / "run.json"])
    output.discard()
    output.check()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "the chief's"
