"""The options of the command line, each of them also an environment variable.

Those that describe a run follow from the fields of `TrainConfig`.
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
from job.commands.terminal import printable, say
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
# So that EPOCH is like EPOCHS, and INPUT_DIR, which may be another program's, is unlike OUTPUT_DIR.
_ALIKE = 0.8


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
    """A number above 0; "nan" passes every comparison of the class it extends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail("not finite", param, ctx)
        return number


class _PathType(click.Path):
    """A path.

    Whether a folder can be read is found out where it is used, with advice for that folder.
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
    """An option whose errors name what was received and what was expected, whatever its type."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        if self.name in RECIPE_OPTIONS and "default" in extra:
            extra["default"] = f"{self.default}{_defaults_of_recipes(self.name)}"
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


def _defaults_of_recipes(name: str) -> str:
    """The recipes' own defaults of an option: " (fast: 8)"; nothing where none has any."""
    found = []
    for recipe in list_recipes():
        # A recipe of the user's own that is broken is reported when it is used.
        with contextlib.suppress(UserError):
            defaults = recipe_defaults(recipe)
            found += [f"{recipe}: {defaults[name]}"] if name in defaults else []
    return f" ({', '.join(found)})" if found else ""


def _take_defaults(ctx: click.Context, _parameter: click.Parameter, recipe: str) -> str:
    """Make a recipe's own defaults those of its options."""
    ctx.default_map = {**(ctx.default_map or {}), **recipe_defaults(recipe)}
    return recipe


def _expected(kind: click.ParamType[Any]) -> str | None:
    """The values of a type of click in words; None where the type's own message has them."""
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
            return "a file that can be read" if readable else "a file, and no folder"
    return None


def option(name: str, *, help: str, **settings: Any) -> Callable[[Any], Any]:  # noqa: A002
    """An option that is also the environment variable ``JOB_<NAME>``."""
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
    """Options for fields of `TrainConfig`, under their names.

    Args:
        names: The fields; none are all of them.
        helps: Another help text for fields that mean something else in a command.
    """

    def decorate(command: Any) -> Any:
        for name in reversed(names or tuple(_FIELDS)):
            field = _FIELDS[name]
            settings: Option = field.metadata["option"]
            # Parsed before those whose defaults it decides.
            eager = {"is_eager": True, "callback": _take_defaults} if name == "recipe" else {}
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
    """The settings of click for a field's type; None only tells that there is no default."""
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


def warn_of_misspelt_variables(command: click.Command, environ: Mapping[str, str]) -> None:
    """Warn of variables that are almost options of a command; those it has are read by `click`.

    Other names with this prefix are not for this program: schedulers have such, too. The warning
    goes to stderr, as some commands have nothing but results on stdout.
    """
    known = [str(parameter.envvar) for parameter in command.params if parameter.envvar]
    for name in sorted(environ.keys() - {*known}):
        short = name.removeprefix("JOB_")
        close = _closest(short, [one.removeprefix("JOB_") for one in known])
        if name != short and close:
            say(
                f"warning: the environment variable {printable(name)} is no option and is ignored; "
                f"did you mean JOB_{close}?"
            )


def describe_unknown_option(error: click.NoSuchOption) -> str:
    """The error in words, with the option that was probably meant."""
    context = error.ctx
    known = [one.opts[0] for one in context.command.get_params(context)] if context else []
    names = {name.removeprefix("--").replace("-", "_"): name for name in known}
    close = _closest(error.option_name.lstrip("-").replace("-", "_"), names)
    return error.message + (f" Did you mean {names[close]}?" if close else "")


def _closest(name: str, options: Collection[str]) -> str | None:
    """The option that a name is misspelt for, begins with words of, or is the initials of."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=_ALIKE)
    for option in options:
        initials = "".join(word[0] for word in option.split("_"))
        if option.startswith(f"{name}_") or initials == name != option[0]:
            close.append(option)
    return close[0] if close else None


def require_writable_folder(png: Path) -> None:
    """Refuse early if a picture could not be written in the end.

    Raises:
        UserError: If its folder is not there or cannot be written.
    """
    if not os.access(png.parent, os.W_OK):
        raise UserError(
            f"--png received {png}, expected a file in a folder that user {os.getuid()} can write; "
            f"make {png.parent}, or name another"
        )
