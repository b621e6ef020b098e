"""`sglang-auf evaluate`: what a drafter does on answers that are given, alone or beside another drafter."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sglang_auf import provenance
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import CheckedDrafter, check_drafter
from sglang_auf.checkpoints.weights import config_size, weights_sha256
from sglang_auf.checkpoints.writing import RECIPE
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import write_whole
from sglang_auf.recording.manifest import require_target
from sglang_auf.settings import enable_thinking, read_yaml
from sglang_auf.stats.bootstrap import Difference, interval_of_mean, paired_difference
from sglang_auf.training.data.features import find_target
from sglang_auf.training.evaluation.comparison import Walkers
from sglang_auf.training.evaluation.walk import HeldOut
from sglang_auf.training.recipe import parse_recipe
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.split import split_held_out

logger = logging.getLogger(__name__)

TREES = (8, 16)
"""Nodes of the trees that drafters are evaluated with, beside the chain."""

ANSWERS = "answers"
"""The name on which the random draws of the intervals depend."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """drafters: name as given -> SHA-256 of its weights. held_out: of each. data: SHA-256 of what was read."""

    target: str
    sources: tuple[str, ...]
    data: str
    drafters: dict[str, str]
    held_out: tuple[HeldOut, ...]

    @property
    def differences(self) -> dict[str, Difference]:
        """Figure -> of the second drafter to the first, answer by answer; {} for one drafter."""
        if len(self.held_out) == 1:
            return {}
        first, second = (held_out.named for held_out in self.held_out)
        return {name: paired_difference(ANSWERS, first[name], second[name]) for name in first}

    def as_json(self) -> dict[str, Any]:
        """Plain values. Each tau is a mean over answers with its interval of 95 %, None with fewer than three."""
        drafters = [
            {
                "drafter": name,
                "weights_sha256": weights,
                **{figure: _mean(taus) for figure, taus in each.named.items()},
                "tau_micro": each.tau_micro,
                "alpha": each.alpha,
                "histogram": each.histogram,
                "accuracy": each.accuracy,
                "loss": each.loss,
            }
            for (name, weights), each in zip(self.drafters.items(), self.held_out, strict=True)
        ]
        differences = {
            name: {"mean": each.mean, "interval": None if each.low is None else [each.low, each.high]}
            for name, each in self.differences.items()
        }
        data = {"sources": self.sources, "sha256": self.data, "answers": self.held_out[0].answers}
        made = provenance.of_this_run() | {"machine": provenance.machine()}
        return {"target": self.target, "data": data, "drafters": drafters, "differences": differences, **made}

    def __str__(self) -> str:
        return self._alone(self.held_out[0]) if len(self.held_out) == 1 else self._beside()

    def _alone(self, found: HeldOut) -> str:
        steps = sum(found.histogram)
        figures = [
            ("answers", f"{found.answers}", ""),
            *((name, _with_interval(taus), "mean over answers (macro)") for name, taus in found.named.items()),
            ("tau_micro", f"{found.tau_micro:.4f}", f"over all {steps} steps"),
            ("accuracy", f"{found.accuracy:.4f}", "of all slots, given the text before the block"),
            ("loss", f"{found.loss:.4f}", ""),
        ]
        alphas = (None, *found.alpha)
        rows = [
            (accepted, count, count / steps, alpha)
            for accepted, (count, alpha) in enumerate(zip(found.histogram, alphas, strict=True))
        ]
        table = tabulate(rows, ("accepted", "steps", "share", "alpha"), tablefmt="plain", floatfmt=".4f")
        return f"{tabulate(figures, tablefmt='plain', disable_numparse=True)}\n{table}"

    def _beside(self) -> str:
        first, second = self.held_out
        rows = [("answers", f"{first.answers}", f"{second.answers}", "")]
        rows += [
            (name, _with_interval(first.named[name]), _with_interval(second.named[name]), str(difference))
            for name, difference in self.differences.items()
        ]
        rows += [
            (name, f"{getattr(first, name):.4f}", f"{getattr(second, name):.4f}", "")
            for name in ("tau_micro", "accuracy")
        ]
        headers = ("", *self.drafters, "difference, the second to the first")
        note = "Intervals: 95 %; of differences answer by answer. Where one holds 0, no difference is shown."
        return f"{tabulate(rows, headers, tablefmt='plain', disable_numparse=True)}\n{note}"


def evaluate(
    drafter: str,
    target: str,
    data: Sequence[str],
    *,
    against: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Walk a drafter's checkpoint through answers, on the GPU if there is one.

    drafter: directory or hub id. target: directory, hub id or prepared target. data: files, folders or hub data sets of
    rows with answers, which are read as the drafter's card says. against: another drafter, which walks the same answers
    and may have other taps, another block and another draft vocabulary. limit: number of conversations, those that a
    recipe with this data and data.held_out `limit` does not train on; None: all. out: a JSON file to write. As in
    serving, only tokens of a draft vocabulary beside the weights are drafted. The loss has the same credit for all
    slots (Domino: decay, since it has no such objective). Raises CardError, TargetError, DataError or, for a limit
    below 1, the same drafter twice or a file that exists, ConfigError.
    """
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}", "a new file in a directory that exists")
    if against == drafter:
        raise ConfigError(f"--against {against}, which is the drafter itself", "another drafter")
    directory = find_target(target)
    require_target(data, directory)
    checked = {name: check_drafter(name, str(directory)) for name in (drafter, against) if name is not None}
    for each in checked.values():
        for warning in each.warnings:
            logger.warning("%s", warning)
    conversations, sha256 = _read(checked[drafter], data, directory, limit)
    walkers = Walkers(directory, [(each.path, draft_vocabulary.in_use(each.path)) for each in checked.values()])
    held_out = walkers.walk(ANSWERS, conversations, TREES)
    if not held_out[0].answers:
        raise DataError(f"no answer of two tokens or more in {', '.join(data)}", "answers of two tokens or more")
    weights = {name: weights_sha256(each.path) for name, each in checked.items()}
    evaluation = Evaluation(target, tuple(data), sha256, weights, tuple(held_out))
    if out is not None:
        write_whole(out, json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False) + "\n")
    return evaluation


def _read(
    checked: CheckedDrafter, data: Sequence[str], target: Path, limit: int | None
) -> tuple[list[Conversation], str]:
    """The conversations to walk, and the digest of all that was read."""
    from transformers import AutoTokenizer

    loaded = load_conversations(
        list(data),
        AutoTokenizer.from_pretrained(target),
        thinking=enable_thinking(checked.card.thinking),
        vocab_size=config_size(checked.config, "vocab_size"),
        **_read_as(checked, limit),
    )
    conversations = loaded.conversations
    if limit is not None and limit < len(conversations):
        conversations = split_held_out(conversations, count=limit, apart="tokens")[1]  # nothing is trained
    return conversations, loaded.sha256


def _read_as(checked: CheckedDrafter, limit: int | None) -> dict[str, Any]:
    """How rows are read: whole, or where a limit asks for what training held out, as training read them, since which
    rows those are depends on which it could use."""
    read: dict[str, Any] = {
        "max_length": checked.card.max_length or config_size(checked.config, "max_position_embeddings"),
        "min_answer_tokens": 2,
    }
    if limit is not None and (checked.path / RECIPE).is_file():
        recipe = parse_recipe(read_yaml(checked.path / RECIPE), f"of {checked.path}")
        read = {
            "max_length": recipe.data.max_length,
            "min_answer_tokens": recipe.min_answer_tokens,
            "overlong": recipe.data.overlong,
            "split": recipe.data.split,
        }
    return read


def _mean(taus: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(taus) / len(taus), "interval": interval_of_mean(ANSWERS, taus)}


def _with_interval(taus: Sequence[float]) -> str:
    interval = interval_of_mean(ANSWERS, taus)
    return f"{sum(taus) / len(taus):.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")
