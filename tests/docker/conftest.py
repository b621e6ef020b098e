"""What the tests of docker/ share: the checkout, and a skip where a program is not installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(name: str, whence: str) -> str:
    """The path of a program, or a skip that says where it comes from."""
    beside = Path(sys.executable).with_name(name)  # what pip installed, with the environment active or not
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({whence})")
    return found
