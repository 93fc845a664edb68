"""Run the job as a worker whose main thread hangs in a call, while its heartbeats continue.

``HANG`` selects the call as ``Class.method number``, with the number of the call to the method.
Without it, no call hangs. ``COMPILATION_SECONDS`` is the time that a call may spend compiling,
because the program's ten minutes are too long for a test.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, with its messages suppressed)

import functools
import itertools
import json
import os
import time
from typing import Any

from job.commands.cli import load_tensorflow

load_tensorflow()

from job.__main__ import run
from job.cluster.workers import Workers
from job.run import stop
from job.run.checkpoint import CheckpointStore
from job.run.manifest import RunManifest
from job.training.engine import Engine
from job.training.evaluate import Evaluator

CLASSES = {one.__name__: one for one in (CheckpointStore, Engine, Evaluator, RunManifest, Workers)}


def hang_at(place: str) -> None:
    """Make one call of a method hang."""
    method, number = place.split()
    kind, name = method.split(".")
    original = getattr(CLASSES[kind], name)
    calls = itertools.count(1)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == int(number):
            print(json.dumps({"event": "hangs"}), flush=True)
            time.sleep(3600)
        return original(*arguments, **keywords)

    setattr(CLASSES[kind], name, wrapper)


if __name__ == "__main__":
    stop.COMPILATION_SECONDS = float(os.environ["COMPILATION_SECONDS"])
    if "HANG" in os.environ:
        hang_at(os.environ["HANG"])
    run()
