"""The report of a run: one page that needs nothing else, and its pictures as files of their own."""

import logging
import traceback
from pathlib import Path

from job import log
from job.config import JobError, UserError
from job.output import PICTURES, REPORT, REPORT_PICTURES, OutputDir
from job.report_figures import draw_figures
from job.report_page import render
from job.run_record import RunRecord


def write_report(output: OutputDir) -> Path:
    """Write the report of the run in an output folder, from what the folder holds alone.

    Args:
        output: The folder, which receives the page and the pictures.

    Returns:
        The page.

    Raises:
        UserError: If the folder holds no run, one of its files cannot be used, or one cannot be
            written.
    """
    record = RunRecord.load(output.path)
    figures = draw_figures(record)
    page = render(record, figures)
    try:
        page.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the files of the run in {output.path} hold half a letter, "
            f"{error.object[error.start : error.end]!a}, expected text; mend run.json or "
            f"evaluation.json, or write them anew by training again with --fresh"
        ) from error
    output.make_folder(PICTURES)
    pictures = {f"{PICTURES}/{name}.png": figure.png for name, figure in figures.items()}
    for name, png in pictures.items():
        output.write_bytes(name, png)
    # Of what the folder no longer tells.
    output.remove([output.path / name for name in REPORT_PICTURES if name not in pictures])
    output.write_text(REPORT, page)
    path = output.path / REPORT
    log.event("report", path=str(path), message=f"report in {path}")
    return path


def try_to_write_report(output: OutputDir) -> None:
    """Write the report behind a training or an evaluation, which it must not spoil by a defect.

    Raises:
        UserError: If a file cannot be written.
        LeaseLostError: If the folder is another attempt's now.
    """
    try:
        write_report(output)
    except JobError:
        raise
    except Exception:
        log.event(
            "report_failed",
            logging.ERROR,
            trace=traceback.format_exc(),
            message=f"everything but the report is in {output.path}/; drawing the report failed, "
            f"which is a defect of the job: please report the trace\n{traceback.format_exc()}",
        )
