"""The folders of recipes and data sets: what a module of them defines, and whose fault an error is.

Standard library only, as the command line uses it before TensorFlow is imported.
"""

import ast
import contextlib
import importlib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from job.config import RECIPE_OPTIONS, JobError, UserError
from job.environment import lacks_resources

_PACKAGE = Path(__file__).parent
_Member = TypeVar("_Member")

# Everything else in these folders is the user's own.
SHIPPED = {
    "recipes": ("__init__", "_augment", "classic", "fast"),
    "data": ("__init__", "_http", "cifar10", "image_files", "synthetic"),
}


def module_path(package: str, name: str) -> Path:
    """The file of a recipe or data set."""
    return _PACKAGE / package / f"{name}.py"


def load_member(package: str, name: str, member: str, kind: type[_Member]) -> _Member:
    """Import what a module of a package defines for the registry.

    Raises:
        UserError: If it does not define it, or is no Python.
    """
    path = module_path(package, name)
    with naming_own_code(path):
        found = getattr(importlib.import_module(f"job.{package}.{name}"), member, None)
    if not isinstance(found, kind):
        problem = f"defines no {member}"
        if found is not None:
            problem = f"defines {member} as {type(found).__name__}"
        raise UserError(
            f"{_shown(path)} {problem}, expected {kind.__name__}; define it so, or begin the name "
            f"of a module that only helps with _"
        )
    return found


def recipe_defaults(name: str) -> dict[str, float]:
    """A recipe's own defaults of options: the literal ``DEFAULTS`` of ``job.recipes.<name>``.

    It is read without importing the module, which would import TensorFlow.

    Returns:
        By the names of `RECIPE_OPTIONS`; nothing where the module defines none.

    Raises:
        UserError: If they are none, or the module is no Python.
    """
    path = module_path("recipes", name)
    with naming_own_code(path):
        tree = ast.parse(path.read_bytes(), str(path))
    defaults: dict[str, float] = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name("DEFAULTS")], value=ast.expr() as value)
                | ast.AnnAssign(target=ast.Name("DEFAULTS"), value=ast.expr() as value)
            ):
                defaults = _read_defaults(value, path)
    return defaults


def _read_defaults(expression: ast.expr, path: Path) -> dict[str, float]:
    try:
        defaults = ast.literal_eval(expression)
    except ValueError:
        defaults = None
    if isinstance(defaults, dict) and all(
        option in RECIPE_OPTIONS
        and type(number) in ((int, float) if option == "learning_rate" else (int,))
        and 0 < number < math.inf
        for option, number in defaults.items()
    ):
        return defaults
    raise UserError(
        f"{_shown(path)}, line {expression.lineno}: DEFAULTS is {ast.unparse(expression)}, "
        f"expected a dictionary with numbers above 0 for any of {', '.join(RECIPE_OPTIONS)}, whole "
        f"numbers except for learning_rate; mend it there"
    )


def require_parameters(function: Callable[..., Any], name: str, *parameters: str) -> None:
    """Refuse a function that cannot be called with values for these parameters, in this order.

    Raises:
        TypeError: If it cannot.
    """
    if not accepts(function, *parameters):
        received = f"{name}({', '.join(inspect.signature(function).parameters)})"
        raise TypeError(f"received {received}, expected {name}({', '.join(parameters)})")


def accepts(function: Callable[..., Any], *parameters: str) -> bool:
    """Whether a function can be called with values for these parameters, in this order."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def naming_own_code(path: Path | None = None) -> Iterator[None]:
    """Explain what goes wrong in a recipe or data set of the user's own, without a traceback.

    What a machine lacks is no fault of such a file, nor is what fails while a graph runs.

    Args:
        path: The file that the body is about, which is to blame also where another one raises.

    Raises:
        UserError: If such a file is to blame.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        place = None if lacks_resources(error) else _own_place(error, path)
        if place is None:
            raise
        file, number = place
        line = f", line {number}" if number else ""
        text = error.msg if number and isinstance(error, SyntaxError) else str(error)
        reason = f"{type(error).__name__}: {shorten(text, 300)}"
        advice = (
            "mend it there" if not isinstance(error, OSError) else "name another, or mend it there"
        )
        raise UserError(f"{_shown(file)}{line}: {reason}; {advice}") from error


def _own_place(error: Exception, path: Path | None) -> tuple[Path, int | None] | None:
    """The file of the user's own, and the line if known, that an error comes from."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # TensorFlow's errors are those of devices and workers, but for values that it refuses.
    if "OpError" in kinds and "InvalidArgumentError" not in kinds:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    places: list[tuple[Path, int | None]] = [
        (Path(frame.filename), frame.lineno) for frame in reversed(frames)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        places.insert(0, (Path(error.filename), error.lineno))
    if kinds & {"TypeError", "ValueError", "InvalidArgumentError"}:
        # Where TensorFlow traces or runs a graph, its message has the lines that the frames lack.
        lines = re.findall(r'File "(.+?)", line (\d+)', str(error))
        places += [(Path(name), int(number)) for name, number in reversed(lines)]
    if path:
        places.append((path, None))
    return next((place for place in places if is_own(place[0])), None)


def is_own(path: Path) -> bool:
    """Whether a file is a recipe or data set of the user's own, or a module that helps one."""
    package = path.parent.name
    return (
        path.parent.parent == _PACKAGE and package in SHIPPED and path.stem not in SHIPPED[package]
    )


def _shown(path: Path) -> Path:
    return path.relative_to(_PACKAGE.parent)
