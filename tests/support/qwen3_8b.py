"""The configurations of Qwen/Qwen3-8B and z-lab/Qwen3-8B-DFlash-b16 for tests. No weights."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.shapes.qwen3_8b import DRAFTER, TARGET

__all__ = ["DRAFTER", "TARGET", "write_target"]


def write_target(directory: Path) -> Path:
    """Only its config.json."""
    (directory / "config.json").write_text(json.dumps(TARGET))
    return directory
