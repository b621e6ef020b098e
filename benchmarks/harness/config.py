"""What several commands let a user set, and the types of such settings. The rest is in each command's own file.

The command line is made from these fields, see `sglang_auf.flags`.
"""

from __future__ import annotations

import hashlib
import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from benchmarks.harness.servers import PROFILES, profile_content
from sglang_auf.settings import Settings, settings_names


def split_commas(value: Any) -> Any:
    parts = [value] if isinstance(value, str) else value
    return [name.strip() for part in parts for name in str(part).split(",") if name.strip()]


def _split_words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


def _bare_url(value: Any) -> Any:
    return value.rstrip("/").removesuffix("/v1") if isinstance(value, str) else value


def _dated_run() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


Names = Annotated[tuple[str, ...], BeforeValidator(split_commas), Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split_commas), Field(min_length=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(split_commas)]
ServerSettings = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^=]+=")], ...], BeforeValidator(_split_words), Field(min_length=1)
]
ServerUrl = Annotated[str, BeforeValidator(_bare_url), Field(pattern=r"^https?://.+")]


class CommandConfig(Settings):
    """The flags of one command. A field may have its flag's name as alias; both names are accepted."""

    model_config = ConfigDict(populate_by_name=True)


class PromptSources(CommandConfig):
    """Where prompts come from, and how they are rendered."""

    prompts: tuple[Path, ...] = Field(
        (),
        description="a file of your own prompts, or the directory of a recording: a task that is named after it; "
        "may be repeated",
    )
    raw_prompts: bool = Field(False, description="continue the texts in --prompts as they are, without a chat template")
    thinking: Literal["off", "on", "server"] = Field("off", description="template switch enable_thinking, or as is")
    data_dir: Path | None = Field(None, description="read <task>.jsonl from here instead of the hub")

    @model_validator(mode="after")
    def _raw_needs_a_file(self) -> Self:
        if self.raw_prompts and not self.prompts:
            raise ValueError("--raw-prompts without --prompts")
        return self


class AskedTasks(PromptSources):
    """Which tasks are asked, beside a user's own."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        default_factory=lambda given: () if given.get("prompts") else ("paper",),
        description="comma-separated tasks or groups: paper, more, sample (default: paper, or none with --prompts)",
    )
    limit: int | None = Field(None, ge=1, description="at most this many prompts of each task")

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if not self.tasks and not self.prompts:
            raise ValueError("--tasks that names no task, and no --prompts")
        return self


class Questions(AskedTasks):
    """What is asked."""

    group_by: str | None = Field(
        None, min_length=1, description="a field of the rows of --prompts (language, customer): tau by its values"
    )
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 is greedy; above 0 nothing else shapes sampling")
    max_tokens: int = Field(512, ge=1, description="new tokens of one answer at most")
    seed: int = Field(
        42,
        ge=0,
        lt=2**31,
        description="each request's sampling seed (temperature > 0) derives from it",
    )
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")

    @model_validator(mode="after")
    def _groups_are_of_own_rows(self) -> Self:
        if self.group_by is not None and not self.prompts:
            raise ValueError("--group-by without --prompts")
        return self


class Workload(Questions):
    """What is asked, and how many requests are in flight."""

    concurrency: int = Field(1, ge=1, description="most conversations in flight; further ones wait until one ends")
    warmup: int | None = Field(None, ge=0, description="requests asked first, not recorded (default: concurrency)")

    @property
    def warmup_requests(self) -> int:
        return self.concurrency if self.warmup is None else self.warmup


class RunConfig(Workload):
    """Ask one server that is already up."""

    base_url: ServerUrl = Field(description="the server, for example http://127.0.0.1:30000")
    model: str | None = Field(None, description="model name to send (default: the first one of /v1/models)")
    stream: bool = Field(True, description="stream answers, which gives the time to the first token")
    plain: bool = Field(
        False, description="the server decodes plainly, or is not SGLang: a baseline of speed, without tau"
    )
    empty_cache: bool = Field(
        False, description="empty the server's prefix cache first; only for a server that answers nobody else"
    )
    record_steps: bool = Field(
        False, description="record what each step accepted, in order, for tau by position; an AUF server works for it"
    )
    rate: Rate | None = Field(
        None,
        description="requests a second, at random times (from --seed), whether earlier ones are answered or not; give "
        "--concurrency too. Times count from when a request was due",
    )
    out: Path = Field(default_factory=_dated_run, description="run directory")

    @model_validator(mode="after")
    def _a_rate_needs_a_cap(self) -> Self:
        if self.rate is not None and "concurrency" not in self.model_fields_set:
            raise ValueError("--rate without --concurrency, the most requests that may be in flight")
        return self

    @model_validator(mode="after")
    def _steps_come_in_streams(self) -> Self:
        if self.record_steps and (self.plain or not self.stream):
            raise ValueError(f"--record-steps with {'--plain' if self.plain else '--no-stream'}")
        return self


def profile_digest(path_or_name: str) -> str | None:
    """SHA-256 of what a profile and those that it extends say, without --set; None where there is no such profile."""
    content = profile_content(path_or_name)
    return hashlib.sha256(yaml.safe_dump(content).encode()).hexdigest() if content else None


class ServedProfile(CommandConfig):
    """What commands share that start servers of a profile. profile_sha256: as it was when the command began."""

    profile: str = Field(description="server profile, a name or a file, as for python -m server --profile")
    profile_sha256: str | None = Field(default_factory=lambda given: profile_digest(given["profile"]))

    @property
    def profile_text(self) -> str:
        """For reports: a name of ours, or a file's name and the digest of what it says."""
        if self.profile in settings_names(PROFILES) or self.profile_sha256 is None:
            return self.profile
        return f"{Path(self.profile).name} ({self.profile_sha256[:8]})"


class StartedServersConfig(ServedProfile, PromptSources):
    """What commands share that start several servers of one profile and ask them greedily, first turns only."""

    settings: tuple[str, ...] = Field(
        (), alias="set", description="key=value for every server, or env.NAME=value; may be repeated"
    )
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")
    start_timeout_s: float = Field(900.0, gt=0, description="seconds a server may take to be ready")
