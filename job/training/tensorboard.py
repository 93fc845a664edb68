"""The event file that TensorBoard draws a run's curves from: one file format, one module.

TensorBoard itself is not needed to write it: TensorFlow has the records and their messages. The
file is written anew from the run's history when an attempt begins, so that epochs which a killed
attempt had reported and this one trains again are in it once, and then it grows by an epoch at a
time. Records are read up to the last whole one, whenever the process is killed.
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
"""The curves, each by its key in ``metrics.jsonl``."""

_NAME = "events.out.tfevents."
_IN_MEMORY = "ram://events"


class EventFile(Observer):
    """The event file of a run.

    Args:
        output: The folder that has it in ``tensorboard/``.

    Raises:
        UserError: By all methods, if the file cannot be written.
    """

    def __init__(self, output: OutputDir) -> None:
        self._output = output
        self._start = 0.0
        self._name = ""

    def begin(self, start: Start) -> None:
        """Write the epochs so far."""
        output, history = self._output, start.history
        # Times between two points are times of training: the pauses between attempts are left out.
        self._start = time.time() - history.elapsed_seconds
        output.make_folder(TENSORBOARD)
        earlier = sorted(output.path.glob(EVENT_FILES))
        number = 1 + max((int(path.suffix[1:]) for path in earlier), default=0)
        # A TensorBoard that is looking on goes to the file of the next name when one is over.
        self._name = f"{TENSORBOARD}/{_NAME}{number:06d}"
        events = [
            tf.compat.v1.Event(file_version="brain.Event:2"),
            # What it has read of earlier files no longer counts.
            tf.compat.v1.Event(step=0, session_log=tf.compat.v1.SessionLog(status="START")),
            *(self._event(line) for line in history.epochs),
        ]
        output.write_bytes(self._name, _records(events))
        output.remove(earlier[:-1])
        for path in earlier[-1:]:
            # Emptied and not removed: from a file that is gone some readers never go on.
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
    """Events in TensorFlow's record format, each with its length and checksums."""
    with tf.io.TFRecordWriter(_IN_MEMORY) as writer:
        for event in events:
            writer.write(event.SerializeToString())
    content: bytes = tf.io.gfile.GFile(_IN_MEMORY, "rb").read()
    tf.io.gfile.remove(_IN_MEMORY)
    return content
