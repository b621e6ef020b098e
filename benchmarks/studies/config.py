"""A study as YAML: arms x seeds, what they are trained on, how they are measured, and the claims to be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sglang_auf.errors import ConfigError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answers(_Settings):
    """Answers that arms may be trained on. Exactly one of the three says where they come from.

    file: training rows that exist. prompts: files or hub data sets that the target answers, greedily, up to
    max_tokens. demo: so many prompts from templates, likewise. limit: so many of each of `prompts`. Relative files lie
    in --data-dir.
    """

    file: Path | None = None
    prompts: tuple[str, ...] = ()
    demo: int | None = Field(default=None, ge=8)
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=256, ge=8)
    concurrency: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum([self.file is not None, bool(self.prompts), self.demo is not None]) != 1:
            raise ValueError("give one of file, prompts and demo")
        return self


class Arm(_Settings):
    """One training configuration. set: changes of the study's recipe, as --set has them. answers: a name of them."""

    set: tuple[str, ...] = ()
    answers: str | None = None


class Measured(_Settings):
    """Prompts that plain decoding answers once, and that every drafter is walked over and some are served on."""

    tasks: tuple[str, ...] = ("paper",)
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=128, ge=2)
    concurrency: int = Field(default=16, ge=1)


class Served(_Settings):
    """Drafters that are also served, on the same prompts, for the figures a walk cannot give. arms: None for all."""

    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    temperatures: tuple[float, ...] = (0.0,)
    concurrency: int = Field(default=4, ge=1)


class Claim(_Settings):
    """`arm` is compared with `against` in one figure, over matched seeds.

    figure: tau over the measured prompts, or accuracy over all slots of the held-out answers. expected: higher, lower,
    or equal, which holds when the difference is surely within `margin`.
    """

    id: str
    text: str
    arm: str
    against: str
    figure: Literal["tau", "accuracy"] = "tau"
    expected: Literal["higher", "lower", "equal"] = "higher"
    margin: float = Field(default=0.02, gt=0)


class Study(_Settings):
    """profile, server_set: server profile of the target, with --set changes. target: the same one, for the trainer.

    recipe, set: what all arms share, with changes. cache_features: the target's features of the answers are computed
    once, for all arms. seeds: for every arm. claims: compared over the seeds.
    """

    title: str
    profile: str
    server_set: tuple[str, ...] = ()
    target: str
    recipe: str
    set: tuple[str, ...] = ()
    cache_features: bool = False
    seeds: tuple[int, ...] = Field(min_length=1)
    answers: dict[str, Answers] = Field(min_length=1)
    arms: dict[str, Arm] = Field(min_length=2)
    measured: Measured = Measured()
    served: Served | None = None
    claims: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = [
            f"arm {name}: answers {arm.answers!r} is none of {', '.join(self.answers)}"
            for name, arm in self.arms.items()
            if arm.answers is not None and arm.answers not in self.answers
        ]
        faults += [
            f"claim {claim.id}: {name!r} is none of the arms {', '.join(self.arms)}"
            for claim in self.claims
            for name in (claim.arm, claim.against)
            if name not in self.arms
        ]
        if self.served is not None:
            faults += [f"served: no arm {name!r}" for name in self.served.arms or () if name not in self.arms]
            faults += [f"served: no seed {seed}" for seed in self.served.seeds or () if seed not in self.seeds]
        ids = [claim.id for claim in self.claims]
        faults += [f"claim {name!r} is there twice" for name in set(ids) if ids.count(name) > 1]
        if len(set(self.seeds)) < len(self.seeds):
            faults.append("a seed is there twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def answers_of(self, arm: str) -> str:
        """The name of the answers an arm is trained on: its own, or the first ones."""
        return self.arms[arm].answers or next(iter(self.answers))


def load_study(path: Path) -> Study:
    """Raises ConfigError for a file that is missing, no YAML, or no study."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Study.model_validate(content)
    except FileNotFoundError as error:
        raise ConfigError(f"no file {path}", "a study as YAML", "see benchmarks/studies") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({error})", "a study as YAML", "mend the file") from error
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".lstrip(": ") for problem in error.errors()
        )
        raise ConfigError(f"{path}: {reasons}", "the keys of benchmarks/studies/config.py", "mend the file") from error
