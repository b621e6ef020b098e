"""What a benchmark writes: models of its files, where its figures come from, and what every command returns."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from sglang_auf import provenance
from sglang_auf.files import write_whole

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout or image that holds benchmarks/; the package may be installed elsewhere."""

PACKAGES = ("sglang", "sglang-auf", "torch", "transformers", "openai")


class StrictModel(BaseModel):
    """What is written to a result file, and read from it: no field is unknown."""

    model_config = ConfigDict(extra="forbid")


def versions() -> dict[str, str | None]:
    """Of the packages that decide a figure; None for one that is not installed.

    commit: of this checkout, with "+changes" where files differ from it.
    """
    return provenance.versions(PACKAGES) | {"commit": provenance.git_revision(ROOT)}


class Measured(StrictModel):
    """A result that says where it comes from: of the process that made it, by default.

    machine: the client's; the server's too where the benchmark started it.
    """

    versions: dict[str, str | None] = Field(default_factory=versions)
    machine: dict[str, Any] = Field(default_factory=provenance.machine)
    command: list[str] = Field(default_factory=provenance.command)

    @model_validator(mode="before")
    @classmethod
    def _said_in_files(cls, content: Any, info: ValidationInfo) -> Any:
        """A file that does not say where it comes from must not claim to come from here."""
        if info.mode == "json" and isinstance(content, dict):
            for name in Measured.model_fields:
                if name not in content:
                    raise ValueError(f"{name} is missing")
        return content


class Cell(StrictModel):
    """A finished measurement in a file of its own. asked: what must be equal for it to be kept by the next call."""

    asked: dict[str, Any]
    versions: dict[str, str | None] = Field(default_factory=versions)

    @classmethod
    def kept(cls, path: Path, asked: dict[str, Any]) -> Self | None:
        """The measurement of an earlier call, if there is one and it was asked the same."""
        if not path.exists():
            return None
        try:
            cell = cls.model_validate_json(path.read_bytes())
        except ValidationError:
            logger.warning("%s is of another version of the benchmark; the cell is measured again", path)
            return None
        return cell if cell.asked == asked else None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json(indent=2) + "\n")


class Report(StrictModel):
    """What a command returns. The command line writes it, prints `text()`, and exits with 1 unless `passed`."""

    STEM: ClassVar[str]
    """Name of its files, without the ending."""

    @property
    def passed(self) -> bool:
        """Whether all went as a user would want: no request failed, no answer differed, nothing leaked."""
        return True

    def markdown(self) -> str:
        """The result as a Markdown document, with command, versions and machine; "" where there is none."""
        return ""

    def text(self) -> str:
        """What the terminal shows."""
        return self.markdown()

    def write(self, out: Path) -> Path:
        """Write STEM.json into `out`, and STEM.md where there is Markdown. Returns the path to show to the user."""
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / f"{self.STEM}.json", self.model_dump_json(indent=2) + "\n")
        if document := self.markdown():
            write_whole(out / f"{self.STEM}.md", document)
        return out
