"""Quantities as people read them."""


def percent(fraction: float | None) -> str:
    """A fraction in percent, ``62.35%``; empty where there is none."""
    return "" if fraction is None else f"{fraction:.2%}"


def whole_seconds(seconds: float) -> str:
    """A time for a column of such, ``1,234 s``."""
    return f"{seconds:,.0f} s"


def duration(seconds: float) -> str:
    """A time in the two units that suit it: ``3 h 25 min``, ``2 min 47 s``, ``6.0 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
