"""Where a result came from: versions, machine, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

PACKAGES = ("sglang", "sglang-auf", "torch", "transformers", "openai")
ROOT = Path(__file__).resolve().parents[2]


class StrictModel(BaseModel):
    """What is written to a result file, and read from it: no field is unknown."""

    model_config = ConfigDict(extra="forbid")


class Measured(StrictModel):
    """A result that says where it comes from."""

    versions: dict[str, str | None]
    machine: dict[str, Any]
    command: list[str]


def versions() -> dict[str, str | None]:
    """Of the packages that matter here; None for one that is not installed. commit: of this checkout."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return found


def machine() -> dict[str, Any]:
    """The client's machine; the server's too where the benchmark started it. memory in GiB."""
    gpus = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": gpus.splitlines() if gpus else [],
        "system": platform.platform(),
    }


def command() -> list[str]:
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _first_line(arguments: list[str]) -> str | None:
    output = _output(arguments)
    return output.splitlines()[0] if output else None


def _output(arguments: list[str]) -> str | None:
    """What a program prints; None when it is not there or fails."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
