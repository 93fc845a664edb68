"""The shape that a JSON document must have, and where one departs from it."""

from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any], None]
"""Raises a `MismatchError` for a value that has another shape."""

_SHOWN = 60


class MismatchError(Exception):
    """A value is not of the expected shape.

    Args:
        received: What there is.
        expected: What there should be.
        where: Names of the entries that lead to it.
    """

    def __init__(self, received: str, expected: str, where: str = "") -> None:
        place = f"{where}: " if where else ""
        super().__init__(f"{place}received {received}, expected {expected}")
        self.received, self.expected, self.where = received, expected, where

    def within(self, entry: str) -> "MismatchError":
        """The same mismatch, seen from the document that has it in this entry."""
        joint = "." if self.where and not self.where.startswith("[") else ""
        return MismatchError(self.received, self.expected, f"{entry}{joint}{self.where}")


def shown(value: Any) -> str:
    """A value in few letters of one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def value(expected: str, fits: Callable[[Any], bool]) -> Shape:
    """A value of which a function says whether it fits; `expected` are words for what does."""

    def check(received: Any) -> None:
        if not fits(received):
            raise MismatchError(shown(received), expected)

    return check


def one_of(*names: str) -> Shape:
    """One of some texts."""
    return value(f"one of {', '.join(names)}", lambda received: received in names)


def or_null(shape: Shape) -> Shape:
    """A value of this shape, or null."""

    def check(received: Any) -> None:
        if received is not None:
            shape(received)

    return check


def list_of(shape: Shape, least: int = 0) -> Shape:
    """A list of at least so many values of this shape."""

    def check(received: Any) -> None:
        if not isinstance(received, list):
            raise MismatchError(shown(received), "a list")
        if len(received) < least:
            raise MismatchError(shown(received), f"a list of at least {least}")
        for number, item in enumerate(received):
            _check_entry(shape, item, f"[{number}]")

    return check


def table_of(shape: Shape) -> Shape:
    """An object with any names, whose values have this shape."""

    def check(received: Any) -> None:
        if not isinstance(received, dict):
            raise MismatchError(shown(received), "an object")
        for name, item in received.items():
            _check_entry(shape, item, name)

    return check


def record(required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """An object with entries of these names and shapes, and with any others."""

    def check(received: Any) -> None:
        if not isinstance(received, dict):
            raise MismatchError(shown(received), "an object")
        for name in required:
            if name not in received:
                raise MismatchError("nothing", "a value", name)
        for name, shape in {**required, **(optional or {})}.items():
            if name in received:
                _check_entry(shape, received[name], name)

    return check


def _check_entry(shape: Shape, item: Any, entry: str) -> None:
    try:
        shape(item)
    except MismatchError as mismatch:
        raise mismatch.within(entry) from None


def _is_number(received: Any) -> bool:
    # No NaN passes a comparison; the largest integers are no floating-point numbers.
    number = isinstance(received, int | float) and not isinstance(received, bool)
    return number and -1e300 < received < 1e300


def _is_count(received: Any) -> bool:
    return _is_number(received) and isinstance(received, int) and 0 <= received < 2**53


ANY = value("anything", lambda received: True)
TEXT = value("a text", lambda received: isinstance(received, str))
SWITCH = value("true or false", lambda received: isinstance(received, bool))
NUMBER = value("a finite number", _is_number)
AMOUNT = value("a finite number from 0", lambda it: _is_number(it) and it >= 0)
SHARE = value("a number from 0 to 1", lambda it: _is_number(it) and 0 <= it <= 1)
COUNT = value("a whole number from 0", _is_count)
POSITIVE = value("a whole number from 1", lambda it: _is_count(it) and it >= 1)
