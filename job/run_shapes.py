"""The shapes of what a run leaves as JSON, as far as anything is read of it again.

An earlier version may have left out what is optional here.
"""

from job.shapes import (
    AMOUNT,
    ANY,
    COUNT,
    NUMBER,
    POSITIVE,
    SHARE,
    SWITCH,
    TEXT,
    list_of,
    one_of,
    or_null,
    record,
    table_of,
)

_OUTCOMES = ("running", "done", "stopped", "failed")

_CONFIG = record(
    {
        **dict.fromkeys(("output_dir", "data_dir", "recipe", "dataset"), TEXT),
        **dict.fromkeys(("epochs", "batch_size"), POSITIVE),
        **{"seed": COUNT, "learning_rate": NUMBER, "limit": or_null(POSITIVE)},
    },
    {"cifar10_url": TEXT},
)
_ATTEMPT = record(
    {
        **{"start": TEXT, "host": TEXT, "fresh": SWITCH},
        **dict.fromkeys(("end", "reason", "run_id"), or_null(TEXT)),
        "outcome": one_of(*_OUTCOMES, "lost"),
        **dict.fromkeys(("first_step", "last_step"), or_null(COUNT)),
        "changes": list_of(TEXT),
    }
)
_DATA = record(
    dict.fromkeys(("name", "fingerprint", "test_fingerprint"), TEXT), {"train_examples": POSITIVE}
)
MANIFEST = record(
    {
        **{"config": _CONFIG, "versions": record({"job": TEXT}), "git_commit": or_null(TEXT)},
        **{"start": TEXT, "end": or_null(TEXT), "elapsed_seconds": AMOUNT},
        **{"outcome": one_of(*_OUTCOMES), "error": or_null(TEXT)},
        "attempts": list_of(_ATTEMPT, least=1),
    },
    {
        "devices": or_null(list_of(table_of(ANY))),
        **dict.fromkeys(("replicas", "threads"), or_null(POSITIVE)),
        **dict.fromkeys(("precision", "recipe_fingerprint"), or_null(TEXT)),
        **dict.fromkeys(("xla", "deterministic"), or_null(SWITCH)),
        "data": or_null(_DATA),
    },
)
"""``run.json``."""

EPOCH = record(
    {
        **{"epoch": POSITIVE, "step": POSITIVE},
        **dict.fromkeys(("loss", "val_loss", "learning_rate"), NUMBER),
        **dict.fromkeys(("accuracy", "val_accuracy"), SHARE),
        **dict.fromkeys(("seconds", "images_per_second", "elapsed_seconds"), AMOUNT),
    }
)
"""A line of ``metrics.jsonl``."""

EVALUATION_DOCUMENT = record(
    {
        **{"loss": NUMBER, "accuracy": SHARE, "examples": POSITIVE},
        "classes": table_of(
            record(
                {
                    **dict.fromkeys(("precision", "recall"), or_null(SHARE)),
                    "support": COUNT,
                }
            )
        ),
        "confusion_matrix": list_of(list_of(COUNT), least=1),
    }
)
"""``evaluation.json``."""
