"""Run the job as a worker whose main thread hangs at some place, while its heartbeats continue.

``HANG`` is that place, ``Class.method number``: the number of the call that hangs. Without it none
does. ``COMPILATION_SECONDS`` is the time that a call has for compiling, as ten minutes are too long
to wait for.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, its messages held back)

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
    """Have a call of a method never return."""
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
