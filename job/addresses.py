"""Addresses as they may be shown and kept: without what opens a door."""

import re

REMOVED = "REMOVED"
"""Stands in an address for what was there."""

_USER = re.compile(r"^([\w+.-]*://)?[^/?#]*@")
_QUERY = re.compile(r"(?<=[?#]).+", re.DOTALL)


def without_secrets(url: str) -> str:
    """An address without user, password, query and fragment.

    Args:
        url: As ``https://user:password@host/file?token=...``.

    Returns:
        As ``https://REMOVED@host/file?REMOVED``.
    """
    return _QUERY.sub(REMOVED, _USER.sub(rf"\g<1>{REMOVED}@", url))
