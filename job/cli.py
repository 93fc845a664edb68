"""The command line: each command parses its options, builds one configuration and makes one call.

TensorFlow is imported inside the commands that need it, so that ``--help`` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from job import __version__, config, log
from job.config import TrainConfig
from job.options import (
    FOLDER,
    OwnPictureType,
    data_options,
    devices_option,
    expect_mount_option,
    log_format_option,
    model_dir_option,
    option,
    output_dir_argument,
    output_dir_option,
    require_gpus_option,
    run_id_option,
    stall_timeout_option,
    train_config,
    training_options,
    warn_of_misspelt_variables,
)
from job.preemption import StopRequest

_MODEL_FILE = click.Path(path_type=Path, dir_okay=False)
_PNG_FILE = OwnPictureType(dir_okay=False)


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="cifar10-job")
def cli() -> None:
    """Train CIFAR-10 data-parallel on every visible GPU, as a batch job.

    Every option is also an environment variable. Exit codes: 0 done, 1 a defect, 2 you must change
    something, 3 a GPU is missing, 75 stopped: the same command goes on.
    """


@cli.command()
@output_dir_option
@data_options
@training_options
@devices_option
@require_gpus_option
@stall_timeout_option
@run_id_option
@expect_mount_option
@log_format_option
@option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.pass_obj
def train(
    stop: StopRequest,
    /,
    log_format: log.LogFormat,
    expect_mount: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train, and leave model, evaluation, prediction picture and report in the output folder.

    A run that was stopped or killed goes on where its last checkpoint was; a finished one is done.
    """
    log.configure(log_format)
    warn_of_misspelt_variables(train, os.environ)
    run_config = train_config(options)
    from job.attempt import open_attempt
    from job.cluster import cluster_spec
    from job.folders import warn_unless_mounted

    spec = cluster_spec(os.environ)
    if expect_mount and spec.is_chief:
        warn_unless_mounted(run_config.output_dir)
    if dry_run:
        _load_tensorflow()
        from job.dry_run import print_dry_run

        print_dry_run(run_config, stop)
        return
    if spec.count > 1:
        log.configure(log_format, worker=spec.index)
        _load_tensorflow()
        from job.multi_worker import train_together

        train_together(run_config, spec, stop)
        return
    with open_attempt(run_config, stop) as attempt:
        if attempt.is_finished:
            from job.finished import report_finished

            report_finished(run_config, attempt)
            return
        _load_tensorflow()
        from job.train import train_and_evaluate

        train_and_evaluate(run_config, attempt)


@cli.command()
@output_dir_option
@data_options
@option(
    "--recipe",
    type=click.Choice(config.RECIPES),
    default="classic",
    help="The recipe that the model was trained with.",
)
@devices_option
@require_gpus_option
@stall_timeout_option
@log_format_option
@click.pass_obj
def evaluate(stop: StopRequest, /, log_format: log.LogFormat, **options: Any) -> None:
    """Evaluate the model of an output folder again, and draw its pictures and report again."""
    log.configure(log_format)
    warn_of_misspelt_variables(evaluate, os.environ)
    run_config = train_config(options)
    from job.attempt import hold_output_dir
    from job.folders import require_model
    from job.output import MODEL

    require_model(run_config.output_dir / MODEL)
    with hold_output_dir(run_config.output_dir, stop, brief=True) as output:
        _load_tensorflow()
        from job.saved_model import evaluate_output_dir

        evaluate_output_dir(run_config, output)


@cli.command()
@output_dir_argument
@log_format_option
@click.pass_obj
def report(stop: StopRequest, /, log_format: log.LogFormat, output_dir: Path) -> None:
    """Draw the report of the run in OUTPUT_DIR again: report.html and the pictures in report/.

    It takes what the folder holds, also of a run that is not finished. OUTPUT_DIR is also the
    environment variable JOB_OUTPUT_DIR, by default output.
    """
    log.configure(log_format)
    from job.attempt import hold_output_dir
    from job.report import write_report
    from job.run_record import RunRecord

    RunRecord.load(output_dir)  # before a folder is made where there is none
    with hold_output_dir(output_dir, stop, brief=True) as output:
        write_report(output)


@cli.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@model_dir_option
@option("--model", type=_MODEL_FILE, help="Model file, instead of that of --output-dir.")
@option("--top", type=click.IntRange(min=1), default=3, help="Classes to report of each image.")
@option("--json", is_flag=True, help="Write JSON lines.")
@option(
    "--png",
    type=_PNG_FILE,
    help="Also draw the first 100 images with their classes, into a new file or over an earlier "
    "such picture, never over another file.",
)
@devices_option
@require_gpus_option
@click.pass_obj
def predict(stop: StopRequest, /, images: tuple[str, ...], **options: Any) -> None:
    """Predict the classes of images: files of any format and size, folders, - for standard input.

    Images that cannot be read are named and counted, and the exit code is then 2.
    """
    log.configure("text")  # stdout is for the predictions
    stop.advice = "run the same command again"
    png = options["png"]
    from job.folders import require_folder_for, require_model
    from job.images import find_images, require_no_source
    from job.output import MODEL

    path = options["model"] or options["output_dir"] / MODEL
    require_model(path)
    if png:
        require_folder_for(png)
    sources = find_images(images)
    if png:
        require_no_source(png, sources)
    _load_tensorflow()
    from job.predict import predict_images

    run_config = TrainConfig(devices=options["devices"], require_gpus=options["require_gpus"])
    top, as_json = options["top"], options["json"]
    predict_images(run_config, path, sources, top, as_json=as_json, png=png)


@cli.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@option("--json", is_flag=True, help="Write one JSON object instead of tables.")
@option(
    "--png",
    type=_PNG_FILE,
    help="Also draw the runs' curves and accuracies, into a new file or over an earlier such "
    "picture.",
)
def compare(folders: tuple[str, ...], **options: Any) -> None:
    """Compare runs by their output folders, or folders of such: means, deviations, the best.

    Runs that are not finished are told and left out of the means.
    """
    log.configure("text")  # stdout is for the comparison
    from job.compare import compare_runs, save_picture
    from job.compare_tables import write_tables
    from job.folders import require_folder_for
    from job.terminal import printable, say, write_lines

    png = options["png"]
    if png:
        require_folder_for(png)
    comparison = compare_runs(folders)
    if options["json"]:
        write_lines([json.dumps(comparison.document(), indent=2)])
    else:
        write_tables(comparison)
    for folder, reason in comparison.left_out.items():
        say(f"left out: {printable(folder)}: {printable(reason)}")
    if png:
        save_picture(png, comparison)


@cli.command()
@output_dir_option
@option("--data-dir", type=FOLDER, default="data", help="Folder that holds the data set.")
@require_gpus_option
@log_format_option
def doctor(log_format: log.LogFormat, output_dir: Path, data_dir: Path, require_gpus: int) -> None:
    """Examine this machine: versions, GPUs, a test computation, folders."""
    log.configure(log_format)
    startup_lines = _load_tensorflow(verbose=True)
    from job.doctor import as_text, examine

    folders = [("--output-dir", output_dir), ("--data-dir", data_dir)]
    report, exit_code = examine(folders, require_gpus, startup_lines)
    click.echo(json.dumps(report) if log.is_json() else as_text(report))
    sys.exit(exit_code)


def _load_tensorflow(*, verbose: bool = False) -> list[str]:
    from job.startup import load_tensorflow

    return load_tensorflow(verbose=verbose)
