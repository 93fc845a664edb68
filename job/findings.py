"""What a dry run found out, for people and for machines."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from job.config import JobError, TrainConfig
from job.manifest import describe_config

LABEL_WIDTH = 13


@dataclass
class Findings:
    """What was found out so far.

    Attributes:
        report: A JSON object: the configuration, and for each of output, devices, batch, data and
            network an object, missing where a problem came before it.
        lines: The same for people: pairs of label and text.
        problems: Why the training would not start, in the order in which it would find out.
        outcome: What the training would do, where there is no problem.
    """

    report: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[JobError] = field(default_factory=list)
    outcome: str = "nothing stands in the way"

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Go on after the body's problem, if it has one."""
        try:
            yield
        except JobError as error:
            self.problems.append(error)

    def add(self, key: str, fields: dict[str, Any], *texts: str) -> None:
        """Add an object to the report, and lines for people."""
        self.report[key] = fields
        self.lines += [(key.capitalize(), text) for text in texts]

    def as_text(self) -> str:
        """What was found out, for a person to read, the most important first."""
        verdict = [("Problem", str(problem)) for problem in self.problems]
        verdict = verdict or [("Dry run", f"{self.outcome}; nothing was written")]
        lines = [*verdict, *self.lines, *_option_lines(self.report["config"])]
        return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in lines)


def _option_lines(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each option that is not at its default, and all others together."""
    words = {None: "not set", True: "on", False: "off"}
    usual = describe_config(TrainConfig())
    defaults = []
    for name, value in options.items():
        text = words[value] if value is None or isinstance(value, bool) else str(value)
        option = f"--{name.replace('_', '-')}"
        if value == usual[name]:
            defaults.append(f"{option} {text}")
        else:
            yield "Config", f"{option:<20}{text}"
    yield "Defaults", ", ".join(defaults)
