"""A study as YAML: arms and seeds, what they are trained on, how they are measured, and the claims to be tested."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from benchmarks.harness.config import CommandConfig, Counts, split_commas
from sglang_auf.errors import ConfigError
from sglang_auf.settings import Settings, checked, read_yaml

Budget: TypeAlias = int | None
"""Steps that every arm is trained for; None where the recipe says it."""

ACCURACY = "accuracy"

Positive = Annotated[int, Field(ge=1)]


class StudyConfig(CommandConfig):
    """Arms x seeds of a training study, trained, walked, served and compared; a killed study goes on."""

    study: Path = Field(description="the study as YAML, see benchmarks/studies")
    data_dir: Path | None = Field(
        None, description="read <task>.jsonl of the measured tasks, and files the study names, from here"
    )
    out: Path = Field(Path("runs/study"), description="directory of the study; what is finished in it is not redone")
    seeds: Annotated[tuple[int, ...], BeforeValidator(split_commas)] = Field(
        (), description="only these of the study's seeds; another machine may do the others"
    )
    budgets: Counts = Field((), description="only these of the study's budgets")
    arms: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="only these of the study's arms, and claims between them"
    )
    join: tuple[Path, ...] = Field(
        (), description="an OUT of the same study with other seeds, of another machine, to report with; may be repeated"
    )
    jobs: int = Field(1, ge=1, description="trainings at a time, sharing the cores of one CPU")
    settings: tuple[str, ...] = Field(
        (), alias="set", description="key=value for the servers, over the study's server_set; may be repeated"
    )
    walk_only: bool = Field(False, description="serve no drafter, and leave served figures out of the report")
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
    """One training configuration. answers: a key of Study.answers. budgets: those it is trained for; None: all.

    set: key=value, changes of the study's recipe, such as objective.name=vat; with objective.earlier another objective
    comes first: ["objective.name=auf", "objective.earlier=[{name: decay, until: 0.25}]"].
    """

    set: tuple[str, ...] = ()
    answers: str | None = None
    budgets: tuple[int, ...] | None = None


class MeasuredPrompts(Settings):
    """Prompts that plain decoding answers once. Every drafter is walked over the answers; some are served.

    limit: at most this many of each task and set. sets: files of prompts of other kinds than the tasks and than what is
    trained on (as --prompts reads them), in --data-dir or else in the working directory. Each has figures of its own,
    and no mean over tasks counts it. trees: numbers of nodes of trees to walk with, beside the chain.
    """

    tasks: tuple[str, ...] = ("paper",)
    sets: tuple[Path, ...] = ()
    trees: tuple[Positive, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=128, ge=2)
    concurrency: int = Field(default=16, ge=1)


class ServedArms(Settings):
    """Drafters that are also served, on the same prompts, for figures that a walk cannot give. None: all of them."""

    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    temperatures: tuple[float, ...] = (0.0,)
    concurrency: int = Field(default=4, ge=1)


class Claim(Settings):
    """`arm` is compared with `against` in one figure, over matched seeds.

    figure: tau over the measured prompts with a chain, tau_tree_N with trees of N nodes (one of `measured.trees`), or
    accuracy over all slots of the held-out answers. expected: higher, lower,
    or equal, which holds where every interval of the difference lies within `margin`.
    """

    id: str
    text: str
    arm: str
    against: str
    figure: str = "tau"
    expected: Literal["higher", "lower", "equal"] = "higher"
    margin: float = Field(default=0.02, gt=0)


class Study(Settings):
    """What a study file holds.

    profile, server_set: server profile of the target, a name or a file, and its changes. target: the same model, for
    the trainer. recipe, set: training recipe of all arms, and its changes. cache_features: compute the target's
    features of the answers once for all arms. seeds: every arm is trained with each. budgets: every arm is also trained
    for each of these numbers of steps, with further changes of the recipe, such as {300: [evaluate_every=50], 2400:
    []}. A claim is tested at each budget that has both of its arms. Each training is a run of its own: the learning
    rate and curricula follow the share of training done, so that no run is the beginning of a longer one.
    """

    title: str
    profile: str
    server_set: tuple[str, ...] = ()
    target: str
    recipe: str
    set: tuple[str, ...] = ()
    cache_features: bool = False
    seeds: tuple[int, ...] = Field(min_length=1)
    budgets: dict[Positive, tuple[str, ...]] = Field(default_factory=dict)
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
        for name, arm in self.arms.items():
            faults += [f"arm {name}: no budget {steps}" for steps in arm.budgets or () if steps not in self.budgets]
        for steps in self.budgets:
            if len(self._arms_of(steps)) < 2:
                faults.append(f"budget {steps}: fewer than two arms")
        if self.served is not None:
            faults += [f"served: no arm {name!r}" for name in self.served.arms or () if name not in self.arms]
            faults += [f"served: no seed {seed}" for seed in self.served.seeds or () if seed not in self.seeds]
            faults += [f"served: no budget {steps}" for steps in self.served.budgets or () if steps not in self.budgets]
        faults += [
            f"claim {claim.id}: figure {claim.figure!r} is none of {', '.join([*self.walked_figures, ACCURACY])}"
            for claim in self.claims
            if claim.figure not in (*self.walked_figures, ACCURACY)
        ]
        ids = [claim.id for claim in self.claims]
        faults += [f"claim {name!r} occurs twice" for name in set(ids) if ids.count(name) > 1]
        if len(set(self.seeds)) < len(self.seeds):
            faults.append("a seed occurs twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def walked_figures(self) -> dict[str, int | None]:
        """The taus that a walk gives by name, and the number of nodes of their trees; None: with a chain."""
        return {"tau": None, **{f"tau_tree_{nodes}": nodes for nodes in self.measured.trees}}

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets of other kinds, which are the names of their files."""
        return tuple(file.name for file in self.measured.sets)

    @property
    def parts(self) -> dict[Budget, Study]:
        """A study of one budget for each budget; the study itself where it has none."""
        return {steps: self._of(steps) for steps in self.budgets} or {None: self}

    @property
    def served_runs(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The arms and the seeds that are served."""
        if self.served is None:
            return (), ()
        arms, seeds = self.served.arms, self.served.seeds
        return (
            tuple(arm for arm in self.arms if arms is None or arm in arms),
            tuple(seed for seed in self.seeds if seeds is None or seed in seeds),
        )

    def only(self, seeds: Sequence[int] = (), budgets: Sequence[int] = (), arms: Sequence[str] = ()) -> Study:
        """The study with some of its seeds, budgets and arms, or all. Raises ConfigError for one that it does not have.

        Of claims those between these arms.
        """
        asked: list[tuple[str, Sequence[Any], Collection[Any]]] = [
            ("seed", seeds, self.seeds),
            ("budget", budgets, self.budgets),
            ("arm", arms, self.arms),
        ]
        for name, wanted, known in asked:
            if others := [each for each in wanted if each not in known]:
                raise ConfigError(f"{name} {others[0]}", f"one of the study's: {', '.join(map(str, known)) or 'none'}")
        steps_of = {steps for steps in self.budgets if not arms or set(arms) & set(self._arms_of(steps))}
        if self.budgets and not steps_of.intersection(budgets or self.budgets):
            raise ConfigError(
                f"arms {', '.join(arms)} with budgets {', '.join(map(str, budgets or self.budgets))}",
                "an arm that is trained with one of these budgets",
            )
        chosen = {
            steps: changes
            for steps, changes in self.budgets.items()
            if steps in steps_of and (not budgets or steps in budgets)
        }
        of_these = tuple(seed for seed in self.seeds if not seeds or seed in seeds)
        named = {name: arm for name, arm in self.arms.items() if not arms or name in arms}
        claims = tuple(claim for claim in self.claims if claim.arm in named and claim.against in named)
        return self.model_copy(update={"seeds": of_these, "budgets": chosen, "arms": named, "claims": claims})

    def _arms_of(self, steps: int) -> dict[str, Arm]:
        return {name: arm for name, arm in self.arms.items() if arm.budgets is None or steps in arm.budgets}

    def _of(self, steps: int) -> Study:
        arms, served = self._arms_of(steps), self.served
        if served is not None and served.budgets is not None and steps not in served.budgets:
            served = None
        changes = (*self.set, "schedule.epochs=null", f"schedule.max_steps={steps}", *self.budgets[steps])
        claims = tuple(claim for claim in self.claims if claim.arm in arms and claim.against in arms)
        update = {"set": changes, "budgets": {}, "arms": arms, "served": served, "claims": claims}
        return self.model_copy(update=update)

    def answers_of(self, arm: str) -> str:
        """Name of the answers that an arm is trained on: its own, or the first of the study."""
        return self.arms[arm].answers or next(iter(self.answers))


def load_study(path: Path) -> Study:
    """Raises ConfigError for a file that is missing, no YAML, or no study."""
    return checked(Study, read_yaml(path), str(path), "the keys of benchmarks/studies/config.py")
