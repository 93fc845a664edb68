"""The processes that train one run together, and what they tell each other.

TensorFlow's own runtime carries everything; what is here only calls its collectives. Besides the
gradients, which the strategy reduces, workers exchange a few documents, always all of them at once.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.cluster import ClusterSpec
from job.config import JobError, LostWorkerError, UserError
from job.lost_workers import naming_lost_workers, unreachable

# Beyond all those of strategies, which count from 1.
_GROUP_KEY = 1_000_000
_WORD_BYTES = 8
_LEAVE_SECONDS = 5.0
_LEAVE_POLL_SECONDS = 0.02


class Workers:
    """All workers of a run, as one of them sees them.

    Args:
        spec: Who they are. Only `job.joining.join` makes several of them meet.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self._calls = 0

    @property
    def count(self) -> int:
        """Number of workers."""
        return self.spec.count

    @property
    def is_chief(self) -> bool:
        """Whether this is the one that writes."""
        return self.spec.is_chief

    def gather(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Give every worker the documents of all, in the order of their ranks.

        Waits until all workers have come here.

        Args:
            document: This worker's, a JSON object.

        Raises:
            LostWorkerError: If one of them is gone.
        """
        content = json.dumps(document).encode()
        sizes = self._gather(np.array([len(content)]))
        words = self._gather(_as_words(content, int(sizes.max())))
        return [
            json.loads(row.tobytes()[:size])
            for row, size in zip(words.reshape(self.count, -1), sizes, strict=True)
        ]

    def require_equal(self, document: Mapping[str, Any]) -> None:
        """Refuse workers that differ from the chief in what all of them must have in common.

        Args:
            document: This worker's, a JSON object.

        Raises:
            UserError: If one differs, on every worker.
            LostWorkerError: If one of them is gone.
        """
        first, *others = self.gather(document)
        differences = [
            f"{self.spec.name(rank)} has {name.replace('_', ' ')} {other.get(name)}, "
            f"{self.spec.name(0)} {first.get(name)}"
            for rank, other in enumerate(others, start=1)
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differences:
            self.end(
                UserError(
                    f"the workers differ, expected the same on each: {'; '.join(differences)}; "
                    f"start all of them with the same options, data and image"
                )
            )

    def end(self, error: JobError) -> NoReturn:
        """Raise an error that all workers have found alike, once all of them are here.

        A worker that went at once would be taken for lost by one that is still looking.
        """
        with contextlib.suppress(LostWorkerError):
            self.leave()
        raise error

    def broadcast(self, content: bytes) -> bytes:
        """Give every worker what the chief has.

        Args:
            content: The chief's; that of others does not matter.

        Raises:
            LostWorkerError: If one of them is gone.
        """
        size = self.gather({"size": len(content)})[0]["size"]
        if self.count == 1 or not size:
            return content[:size]
        words = _as_words(content if self.is_chief else b"", size)
        self._calls += 1
        key = {"group_size": self.count, "group_key": _GROUP_KEY, "instance_key": self._calls}
        with naming_lost_workers(self.spec), tf.device(self._host):
            if self.is_chief:
                tf.raw_ops.CollectiveBcastSendV2(input=words, **key)
            else:
                received = tf.raw_ops.CollectiveBcastRecvV2(shape=words.shape, T=tf.int64, **key)
                words = received.numpy()
        return words.tobytes()[:size]

    def leave(self) -> None:
        """Part from the others, once all of them have come here.

        Raises:
            LostWorkerError: If one of them is gone before.
        """
        self.gather({})
        # The first to have gathered may not end yet: others may still be reading from it.
        with contextlib.suppress(LostWorkerError):
            self.gather({})
        # The chief serves the others, and so goes last.
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.is_chief and len(unreachable(self.spec)) < self.count - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(_LEAVE_POLL_SECONDS)

    def _gather(self, words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Concatenate the words of all workers, of which each has as many."""
        if self.count == 1:
            return words
        self._calls += 1
        with naming_lost_workers(self.spec), tf.device(self._host):
            gathered = tf.raw_ops.CollectiveGatherV2(
                input=words,
                group_size=self.count,
                group_key=_GROUP_KEY,
                instance_key=self._calls,
                ordering_token=[],
            )
            result: npt.NDArray[np.int64] = gathered.numpy()
        return result

    @property
    def _host(self) -> str:
        # Only host memory: the devices may not have a kernel for numbers.
        return f"/job:worker/task:{self.spec.index}/device:CPU:0"


def _as_words(content: bytes, size: int) -> npt.NDArray[np.int64]:
    """Content as [words] int64, which collectives take, with zeros up to at least a size."""
    padded = content.ljust(-(-size // _WORD_BYTES) * _WORD_BYTES, b"\0")
    return np.frombuffer(padded, np.int64)
