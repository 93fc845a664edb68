"""Definitions in the modules of recipes and data sets, and errors in modules that users add.

Standard library only, because the command line uses it before TensorFlow is imported.
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
from job.environment import explain_resource_error

_PACKAGE = Path(__file__).parent
_Member = TypeVar("_Member")

# All other modules in these folders were added by the user.
SHIPPED = {
    "recipes": ("__init__", "_augment", "classic", "fast"),
    "data": ("__init__", "_http", "cifar10", "image_files", "synthetic"),
}


def module_path(package: str, name: str) -> Path:
    """Return the file of a recipe or data set."""
    return _PACKAGE / package / f"{name}.py"


def load_member(package: str, name: str, member: str, kind: type[_Member]) -> _Member:
    """Import a module of a package and return the object that it defines for the registry.

    Raises:
        UserError: If the module does not define it, or is not valid Python.
    """
    path = module_path(package, name)
    with explaining_user_code(path):
        found = getattr(importlib.import_module(f"job.{package}.{name}"), member, None)
    if not isinstance(found, kind):
        problem = f"defines no {member}"
        if found is not None:
            problem = f"defines {member} as {type(found).__name__}"
        raise UserError(
            f"{_shown(path)} {problem}, expected {kind.__name__}; define {member} there, or start "
            f"the name of a helper module with _"
        )
    return found


def recipe_defaults(name: str) -> dict[str, float]:
    """Read a recipe's own defaults for options: the literal ``DEFAULTS`` in its module.

    The module is parsed, not imported, because an import would also import TensorFlow.

    Returns:
        The defaults by the names in `RECIPE_OPTIONS`; empty if the module defines none.

    Raises:
        UserError: If the defaults are invalid, or the module is not valid Python.
    """
    path = module_path("recipes", name)
    with explaining_user_code(path):
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
        f"numbers except for learning_rate; fix the file"
    )


def require_parameters(function: Callable[..., Any], name: str, *parameters: str) -> None:
    """Reject a function that cannot be called with values for these parameters, in this order.

    Raises:
        TypeError: If the function does not accept them.
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
def explaining_user_code(path: Path | None = None) -> Iterator[None]:
    """Replace an error in a recipe or data set that the user added by a one-line explanation.

    Errors of the machine's resources, and of devices and workers while a graph runs, are not
    attributed to such a file.

    Args:
        path: The file that the body uses. If the user added it, an error is attributed to it even
            if no frame of the traceback is in a user's file.

    Raises:
        UserError: If an error is attributed to a user's file; it names the file and the line.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        place = None if explain_resource_error(error) else _user_code_place(error, path)
        if place is None:
            raise
        file, number = place
        line = f", line {number}" if number else ""
        text = error.msg if number and isinstance(error, SyntaxError) else str(error)
        reason = f"{type(error).__name__}: {shorten(text, 300)}"
        advice = (
            "use another path, or fix the file" if isinstance(error, OSError) else "fix the file"
        )
        raise UserError(f"{_shown(file)}{line}: {reason}; {advice}") from error


def _user_code_place(error: Exception, path: Path | None) -> tuple[Path, int | None] | None:
    """Find the user's file that an error comes from, and the line if known."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # TensorFlow's errors concern devices and workers, except for values that it rejects.
    if "OpError" in kinds and "InvalidArgumentError" not in kinds:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    places: list[tuple[Path, int | None]] = [
        (Path(frame.filename), frame.lineno) for frame in reversed(frames)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        places.insert(0, (Path(error.filename), error.lineno))
    if kinds & {"TypeError", "ValueError", "InvalidArgumentError"}:
        # For a traced or running graph, TensorFlow's message has the lines that the frames lack.
        lines = re.findall(r'File "(.+?)", line (\d+)', str(error))
        places += [(Path(name), int(number)) for name, number in reversed(lines)]
    if path:
        places.append((path, None))
    return next((place for place in places if is_user_module(place[0])), None)


def is_user_module(path: Path) -> bool:
    """Whether a file is a recipe, data set or helper module that the user added."""
    package = path.parent.name
    return (
        path.parent.parent == _PACKAGE and package in SHIPPED and path.stem not in SHIPPED[package]
    )


def _shown(path: Path) -> Path:
    return path.relative_to(_PACKAGE.parent)
