"""Training objectives: the credit of a slot, that is how much loss each slot of a block carries, is decided here.

All are one family (arXiv 2607.01893, section 3): L = sum(m c CE) / sum(m c) over every slot of every block of the
global batch. m is the validity mask, CE the cross-entropy of a slot, and c its credit, which has no gradient. The
objectives differ in c; where the size of c is part of the objective (Objective.by_block), the sum is divided by the
number of blocks instead. A new one is a function from Slots to c, such as `auf`, and a line in OBJECTIVES. step.py
calls the function (`_reduce`) and adds up the loss.

The objective may change in the course of training (ObjectiveSettings.earlier). Nothing else changes then: the
optimiser, its state and its schedule go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from sglang_auf.settings import Settings


def _known(name: str) -> str:
    if name not in OBJECTIVES and name not in DOMINO_OBJECTIVES:
        known = f"{', '.join(OBJECTIVES)} (dflash), {', '.join(DOMINO_OBJECTIVES)} (domino)"
        raise ValueError(f"none of the objectives {known}")
    return name


ObjectiveName = Annotated[str, AfterValidator(_known)]


class EarlierObjective(Settings):
    """An objective of the first steps. until: share of training (0..1) at which the next objective takes over."""

    name: ObjectiveName
    until: float = Field(gt=0, lt=1)


class ObjectiveSettings(Settings):
    """An objective by name, the objectives before it, and the constants of those that have any.

    earlier: what is trained with before `name`, in order, each to a share of training, so that
    {name: auf, earlier: [{name: decay, until: 0.25}]} is a quarter of decay and then AUF. The constants are of all.
    gamma: decay length in slots (7 for blocks of 16, 4 for 8: arXiv 2602.06036). alpha: D-PACE's floor under the
    drafter's confidence. first_error: extra weight at the first failure, for l2r and auf+focus. ranks: for auf-tree,
    how many of the likeliest tokens may hold the label. labels: what a slot is compared with, the text's token (the
    paper) or the target's argmax after the text before it. lambda_*: weight of Domino's base branch, linear from start
    to end over the first lambda_ratio of training.
    """

    name: ObjectiveName
    earlier: tuple[EarlierObjective, ...] = ()
    gamma: float = Field(default=7.0, gt=0)
    alpha: float = Field(default=0.5, ge=0, le=1)
    first_error: float = Field(default=0.3, ge=0)
    ranks: int = Field(default=4, ge=1)
    labels: Literal["text", "target"] = "text"
    lambda_start: float = Field(default=1.0, ge=0, le=1)
    lambda_end: float = Field(default=0.0, ge=0, le=1)
    lambda_ratio: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        shares = [each.until for each in self.earlier]
        if shares != sorted(set(shares)):
            raise ValueError(f"earlier: each `until` must be larger than the one before, not {shares}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives in the order in which they are trained with."""
        return (*(each.name for each in self.earlier), self.name)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of training of each of `names`; their sum is 1."""
        ends = (0.0, *(each.until for each in self.earlier), 1.0)
        return tuple(end - start for start, end in pairwise(ends))

    @property
    def description(self) -> str:
        """For people: "auf", or "decay until 0.25, then auf"."""
        return ", then ".join([*(f"{each.name} until {each.until:g}" for each in self.earlier), self.name])

    def phase(self, progress: float) -> int:
        """Place in `names` of the objective at `progress` (0..1) of training: steps done over all steps."""
        return sum(progress >= each.until for each in self.earlier)

    def name_at(self, progress: float) -> str:
        """The objective at `progress` (0..1) of training."""
        return self.names[self.phase(progress)]

    def base_weight(self, progress: float) -> float:
        """lambda at `progress` (0..1) of training: arXiv 2605.29707's curriculum from the base to the final branch."""
        done = min(1.0, progress / self.lambda_ratio)
        return self.lambda_start + (self.lambda_end - self.lambda_start) * done


@dataclass(frozen=True, slots=True)
class Slots:
    """What a credit is computed from, all [blocks, slots], without gradient.

    correct: the drafter's argmax is the label. log_q: log probability that the drafter gives the label. mask: the slot
    is valid. within: the label is among the drafter's likeliest tokens, of as many as Objective.by_rank asks for; None
    where it asks for none. Where an objective stops a block (Objective.failures), correct and within are False and
    log_q is 0 in later slots.
    """

    correct: Tensor
    log_q: Tensor
    mask: Tensor
    within: Tensor | None = None


Credit = Callable[[Slots, ObjectiveSettings], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """credit: a function from Slots to [blocks, slots] float32.

    failures: slots after that many wrong ones have no credit, so their logits are not computed; None: all slots count.
    by_rank: a slot is wrong only where its label is not among settings.ranks tokens. by_block: the loss is the sum over
    a block's slots, in the mean over blocks with a valid slot; otherwise it is the mean over slots, weighted by credit.
    """

    credit: Credit
    failures: int | None = None
    by_rank: bool = False
    by_block: bool = False


def first_failures(slots: Slots, count: int = 1) -> Tensor:
    """1 up to and including the count-th wrong valid slot, 0 after it. With count 1 this is AUF's support."""
    wrong = (~slots.correct & slots.mask).int()
    return ((wrong.cumsum(-1) - wrong) < count).float()


def full(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """The same credit for every slot."""
    return torch.ones_like(slots.log_q)


def decay(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """exp(-(i-1) / gamma) for the i-th drafted slot: DFlash, arXiv 2602.06036."""
    slot = torch.arange(slots.mask.shape[-1], device=slots.mask.device)
    return torch.exp(-slot / settings.gamma).expand_as(slots.log_q)


def auf(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """Accept until fail, arXiv 2607.01893 equation 1: the slots that verification looks at, up to the failing one."""
    return first_failures(slots)


def auf_tree(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """AUF for trees: up to the first slot whose label no branch of a tree of that width would hold. Our own."""
    assert slots.within is not None
    return first_failures(replace(slots, correct=slots.within))


def auf_decay(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """AUF's support, with the decay inside it."""
    return first_failures(slots) * decay(slots, settings)


def auf_2(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """Accept until the second failure: also the slots up to the next wrong one, as if the first were right. Our own."""
    return first_failures(slots, 2)


def auf_focus(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """AUF's support, and first_error more at the failing slot: L2R's focus inside AUF. Our own."""
    wrong = ~slots.correct & slots.mask
    return first_failures(slots) * (1 + settings.first_error * wrong)


def vat(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """VAT, arXiv 2608.30135: 1 before the first failure, and the decay begun anew at it.

    The credit alone: the paper also learns the target's distribution, and trains a head that predicts the failure.
    """
    behind = (1 - first_failures(slots)).cumsum(-1)  # slots since the failing one
    return torch.exp(-behind / settings.gamma)


def dpace(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """D-PACE, arXiv 2605.18810: for slot i, sum over m >= i of the product of smoothed confidences of slots <= m.

    That is what the expected accepted length gains with the log of slot i's confidence, so the size of a credit means
    something, and dividing by the sum of credits would undo it. The loss is divided by the number of blocks, as the
    author asks (SpecForge #828). SpecForge itself then also gave all conversations the same weight (#848); here all
    blocks have the same.
    """
    q = (1 - settings.alpha) * slots.log_q.exp() + settings.alpha
    reach = torch.where(slots.mask, q, 1.0).cumprod(-1)
    reach = torch.where(slots.mask, reach, 0.0)
    return reach.flip(-1).cumsum(-1).flip(-1)


def l2r(slots: Slots, settings: ObjectiveSettings) -> Tensor:
    """The first-error focus of L2R, arXiv 2606.11552: decay, and first_error more at the first failure."""
    wrong = ~slots.correct & slots.mask
    return decay(slots, settings) + settings.first_error * (first_failures(slots) * wrong)


OBJECTIVES: dict[str, Objective] = {
    "full": Objective(full),
    "decay": Objective(decay),
    "auf": Objective(auf, failures=1),
    "auf-tree": Objective(auf_tree, failures=1, by_rank=True),
    "auf+decay": Objective(auf_decay, failures=1),
    "auf+focus": Objective(auf_focus, failures=1),
    "auf-2": Objective(auf_2, failures=2),
    "vat": Objective(vat),
    "dpace": Objective(dpace, by_block=True),
    "l2r": Objective(l2r),
}


@dataclass(frozen=True, slots=True)
class DominoObjective:
    """Credits of Domino's two branches, by name in OBJECTIVES.

    final_sees: the branch whose argmax decides where a block of the final branch fails.
    """

    base: str
    final: str
    final_sees: Literal["base", "final"] = "final"


# Arms of arXiv 2607.01893, table 2; "+d" keeps the decay inside the support.
DOMINO_OBJECTIVES: dict[str, DominoObjective] = {
    "decay": DominoObjective("decay", "decay"),
    "b-auf": DominoObjective("auf", "full"),
    "b-auf+d": DominoObjective("auf+decay", "decay"),
    "s-auf": DominoObjective("auf", "auf", final_sees="base"),
    "s-auf+d": DominoObjective("auf+decay", "auf+decay", final_sees="base"),
    "f-auf": DominoObjective("auf", "auf"),
    "f-auf+d": DominoObjective("auf+decay", "auf+decay"),
}
