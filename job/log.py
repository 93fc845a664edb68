"""Log events: JSON lines for machines, short readable lines for people, mostly on stdout."""

import contextlib
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["auto", "json", "text"]
LOG_FORMATS: tuple[LogFormat, ...] = ("auto", "json", "text")

_logger = logging.getLogger("job")
_FIELDS = "job_fields"


def on_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def configure(
    log_format: str, worker: int | None = None, stream: Literal["stdout", "stderr"] = "stdout"
) -> None:
    """Send this program's events to a stream in the given format, replacing an earlier setting.

    Args:
        log_format: "json" or "text"; anything else is text on a terminal, otherwise JSON lines.
        worker: The rank of this worker, which its events contain, because the logs of several
            workers are often merged; None if it is the only one.
        stream: "stderr" if stdout is for results.
    """
    handler = _StreamHandler(stream)
    is_json = log_format == "json" or (log_format != "text" and not on_terminal())
    handler.setFormatter(_JsonEvents(worker) if is_json else _TextEvents(worker))
    _logger.handlers = [handler]
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def only_warnings() -> None:
    """Write only warnings and errors from now on."""
    _logger.setLevel(logging.WARNING)


def is_json() -> bool:
    """Whether events are being written as JSON lines."""
    return any(isinstance(handler.formatter, _JsonEvents) for handler in _logger.handlers)


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log one event.

    Args:
        name: Short name of what happened, the ``event`` field of the JSON line.
        level: A level of the `logging` module.
        **fields: JSON-serializable details. ``message``, if given, is the sentence that the text
            format shows instead of the fields.
    """
    _logger.log(level, name, extra={_FIELDS: fields})


def plural(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 image``, ``10,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def utc_now() -> str:
    """Return the current time in UTC, ISO 8601 with milliseconds: ``2026-01-31T12:00:00.000Z``."""
    return _utc(datetime.now(UTC).timestamp())


def _utc(timestamp: float) -> str:
    moment = datetime.fromtimestamp(timestamp, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _StreamHandler(logging.Handler):
    """Gets the stream again for each event, because a progress bar replaces it temporarily."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        # A closed pipe, or a full disk behind a redirection, must not stop the run.
        with contextlib.suppress(OSError):
            print(self.format(record), file=getattr(sys, self._stream), flush=True)


class _JsonEvents(JsonFormatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as time, level, event and then its own fields."""
        return self.serialize_log_record(
            {
                "time": _utc(record.created),
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                **self._worker,
                **getattr(record, _FIELDS, {}),
            }
        )


class _TextEvents(logging.Formatter):
    """Formats events as readable lines.

    Args:
        worker: The rank of this worker; None if it is the only one.
    """

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        # The chief's lines concern the whole run and need no prefix.
        self._worker = f"worker {worker}: " if worker else ""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, _FIELDS, {}))
        text = fields.pop("message", None) or " ".join(
            [record.getMessage(), *(f"{key}={value}" for key, value in fields.items())]
        )
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {self._worker}{prefix}{text}"
