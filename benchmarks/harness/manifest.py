"""run.json: what a run asked of which server, with which versions. A resumed run must agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from benchmarks.harness.config import RunConfig
from benchmarks.harness.records import Record
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.tasks import PromptFile, Selection
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import write_whole
from sglang_auf.settings import checked

INCIDENTAL = {"base_url", "data_dir", "prompts", "out", "timeout_s"}
"""Settings that say how a run is done, not what it measures."""
OFF_BEFORE = {"group_by", "rate"}
"""Settings that are off in a run by an earlier version, which did not have them: they would change its records."""


class TaskOrigin(StrictModel):
    """Where a task's prompts come from. version: the task's. prompts: how many are asked, in as many `requests` as they
    have turns (None: written by a version that did not count them). sha256: their digest.

    file: the user's own file that they were read from. token_ids: how many of the prompts are token ids.
    """

    version: int
    origin: str
    prompts: int
    requests: int | None = None
    sha256: str
    file: PromptFile | None = None
    token_ids: int = 0


class Session(Measured):
    """One call of the benchmark that wrote into a run. A resumed run has several."""

    started_at: str


class RunManifest(StrictModel):
    """What run.json holds.

    warnings: how the run's conditions differ from those that its drafter was trained for, or what is not known of its
    server.
    """

    config: RunConfig
    server: ServerFacts
    tasks: dict[str, TaskOrigin]
    warnings: list[str] = Field(default_factory=list)
    sessions: list[Session] = Field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig, server: ServerFacts, selections: list[Selection]) -> Self:
        origins = {
            chosen.task.name: TaskOrigin(
                version=chosen.task.version,
                origin=chosen.origin,
                prompts=len(chosen.prompts),
                requests=sum(len(prompt.turns) for prompt in chosen.prompts),
                sha256=chosen.sha256,
                file=chosen.file,
                token_ids=chosen.token_ids,
            )
            for chosen in selections
        }
        return cls(config=config, server=server, tasks=origins)

    @property
    def broken_rows(self) -> list[str]:
        """Of all files of prompts: "FILE:LINE: fault" of the rows that were not asked."""
        return [row for origin in self.tasks.values() if origin.file for row in origin.file.broken]

    @property
    def without_group(self) -> list[str]:
        """Of all files of prompts: "FILE:LINE" of the asked rows without the field of --group-by."""
        return [row for origin in self.tasks.values() if origin.file for row in origin.file.without_group]

    @property
    def token_ids(self) -> bool:
        """Whether any prompt is token ids, which are what others have asked a server."""
        return any(origin.token_ids for origin in self.tasks.values())

    @property
    def rendered(self) -> bool:
        """Whether any prompt is put into a chat template."""
        return any(
            origin.token_ids < origin.prompts and not (self.config.raw_prompts and origin.file)
            for origin in self.tasks.values()
        )

    def require_finished(self, directory: Path, records: Sequence[Record]) -> None:
        """records: the latest of each request. Raises DataError where some requests have none."""
        due = sum(task.prompts if task.requests is None else task.requests for task in self.tasks.values())
        if len(records) < due:
            found = f"{directory} with {len(records)} of {due} requests"
            raise DataError(found, "a finished run", "finish it with run --resume")

    @classmethod
    def read(cls, path: Path) -> Self:
        if not path.is_file():
            raise DataError(f"no file {path}", "the run.json of a run that has started")
        return checked(
            cls,
            path.read_bytes(),
            str(path),
            "a run.json written by this version of the benchmark",
            "start the run again in another directory",
            DataError,
        )

    def write(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    def begin_session(self) -> None:
        self.sessions.append(Session(started_at=datetime.now(UTC).isoformat(timespec="seconds")))

    def identity(self) -> dict[str, Any]:
        """Setting -> value, flat, for all that must be equal in runs whose records belong together."""
        config = self.config.model_dump(mode="json", exclude=INCIDENTAL)
        server = {f"server.{name}": value for name, value in self.server.model_dump().items()}
        tasks = {f"{name}.prompts": (origin.version, origin.sha256) for name, origin in self.tasks.items()}
        return {**config, **server, **tasks}

    def require_same(self, other: RunManifest, where: Path) -> None:
        """Raises ConfigError, which names every setting in which `other` differs from this run, the one in `where`.

        What the file of a run by an earlier version does not say is not compared, but for OFF_BEFORE.
        """
        mine, theirs = self.identity(), other.identity()
        unsaid = set(RunConfig.model_fields) - self.config.model_fields_set - OFF_BEFORE
        unsaid |= {f"server.{name}" for name in set(ServerFacts.model_fields) - self.server.model_fields_set}
        changed = [name for name in {**mine, **theirs} if name not in unsaid and mine.get(name) != theirs.get(name)]
        if changed:
            raise ConfigError(
                "; ".join(f"{name} = {theirs.get(name)!r}" for name in changed),
                "; ".join(f"{name} = {mine.get(name)!r}" for name in changed) + f", as the run in {where} has it",
                "resume with the run's own settings, or start a new run with another --out",
            )
