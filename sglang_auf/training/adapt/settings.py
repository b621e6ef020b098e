"""The settings of `sglang-auf adapt`. Its command line is made from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from sglang_auf.settings import Settings


class AdaptSettings(Settings):
    """What to learn from, for how long, and what counts as enough."""

    model_config = ConfigDict(populate_by_name=True)

    drafter: str = Field(min_length=1, description="directory or hub id of the drafter that is served now")
    recorded: Path = Field(description="directory that a server recorded into")
    out: Path = Field(description="directory to make, if the new drafter is better")
    data: tuple[str, ...] = Field(
        default=(), description="answers of before, so that old kinds are not forgotten: as for train; may be repeated"
    )
    old_share: float = Field(default=0.5, gt=0, lt=1, description="share of --data among the rows that are trained on")
    held_out: float = Field(
        default=0.2, gt=0, lt=1, description="share of the recorded rows, the last ones, that decide and are not learnt"
    )
    min_rows: int = Field(default=200, ge=20, description="recorded rows that there must be")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps (default: each row once)")
    minutes: float | None = Field(default=None, gt=0, description="time for steps, instead of their number")
    target: str | None = Field(
        default=None, min_length=1, description="directory, hub id or prepared target (default: the drafter's)"
    )
    run: Path | None = Field(default=None, description="directory of the run, to go on after a kill (default: OUT.run)")
    threads: int | None = Field(default=None, ge=1, description="threads to compute with (default: one a core)")
    overrides: tuple[str, ...] = Field(default=(), alias="set", description="change the recipe, as in a.b=c")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("--steps and --minutes are both given; give one of them")
        return self

    @field_validator("out")
    @classmethod
    def _named(cls, out: Path) -> Path:
        if out.name in ("", ".."):
            raise ValueError(f"{out} names no directory to make; give a path that ends in a name")
        return out

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.run or self.out.with_name(f"{self.out.name}.run")
