"""The event file from which TensorBoard draws a run's curves.

TensorBoard itself is not needed to write it: TensorFlow provides the records and their messages.
When an attempt begins, it writes a new file from the run's history, and then adds one epoch at a
time. So epochs that a killed attempt reported, and that this attempt trains again, occur only once.
Readers stop at the last complete record, so the process can be killed at any time.
"""

import time

import tensorflow as tf

from job.run.folder import EVENT_FILES, TENSORBOARD, OutputDir
from job.run.record import EpochRecord
from job.training.observer import Observer, Start

TAGS = {
    "loss/train": "loss",
    "loss/validation": "val_loss",
    "accuracy/train": "accuracy",
    "accuracy/validation": "val_accuracy",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}
"""The curves, each with its key in ``metrics.jsonl``."""

_NAME = "events.out.tfevents."
_IN_MEMORY = "ram://events"


class EventFile(Observer):
    """The event file of a run.

    Args:
        output: The output folder; the file is in its ``tensorboard/``.

    Raises:
        UserError: From all methods, if the file cannot be written.
    """

    def __init__(self, output: OutputDir) -> None:
        self._output = output
        self._start = 0.0
        self._name = ""

    def begin(self, start: Start) -> None:
        """Write the epochs so far."""
        output, history = self._output, start.history
        # The times on the curves are training time, without the pauses between attempts.
        self._start = time.time() - history.elapsed_seconds
        output.make_folder(TENSORBOARD)
        earlier = sorted(output.path.glob(EVENT_FILES))
        number = 1 + max((int(path.suffix[1:]) for path in earlier), default=0)
        # A running TensorBoard moves to the file with the next name when it has read one.
        self._name = f"{TENSORBOARD}/{_NAME}{number:06d}"
        events = [
            tf.compat.v1.Event(file_version="brain.Event:2"),
            # Makes a reader discard what it has read from earlier files.
            tf.compat.v1.Event(step=0, session_log=tf.compat.v1.SessionLog(status="START")),
            *(self._event(line) for line in history.epochs),
        ]
        output.write_bytes(self._name, _records(events))
        output.remove(earlier[:-1])
        for path in earlier[-1:]:
            # Emptied, not removed: some readers never move on from a file that is gone.
            output.write_bytes(f"{TENSORBOARD}/{path.name}", b"")

    def finish_epoch(self, line: EpochRecord) -> None:
        """Add an epoch."""
        self._output.append_bytes(self._name, _records([self._event(line)]))

    def _event(self, line: EpochRecord) -> tf.compat.v1.Event:
        value = tf.compat.v1.Summary.Value
        values = [value(tag=tag, simple_value=getattr(line, key)) for tag, key in TAGS.items()]
        return tf.compat.v1.Event(
            wall_time=self._start + line.elapsed_seconds,
            step=line.step,
            summary=tf.compat.v1.Summary(value=values),
        )


def _records(events: list[tf.compat.v1.Event]) -> bytes:
    """Encode events in TensorFlow's record format, each with its length and checksums."""
    with tf.io.TFRecordWriter(_IN_MEMORY) as writer:
        for event in events:
            writer.write(event.SerializeToString())
    content: bytes = tf.io.gfile.GFile(_IN_MEMORY, "rb").read()
    tf.io.gfile.remove(_IN_MEMORY)
    return content
