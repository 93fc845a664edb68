"""Import TensorFlow without letting its start-up messages drown the job's own log."""

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator


def load_tensorflow() -> list[str]:
    """Import TensorFlow and look for GPUs, holding back what the native code prints.

    Must run before anything else imports TensorFlow.

    Returns:
        The lines that went to stderr meanwhile. Where a GPU is not found they say why.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    lines: list[str] = []
    with _captured_stderr(lines):
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
        # Keras reports through absl; its advice against HDF5 is not for this job's user.
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
    # The loader has its reasons in `lines`; from here on only TensorFlow's errors are news.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    return lines


@contextlib.contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what is written to file descriptor 2; native code does not use `sys.stderr`."""
    sys.stderr.flush()
    original = os.dup(2)
    # A crash in here must still be seen: its trace goes to the real stderr.
    faulthandler.enable(original)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except BaseException:
            sink.seek(0)
            os.write(original, sink.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            faulthandler.enable(2)
            os.close(original)
            sink.seek(0)
            lines.extend(sink.read().decode(errors="replace").splitlines())
