"""What a benchmark writes: models of its files, where its figures come from, and what every command returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sglang_auf import provenance

PACKAGES = ("sglang", "sglang-auf", "torch", "transformers", "openai")


class StrictModel(BaseModel):
    """What is written to a result file, and read from it: no field is unknown."""

    model_config = ConfigDict(extra="forbid")


def versions() -> dict[str, str | None]:
    """Of the packages that decide a figure; None for one that is not installed. commit: of this checkout."""
    return provenance.versions(PACKAGES) | {"commit": provenance.git_commit(provenance.CHECKOUT)}


class Measured(StrictModel):
    """A result that says where it comes from: of the process that made it, by default.

    machine: the client's; the server's too where the benchmark started it.
    """

    versions: dict[str, str | None] = Field(default_factory=versions)
    machine: dict[str, Any] = Field(default_factory=provenance.machine)
    command: list[str] = Field(default_factory=provenance.command)


class Report(Measured):
    """What a command measured. The command line prints `text()` and exits with 1 unless `passed`."""

    @property
    def passed(self) -> bool:
        """Whether all went as a user would want: no request failed, no answer differed, nothing leaked."""
        return True

    def markdown(self) -> str:
        """The result as a Markdown document, with command, versions and machine."""
        raise NotImplementedError

    def text(self) -> str:
        """What the terminal shows."""
        return self.markdown()

    def write(self, stem: Path) -> None:
        """Write STEM.json and STEM.md."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
