"""Where a drafter or a result comes from: git revision, package versions, machine, command line, hashes of files."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("sglang-auf", "sglang", "torch", "transformers", "accelerate", "safetensors")
"""What decides the weights of a drafter."""

CHECKOUT = Path(__file__).resolve().parents[1]


def of_this_run() -> dict[str, Any]:
    """Plain JSON about this process, for the files beside a drafter."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(CHECKOUT),
        "versions": versions(PACKAGES),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package name -> version, None for a package that is not installed; Python's own comes first."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def command() -> list[str]:
    """The command line of this process: the interpreter without its directory, then its arguments as given."""
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def machine() -> dict[str, Any]:
    """This machine: cpu (model name), cores (usable), memory_gib, gpus (names), system."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": gpus.splitlines() if gpus else [],
        "system": platform.platform(),
    }


def git_revision(checkout: Path) -> str | None:
    """The commit of a git checkout, with "+changes" where files differ from it; None where it is no checkout."""
    commit = git_commit(checkout)
    if commit is None:
        return None
    return f"{commit}+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else commit


def git_commit(checkout: Path) -> str | None:
    """The commit that a git checkout is at; None where it is no checkout."""
    if not (checkout / ".git").exists():  # an installed package: a repository further up is somebody else's
        return None
    return _git(checkout, "rev-parse", "HEAD")


def sha256_of(files: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256 of its contents."""
    hashes = {}
    for file in files:
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(checkout: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(checkout), *arguments)


def _output(*arguments: str) -> str | None:
    """What a program prints; None when it is missing, fails, or prints nothing."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
