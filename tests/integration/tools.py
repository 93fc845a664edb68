"""What integration tests need of the machine."""

import os
import shutil
from collections.abc import Iterable

import pytest


def require_tools(tools: Iterable[str], root_for: str) -> None:
    """Skip where a program is not installed, or where this is not root.

    Args:
        tools: Names of programs.
        root_for: What only root may do, for the reason of the skip.
    """
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.getuid():
        pytest.skip(f"{root_for} needs root")
