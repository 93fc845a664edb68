"""A run that has nothing left to do: whoever asks for it again is told so."""

from job import log
from job.attempt import Attempt
from job.config import TrainConfig
from job.history import History
from job.textfile import open_textfile


def report_finished(config: TrainConfig, attempt: Attempt) -> None:
    """Say that the run is finished, in the log and in the textfile that is asked for.

    The textfile may still have what the attempt before was doing when it was killed.

    Args:
        config: The run's configuration.
        attempt: Has found the run finished.

    Raises:
        UserError: If the textfile cannot be written.
    """
    with open_textfile(config, attempt) as textfile:
        if textfile and attempt.checkpoint:
            manifest = attempt.manifest.document
            devices = manifest.get("devices") or [{}]
            textfile.begin(
                manifest.get("precision") or "",
                f"{manifest.get('replicas')} x {devices[0].get('model')}",
                attempt.checkpoint.step // config.epochs,
                History.from_document(attempt.checkpoint.metadata["history"]),
            )
    folder = config.output_dir
    log.event(
        "finished",
        output_dir=str(folder),
        message=f"the run in {folder}/ is finished; raise --epochs to go on with it, start over "
        f"with --fresh, or name another --output-dir",
    )
