"""A Dockerfile read into stages: the instructions this repository uses, and an error for any other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOCKERFILE = Path(__file__).parents[2] / "docker/Dockerfile"
KNOWN = frozenset(
    {
        *("ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME", "EXPOSE", "LABEL"),
        *("ENTRYPOINT", "CMD", "HEALTHCHECK", "STOPSIGNAL"),
    }
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` is what follows its name, on one line."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The exec form's list, or the words as a shell would split them."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return shlex.split(self.text)


@dataclass(frozen=True, slots=True)
class Copy:
    """COPY: sources relative to the context, or absolute ones in the stage `stage`."""

    sources: list[str]
    destination: str
    stage: str | None

    @classmethod
    def of(cls, instruction: Instruction) -> Copy:
        words = instruction.words
        flags = [word for word in words if word.startswith("--")]
        if unknown := [flag for flag in flags if not flag.startswith("--from=")]:
            raise ValueError(f"COPY {unknown[0]}: only --from is understood here")
        *sources, destination = [word for word in words if not word.startswith("--")]
        return cls(sources, destination, flags[0].removeprefix("--from=") if flags else None)


@dataclass(frozen=True, slots=True)
class Stage:
    """base: an image, or the name of an earlier stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """The stages by name. Raises ValueError for what this reader does not understand."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, _, name = (expand(word, arguments) for word in instruction.words)
            stage = stages[name] = Stage(name, base)
        elif stage is not None:
            stage.instructions.append(instruction)
        elif instruction.name == "ARG":
            key, _, value = instruction.text.partition("=")
            arguments[key] = value
        else:
            raise ValueError(f"{instruction.name} before the first FROM")
    return stages


def chain(stages: Mapping[str, Stage], target: str) -> tuple[str, list[Instruction]]:
    """The base image of `target` and every instruction from there on, those of its ancestors first."""
    if target not in stages:
        raise ValueError(f"no stage {target}; there are {', '.join(stages)}")
    stage = stages[target]
    if stage.base not in stages:
        return stage.base, stage.instructions
    base, before = chain(stages, stage.base)
    return base, before + stage.instructions


def expand(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match.group(1)], text)


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for logical in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = logical.partition(" ")
        if name not in KNOWN:
            raise ValueError(f"instruction {name!r} is not understood here")
        yield Instruction(name, rest.strip())
