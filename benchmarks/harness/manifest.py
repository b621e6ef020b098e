"""run.json: what a run asked, of which server, with which versions; and whether a resumed run is still that run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from benchmarks.harness.config import RunConfig
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.tasks import Selection
from sglang_auf.errors import ConfigError, DataError

# Settings that say how a run is done, not what it measures.
INCIDENTAL = {"base_url", "data_dir", "out", "timeout_s"}


class TaskOrigin(StrictModel):
    """version: of the task's prompts and selection. sha256: of the prompts asked."""

    version: int
    origin: str
    prompts: int
    sha256: str


class Session(Measured):
    """One call of the benchmark that wrote into this run; more than one after a resume."""

    started_at: str


class Manifest(StrictModel):
    """warnings: conditions of the run that are not those its drafter was trained for."""

    config: RunConfig
    server: ServerFacts
    tasks: dict[str, TaskOrigin]
    warnings: list[str] = Field(default_factory=list)
    sessions: list[Session] = Field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig, server: ServerFacts, selections: list[Selection]) -> Self:
        origins = {
            chosen.task.name: TaskOrigin(
                version=chosen.task.version, origin=chosen.origin, prompts=len(chosen.prompts), sha256=chosen.sha256
            )
            for chosen in selections
        }
        return cls(config=config, server=server, tasks=origins)

    @classmethod
    def read(cls, path: Path) -> Self:
        if not path.is_file():
            raise DataError(f"no file {path}", "the run.json of a run", "name the directory of a run that has started")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DataError(
                f"{path}: {error.errors()[0]['loc']} {error.errors()[0]['msg']}",
                "a run.json written by this version of the benchmark",
                "start the run again in another directory",
            ) from None

    def write(self, path: Path) -> None:
        """Atomically: a kill leaves the old file or the new one."""
        fresh = path.with_suffix(".tmp")
        fresh.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)

    def begin_session(self) -> None:
        self.sessions.append(
            Session(
                started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for records to belong together, flat: name -> value."""
        config = self.config.model_dump(mode="json", exclude=INCIDENTAL)
        server = {f"server.{name}": value for name, value in self.server.model_dump().items()}
        tasks = {f"{name}.prompts": (origin.version, origin.sha256) for name, origin in self.tasks.items()}
        return {**config, **server, **tasks}

    def require_same(self, other: Manifest, where: Path) -> None:
        """ConfigError naming every setting in which the run in `where` (self) and the wanted one (other) differ."""
        mine, theirs = self.identity(), other.identity()
        changed = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if changed:
            raise ConfigError(
                "; ".join(f"{name} = {theirs.get(name)!r}" for name in changed),
                "; ".join(f"{name} = {mine.get(name)!r}" for name in changed) + f", as the run in {where} has it",
                "resume with the run's own settings, or start a new run with another --out",
            )
