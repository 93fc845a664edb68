import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job import log
from job.config import UserError
from job.report import page
from job.report.figures import draw_figures
from job.report.page import write_report
from job.run.attempt import hold_output_dir
from job.run.folder import OutputDir
from job.run.record import RunRecord
from job.run.stop import StopRequest
from tests.conftest import REPOSITORY, RunJob
from tests.run_folders import make_run


def test_the_report_is_a_page_and_its_pictures_and_each_has_its_bytes(whole: OutputDir) -> None:
    write_report(whole)
    figures = draw_figures(RunRecord.load(whole.path))
    files = {path.stem: path.read_bytes() for path in (whole.path / "report").iterdir()}
    assert files == {name: figure.png for name, figure in figures.items()}
    text = (whole.path / "report.html").read_text()
    assert all(figure.alt in html.unescape(text) for figure in figures.values())


def test_a_report_has_no_pictures_of_an_earlier_model(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ends=(("stopped", "SIGTERM"),))
    output.make_folder("report")
    output.write_text("report/mistakes.png", "of an earlier model")
    write_report(output)
    files = sorted(path.name for path in (output.path / "report").iterdir())
    assert files == ["accuracy.png", "loss.png", "throughput.png"]
    assert (output.path / "report.html").read_text().count("<img") == 3


def test_a_defect_of_drawing_is_told_and_spoils_nothing(
    whole: OutputDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a broken plot")

    monkeypatch.setattr(page, "draw_figures", broken)
    log.configure("json")
    page.try_to_write_report(whole)
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["level"]) == ("report_failed", "error")
    assert "ZeroDivisionError: a broken plot" in event["trace"]
    assert "everything but the report is in" in event["message"]


def test_a_report_that_cannot_be_written_is_an_error(whole: OutputDir) -> None:
    (whole.path / "report").write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot make the folder .*report: File exists"):
        page.try_to_write_report(whole)


def test_a_folder_without_a_run_is_refused_and_not_made(run_job: RunJob, tmp_path: Path) -> None:
    result = run_job("report", "nowhere")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nowhere holds no run: it has neither run.json nor metrics.jsonl nor" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_the_folder_either_way_gives_the_same_bytes_and_loads_no_tensorflow(
    run_job: RunJob, whole: OutputDir
) -> None:
    result = run_job("report", env={"JOB_OUTPUT_DIR": str(whole.path)})
    assert result.returncode == 0, result.stderr
    (event,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (event["event"], event["path"]) == ("report", str(whole.path / "report.html"))
    first = (whole.path / "report.html").read_bytes()
    (whole.path / "report.html").unlink()
    script = (
        "import sys\nfrom job.cli import cli\nfrom job.preemption import StopRequest\n"
        "cli(['report', sys.argv[1]], obj=StopRequest(), standalone_mode=False)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(whole.path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert (whole.path / "report.html").read_bytes() == first


def test_a_folder_that_a_training_holds_is_left_alone(run_job: RunJob, whole: OutputDir) -> None:
    with hold_output_dir(whole.path, StopRequest()):
        result = run_job("report", whole.path)
    assert result.returncode == 2
    assert "is in use by" in result.stderr
    assert not (whole.path / "report.html").exists()


def test_half_a_letter_in_a_runs_files_is_told_and_nothing_is_written(whole: OutputDir) -> None:
    write_report(whole)
    before = {path: path.read_bytes() for path in whole.path.rglob("*.*") if path.is_file()}
    document = json.loads((whole.path / "run.json").read_text())
    document["config"]["recipe"] = "\ud800"
    (whole.path / "run.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"hold half a letter, '\\ud800', expected text"):
        write_report(whole)
    del before[whole.path / "run.json"]
    assert {path: path.read_bytes() for path in before} == before
