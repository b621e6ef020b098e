"""The settings of `sglang-auf prompts` and `sglang-auf regenerate`. Their command lines are made from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sglang_auf.settings import Settings

ServerUrl = Annotated[str, Field(pattern=r"^https?://[^/]+")]


class GenerationSettings(Settings):
    """What both commands need: a server, sampling parameters and a file."""

    base_url: ServerUrl = Field(description="any OpenAI-compatible server or router")
    out: Path = Field(description="JSONL to write, or to continue")
    model: str | None = Field(
        default=None, min_length=1, description="model to ask for (default: the server's only one)"
    )
    temperature: float
    max_tokens: int
    seed: int = Field(default=42, ge=0, lt=2**31, description="each request's sampling seed derives from it")
    concurrency: int = Field(default=64, ge=1, description="conversations in flight")
    timeout_s: float = Field(default=3600.0, gt=0, description="seconds one answer may take")
    retries: int = Field(default=6, ge=0, description="how often a failed request is sent again, with growing pauses")


class PromptSettings(GenerationSettings):
    """`sglang-auf prompts`."""

    target: str = Field(min_length=1, description="directory, hub id or prepared target: its chat template")
    base_url: ServerUrl = Field(description="a server with OpenAI's completions route")
    count: int = Field(ge=1, description="prompts in the file in the end")
    opening: tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...] = Field(
        default=(), description="what users begin with; given several times, in turn (default: the model begins)"
    )
    temperature: float = Field(default=1.0, gt=0, le=2, description="sampling temperature")
    max_tokens: int = Field(default=256, ge=1, description="new tokens of one prompt at most; longer ones are not kept")


class RegenerateSettings(GenerationSettings):
    """`sglang-auf regenerate`."""

    inputs: tuple[str, ...] = Field(min_length=1, description="JSONL, JSON or Parquet file, folder, or hub data set")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 is greedy")
    max_tokens: int = Field(default=2048, ge=1, description="new tokens of one answer at most")
    limit: int | None = Field(default=None, ge=1, description="rows of each input at most, from its first")
    thinking: Literal["server", "on", "off"] = Field(
        default="server", description="template switch enable_thinking: on, off, or server to leave it as it is"
    )
    split: str = Field(default="train", min_length=1, description="split of a folder or hub data set that names none")
