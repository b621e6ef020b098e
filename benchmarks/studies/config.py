"""A study as YAML: arms and seeds, what they are trained on, how they are measured, and the claims to be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from benchmarks.harness.config import CommandConfig
from sglang_auf.settings import Settings, checked, read_yaml


class StudyConfig(CommandConfig):
    """Arms x seeds of a training study, trained, walked, served and compared; a killed study goes on."""

    study: Path = Field(description="the study as YAML, see benchmarks/studies")
    data_dir: Path | None = Field(
        None, description="read <task>.jsonl of the measured tasks, and files the study names, from here"
    )
    out: Path = Field(Path("runs/study"), description="directory of the study; what is finished in it is not redone")
    jobs: int = Field(1, ge=1, description="trainings at a time, sharing the cores of one CPU")
    report_only: bool = Field(False, description="only write the report anew, from OUT/records")


class Answers(Settings):
    """Answers that arms may be trained on. Exactly one of file, prompts and demo says where they come from.

    file: training rows that exist. prompts: files or hub data sets that the target answers greedily, with up to
    max_tokens. demo: number of prompts from templates, which the target answers in the same way. limit: at most this
    many of each entry of `prompts`. Relative files are in --data-dir.
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


class Arm(Settings):
    """One training configuration. answers: a key of Study.answers.

    set: key=value, changes of the study's recipe, such as objective.name=vat; with objective.earlier another objective
    comes first: ["objective.name=auf", "objective.earlier=[{name: decay, until: 0.25}]"].
    """

    set: tuple[str, ...] = ()
    answers: str | None = None


class MeasuredPrompts(Settings):
    """Prompts that plain decoding answers once. Every drafter is walked over the answers; some are served."""

    tasks: tuple[str, ...] = ("paper",)
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=128, ge=2)
    concurrency: int = Field(default=16, ge=1)


class ServedArms(Settings):
    """Drafters that are also served, on the same prompts, for figures that a walk cannot give. None: all of them."""

    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    temperatures: tuple[float, ...] = (0.0,)
    concurrency: int = Field(default=4, ge=1)


class Claim(Settings):
    """`arm` is compared with `against` in one figure, over matched seeds.

    figure: tau over the measured prompts, or accuracy over all slots of the held-out answers. expected: higher, lower,
    or equal, which holds where every interval of the difference lies within `margin`.
    """

    id: str
    text: str
    arm: str
    against: str
    figure: Literal["tau", "accuracy"] = "tau"
    expected: Literal["higher", "lower", "equal"] = "higher"
    margin: float = Field(default=0.02, gt=0)


class Study(Settings):
    """What a study file holds.

    profile, server_set: server profile of the target, and its changes. target: the same model, for the trainer. recipe,
    set: training recipe of all arms, and its changes. cache_features: compute the target's features of the answers once
    for all arms. seeds: every arm is trained with each.
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
    measured: MeasuredPrompts = MeasuredPrompts()
    served: ServedArms | None = None
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
        faults += [f"claim {name!r} occurs twice" for name in set(ids) if ids.count(name) > 1]
        if len(set(self.seeds)) < len(self.seeds):
            faults.append("a seed occurs twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def answers_of(self, arm: str) -> str:
        """Name of the answers that an arm is trained on: its own, or the first of the study."""
        return self.arms[arm].answers or next(iter(self.answers))


def load_study(path: Path) -> Study:
    """Raises ConfigError for a file that is missing, no YAML, or no study."""
    return checked(Study, read_yaml(path), str(path), "the keys of benchmarks/studies/config.py")
