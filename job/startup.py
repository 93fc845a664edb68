"""Import TensorFlow without letting its start-up messages drown the job's own log."""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator


def load_tensorflow(*, verbose: bool = False) -> list[str]:
    """Import TensorFlow and look for GPUs, holding back what the native code prints.

    Must run before anything else imports TensorFlow.

    Args:
        verbose: Whether to ask for all of its messages; otherwise only errors are news. A level
            that the user sets in TF_CPP_MIN_LOG_LEVEL stays.

    Returns:
        The lines that went to stderr meanwhile. Where a GPU is not found they say why.
    """
    # Native code reads the level once, when it is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "2")
    lines: list[str] = []
    with _captured_stderr(lines):
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
        # Keras reports through absl; its advice against HDF5 is not for this job's user.
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
    return lines


@contextlib.contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what is written to file descriptor 2; native code does not use `sys.stderr`."""
    sys.stderr.flush()
    original = os.dup(2)
    # A crash in here must still be seen: its trace goes to the real stderr.
    faulthandler.enable(original)
    # In memory: a container may have no temporary folder that it can write.
    with os.fdopen(os.memfd_create("stderr"), "w+b") as sink:
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
