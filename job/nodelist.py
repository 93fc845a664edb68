"""Slurm's short form for a list of nodes; standard library only."""

import itertools
import re

_HOSTS = 65536  # as many as Slurm knows in one list
_NUMBER = re.compile(r"[0-9]{1,18}")
_NODES = r"(?:[^\s,\[\]]|\[[0-9][0-9,-]*\])+"
_NODELIST = re.compile(rf"{_NODES}(?:,{_NODES})*")


def expand_nodelist(text: str) -> list[str]:
    """List the nodes that Slurm's short form names, such as ``n[1-3,07-09],login``.

    Args:
        text: What ``SLURM_STEP_NODELIST`` holds. The order is kept, as ranks follow it, and so are
            leading zeros.

    Raises:
        ValueError: If the text is no such list.
    """
    if not _NODELIST.fullmatch(text):
        raise ValueError(f"received {text!r}, expected nodes such as n1,n[2-4,07-09]")
    hosts: list[str] = []
    for nodes in re.findall(_NODES, text):
        # Text outside brackets, and inside of them at the odd places.
        parts = re.split(r"\[([^]]*)\]", nodes)
        choices = [_expand_ranges(p) if i % 2 else [p] for i, p in enumerate(parts)]
        room = _HOSTS - len(hosts)
        found = ["".join(p) for p in itertools.islice(itertools.product(*choices), room + 1)]
        if len(found) > room:
            raise ValueError(f"received {text!r}, expected {_HOSTS} nodes at most")
        hosts += found
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """List the numbers of ``1-3,07-09``, with their zeros."""
    numbers: list[str] = []
    for part in text.split(","):
        bounds = part.split("-")
        if len(bounds) > 2 or not all(_NUMBER.fullmatch(bound) for bound in bounds):
            raise ValueError(f"received {part!r} in [{text}], expected a number or a range")
        first, last = int(bounds[0]), int(bounds[-1])
        if not first <= last < first + _HOSTS:
            raise ValueError(
                f"received the range {part} in [{text}], expected the lower end first and {_HOSTS} "
                f"nodes at most"
            )
        numbers += [str(number).zfill(len(bounds[0])) for number in range(first, last + 1)]
    return numbers
