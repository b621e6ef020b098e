"""What is installed is what constraints.txt pins, nothing more and nothing else."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = {"pip", "sglang-auf"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are those of Python 3.11")
def test_every_installed_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    site = str(Path(sys.prefix))
    installed = {
        normal(found.metadata["Name"]): found.version
        for found in metadata.distributions()
        if str(found.locate_file("")).startswith(site)
    }
    different = {
        name: (version, pins.get(name))
        for name, version in installed.items()
        if name not in NOT_OURS and pins.get(name) != version.split("+")[0]
    }
    assert not different, f"installed and pinned: {different}"
