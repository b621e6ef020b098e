"""The records of a study, from which its report is made: counts of every answer, training metrics, origins; no text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record
from benchmarks.harness.servers import profile_content
from benchmarks.studies.config import Budget, load_study
from sglang_auf.errors import ConfigError
from sglang_auf.files import write_whole
from sglang_auf.settings import read_yaml

STUDY, PROFILE, PLAIN = "study.yaml", "profile.yaml", "plain.json"
WITHOUT_TEXT = {"prompt_ids": None, "output_ids": None, "output_text": ""}


def require_same(path: Path, records: Path) -> None:
    """Copy the study's file beside its records. Raises ConfigError where the records belong to another study."""
    kept, study = records / STUDY, load_study(path)
    if not kept.is_file():
        records.mkdir(parents=True, exist_ok=True)
        write_whole(kept, path.read_bytes())
    elif load_study(kept) != study:
        raise ConfigError(
            f"{records} are of another study ({kept} and {path} differ)",
            "the study that was begun there",
            "give another --out, or take the change back",
        )


def require_same_profile(profile: str, records: Path) -> None:
    """Keep what a study's profile says, with those that it extends. Raises ConfigError where it said otherwise before.

    Not compared are records of an earlier version, which kept none, and a profile that is not here: no server starts.
    """
    kept, content = records / PROFILE, profile_content(profile)
    if content and not kept.is_file():
        write_whole(kept, yaml.safe_dump(content))
    elif content and read_yaml(kept) != content:
        raise ConfigError(
            f"profile {profile}, which says other than when the study in {records} was begun",
            f"what {kept} says",
            "give another --out, or take the change back",
        )


def of_budget(directory: Path, steps: Budget) -> Path:
    """Where a part of a study is in a directory: in one of its own, if the study has budgets."""
    return directory if steps is None else directory / str(steps)


def walked_name(arm: str, seed: int, nodes: int | None) -> str:
    """nodes: of trees; None: a chain."""
    return f"walked-{arm}-{seed}{'' if nodes is None else f'-tree-{nodes}'}.jsonl.gz"


def training_name(arm: str, seed: int) -> str:
    return f"training-{arm}-{seed}.json.gz"


def served_name(arm: str, seed: int, temperature: float) -> str:
    return f"{arm}-{seed}-T{temperature:g}"


def keep(path: Path, records: Sequence[Record]) -> None:
    """Write the records without the texts of prompts and answers."""
    write_gz(path, "".join(record.model_copy(update=WITHOUT_TEXT).model_dump_json() + "\n" for record in records))


def keep_origin(path: Path, manifest_file: Path) -> None:
    """Write what a run asked, which server, and with which versions, without the paths of this machine."""
    manifest = RunManifest.read(manifest_file)
    server = manifest.server
    content = {
        "server": {
            **server.model_dump(),
            "target": server.target and Path(server.target).name,
            "drafter": server.drafter and "/".join(Path(server.drafter).parts[-2:]),
        },
        "config": manifest.config.model_dump(mode="json", exclude={"base_url", "data_dir", "prompts", "out"}),
        "tasks": {name: origin.model_dump() for name, origin in manifest.tasks.items()},
        "sessions": [session.model_dump(exclude={"command"}) for session in manifest.sessions],
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_gz(path: Path, text: str) -> None:
    """Write a compressed file. The same text gives the same bytes."""
    write_whole(path, gzip.compress(text.encode(), mtime=0))


def read_kept(path: Path) -> list[Record]:
    """Read what `keep` wrote."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [Record.model_validate_json(line) for line in lines]


def read_training(path: Path) -> dict[str, Any]:
    """One training: set (changes of the recipe), metrics, run (run.json), and seconds spent in steps."""
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return content
