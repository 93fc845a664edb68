"""Requirements of the integration tests on the machine."""

import os
import shutil
from collections.abc import Iterable

import pytest


def require_tools(tools: Iterable[str], root_for: str) -> None:
    """Skip the test if a program is not installed or the user is not root.

    Args:
        tools: Names of programs.
        root_for: What root is needed for, shown as the reason of the skip.
    """
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.getuid():
        pytest.skip(f"{root_for} needs root")
