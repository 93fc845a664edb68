"""The options of the command line; each can also be set by an environment variable.

The options of a run are generated from the fields of `TrainConfig`.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import click

from job import log
from job.commands.terminal import print_message, printable
from job.config import (
    RECIPE_OPTIONS,
    DeviceRequest,
    Option,
    TrainConfig,
    UserError,
    list_recipes,
    option_name,
)
from job.registry import recipe_defaults

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)
# With this value EPOCH matches EPOCHS, but INPUT_DIR, which can belong to another program, does not
# match OUTPUT_DIR.
_MIN_SIMILARITY = 0.8


class _DevicesType(click.ParamType[DeviceRequest]):
    name = "auto|cpu:N|gpu:N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> DeviceRequest:
        try:
            return DeviceRequest(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _PositiveFloatType(click.FloatRange):
    """A finite number above 0; the range check of the base class accepts "nan"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail("not finite", param, ctx)
        return number


class _PathType(click.Path):
    """A path, optionally with a required suffix.

    The code that uses a folder checks whether it is readable, and gives advice for that folder.
    """

    def __init__(self, suffix: str | None = None) -> None:
        super().__init__(path_type=Path, readable=False, dir_okay=suffix is None)
        self._suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self._suffix and path.suffix.lower() != self._suffix:
            expected = f"expected a name that ends in {self._suffix}"
            self.fail(f"received {printable(str(path))!r}, {expected}.", param, ctx)
        return path


class _Option(click.Option):
    """An option whose errors always name the received and the expected value."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        if self.name in RECIPE_OPTIONS and "default" in extra:
            extra["default"] = f"{self.default}{_recipe_default_text(self.name)}"
        return extra

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            expected = _expected(self.type)
            if expected is None or error.message.startswith("received"):
                raise
            message = f"received {printable(str(value))!r}, expected {expected}."
            raise click.BadParameter(message, ctx, self) from error


def _recipe_default_text(name: str) -> str:
    """Format the recipes' own defaults for an option: " (fast: 8)"; empty if there are none."""
    found = []
    for recipe in list_recipes():
        # A broken recipe that the user added is reported when it is used.
        with contextlib.suppress(UserError):
            defaults = recipe_defaults(recipe)
            found += [f"{recipe}: {defaults[name]}"] if name in defaults else []
    return f" ({', '.join(found)})" if found else ""


def _apply_recipe_defaults(ctx: click.Context, _parameter: click.Parameter, recipe: str) -> str:
    """Replace the defaults of options by a recipe's own."""
    ctx.default_map = {**(ctx.default_map or {}), **recipe_defaults(recipe)}
    return recipe


def _expected(kind: click.ParamType[Any]) -> str | None:
    """Describe the values that a click type accepts; None if the type's own message does so."""
    match kind:
        case click.Choice(choices=choices):
            *others, last = map(str, choices)
            return f"{', '.join(others)} or {last}" if others else last
        case click.FloatRange(min=low, max=high):
            if high is None:
                return f"a finite number above {low:g}"
            return f"a number above {low:g}, at most {high:,}"
        case click.IntRange(min=low, max=high):
            return f"a whole number from {low}" + ("" if high is None else f" to {high:,}")
        case click.types.BoolParamType():
            return "true or false"
        case click.Path(dir_okay=False, readable=readable):
            return "a file that can be read" if readable else "a file, not a folder"
    return None


def option(name: str, *, help: str, **settings: Any) -> Callable[[Any], Any]:  # noqa: A002
    """Define an option that can also be set by the environment variable ``JOB_<NAME>``."""
    variable = f"JOB_{name.removeprefix('--').replace('-', '_').upper()}"
    return click.option(
        name,
        cls=_Option,
        envvar=variable,
        show_envvar=True,
        show_default=True,
        help=help,
        **settings,
    )


def config_options(*names: str, **helps: str) -> Callable[[Any], Any]:
    """Define options for fields of `TrainConfig`.

    Args:
        names: The names of the fields; all fields if empty.
        helps: Help texts for fields that have another meaning in this command.
    """

    def decorate(command: Any) -> Any:
        for name in reversed(names or tuple(_FIELDS)):
            field = _FIELDS[name]
            settings: Option = field.metadata["option"]
            # Parsed before the options whose defaults depend on it.
            eager = (
                {"is_eager": True, "callback": _apply_recipe_defaults} if name == "recipe" else {}
            )
            command = option(
                option_name(name),
                help=helps.get(name, settings.help),
                default=field.default,
                **_kind(_TYPES[name], settings),
                **eager,
            )(command)
        return command

    return decorate


def _kind(annotation: Any, settings: Option) -> dict[str, Any]:
    """Return click's settings for a field's type; None in a type means that it has no default."""
    kinds = [one for one in typing.get_args(annotation) if one is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return {"type": click.Choice(kinds)}
    if settings.choices:
        return {"type": click.Choice(settings.choices())}
    kind = kinds[0] if kinds else annotation
    if kind is bool:
        return {"is_flag": True}
    if kind is int:
        return {"type": click.IntRange(settings.minimum, settings.maximum)}
    if kind is float:
        return {"type": _PositiveFloatType(settings.minimum, settings.maximum, min_open=True)}
    if kind is Path:
        return {"type": _PathType(settings.suffix)}
    return {"type": _DevicesType() if kind is DeviceRequest else click.STRING}


PNG_FILE = _PathType(".png")
MODEL_FILE = click.Path(path_type=Path, dir_okay=False)

output_dir_argument = click.argument(
    "output_dir", type=_PathType(), envvar="JOB_OUTPUT_DIR", default=Path("output")
)
log_format_option = option(
    "--log-format",
    type=click.Choice(log.LOG_FORMATS),
    default="auto",
    help="auto is text on a terminal and JSON lines elsewhere.",
)


def warn_about_misspelt_variables(command: click.Command, environ: Mapping[str, str]) -> None:
    """Warn about environment variables whose names resemble the variables of a command's options.

    Other variables with the same prefix cause no warning, because schedulers use the prefix too.
    The warning goes to stderr because some commands write only results to stdout.
    """
    known = [str(parameter.envvar) for parameter in command.params if parameter.envvar]
    for name in sorted(environ.keys() - {*known}):
        short = name.removeprefix("JOB_")
        close = _closest(short, [one.removeprefix("JOB_") for one in known])
        if name != short and close:
            print_message(
                f"warning: the environment variable {printable(name)} is not an option and is "
                f"ignored; did you mean JOB_{close}?"
            )


def describe_unknown_option(error: click.NoSuchOption) -> str:
    """Describe the error and suggest the option that was probably meant."""
    context = error.ctx
    known = [one.opts[0] for one in context.command.get_params(context)] if context else []
    names = {name.removeprefix("--").replace("-", "_"): name for name in known}
    close = _closest(error.option_name.lstrip("-").replace("-", "_"), names)
    return error.message + (f" Did you mean {names[close]}?" if close else "")


def _closest(name: str, options: Collection[str]) -> str | None:
    """Find the option that a name misspells, or abbreviates to its first words or its initials."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=_MIN_SIMILARITY)
    for option in options:
        initials = "".join(word[0] for word in option.split("_"))
        if option.startswith(f"{name}_") or initials == name != option[0]:
            close.append(option)
    return close[0] if close else None


def require_writable_folder(png: Path) -> None:
    """Check early that a picture can be written at the end.

    Raises:
        UserError: If its folder does not exist or is not writable.
    """
    if not os.access(png.parent, os.W_OK):
        raise UserError(
            f"--png received {png}, expected a file in a folder that user {os.getuid()} can write "
            f"to; create {png.parent}, or use another folder"
        )
