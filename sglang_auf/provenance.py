"""What made a drafter: git revision, package versions, command line, and hashes of what was read or written."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("sglang-auf", "sglang", "torch", "transformers", "accelerate", "safetensors")
CHECKOUT = Path(__file__).resolve().parents[1]


def of_this_run() -> dict[str, Any]:
    """Plain JSON. command: the program's own name without its directory, then its arguments as given."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(CHECKOUT),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def git_revision(checkout: Path) -> str | None:
    """The commit of a git checkout, with "+changes" where files differ from it; None where it is no checkout."""
    if not (checkout / ".git").exists():  # an installed package: a repository further up is somebody else's
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else commit


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


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git prints; None when it is not there or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
