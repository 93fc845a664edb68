from typing import Any

import pytest

from job import shapes
from job.shapes import AMOUNT, COUNT, NUMBER, POSITIVE, SHARE, SWITCH, TEXT, MismatchError, Shape

SHAPE = shapes.record(
    {"name": TEXT, "points": shapes.list_of(shapes.record({"x": NUMBER}), least=1)},
    {"sizes": shapes.table_of(COUNT), "end": shapes.or_null(shapes.one_of("done", "failed"))},
)


@pytest.mark.parametrize(
    "document",
    [
        {"name": "a", "points": [{"x": 1}]},
        {"name": "", "points": [{"x": -1.5, "y": "any"}], "sizes": {"a": 0}, "end": None, "z": 1},
        {"name": "a", "points": [{"x": 1}], "end": "done"},
    ],
)
def test_a_document_of_the_shape_may_have_more(document: Any) -> None:
    SHAPE(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "received [], expected an object"),
        ({"points": []}, "name: received nothing, expected a value"),
        ({"name": "a", "points": []}, "points: received [], expected a list of at least 1"),
        ({"name": "a", "points": [{"x": 1}, {}]}, "points[1].x: received nothing, expected a"),
        ({"name": "a", "points": [{"x": "1"}]}, "points[0].x: received '1', expected a finite"),
        ({"name": "a", "points": [{"x": 1}], "sizes": {"b": -1}}, "sizes.b: received -1, expected"),
        (
            {"name": "a", "points": [{"x": 1}], "end": "?"},
            "end: received '?', expected one of done",
        ),
        ({"name": "a" * 99, "points": "b" * 99}, f"points: received '{'b' * 59}…, expected a list"),
    ],
)
def test_where_a_document_departs_is_told(document: Any, message: str) -> None:
    with pytest.raises(MismatchError) as error:
        SHAPE(document)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        (TEXT, ["", "a"], [None, 1, ["a"]]),
        (SWITCH, [True, False], [0, 1, "true", None]),
        (NUMBER, [-1, 0.5, 10**18], [True, "1", float("nan"), float("-inf"), 10**400, None]),
        (AMOUNT, [0, 0.0, 2.5], [-1e-9, float("inf")]),
        (SHARE, [0, 1, 0.5], [1.0001, -0.1, float("nan")]),
        (COUNT, [0, 3], [-1, 1.0, True, 2**53]),
        (POSITIVE, [1], [0, -1, None]),
    ],
)
def test_values_are_of_their_kind(shape: Shape, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        shape(value)
    for value in bad:
        with pytest.raises(MismatchError):
            shape(value)
