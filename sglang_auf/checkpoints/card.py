"""The drafter card: what a drafter was trained for, and the check against a target before anything loads.

The card is a small JSON file beside the weights. For a drafter without one (z-lab, SpecForge) a card is derived from
config.json, and what that does not say is unknown. Verification is exact whatever the drafter proposes, so a drafter
that does not fit can only cost tokens per step; but it does so in silence, and the figures then measure a mistake.
What cannot work as trained is an error, what may lower tau is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.drafter_settings import draft_setting, head_of, refuse_unconverted, unknown_settings
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import check_weights, config_size, tapped_layers
from sglang_auf.errors import CardError, TargetError
from sglang_auf.files import CONFIG, find_model, read_json
from sglang_auf.settings import Thinking, checked

CARD_NAME = "auf_card.json"
MASK_EMBEDDING = "mask_embedding.pt"

# What SGLang assumes where config.json is silent (speculative/dflash_utils.py).
DEFAULT_BLOCK_SIZE = 16
DEFAULT_MASK_TOKEN = "<|MASK|>"

# Fields whose absence is worth a warning.
MATTERS = (
    "target_name",
    "target_config_hash",
    "target_layer_ids",
    "mask_token_id",
    "thinking",
    "chat_template_hash",
    "max_length",
    "objective",
)


class MeasuredTau(BaseModel):
    """A measured tau. on: the prompts, temperature, token limit and platform, in words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(ge=1)
    kind: Literal["macro", "micro", "held-out"]
    on: str


class Adaptation(BaseModel):
    """How a drafter was made from an earlier one, of what a server recorded.

    generation: 1 for the first drafter that was adapted. parent: SHA-256 of the weights of the earlier one.
    recorded_rows: rows of the recording that it was trained on. old_tau, new_tau: of the parent and of this drafter,
    means over the same `answers` of the recording, which were kept from training. low, high: 95 % interval of their
    difference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int = Field(ge=1)
    parent: str
    recorded_rows: int = Field(ge=1)
    answers: int = Field(ge=1)
    old_tau: float = Field(ge=1)
    new_tau: float = Field(ge=1)
    low: float
    high: float


class DrafterCard(BaseModel):
    """What a drafter was trained for. None means unknown; a card in a file must have the fields without a default.

    target_config_hash, chat_template_hash: as TargetFacts computes them. target_layer_ids: 0-based layers whose
    outputs are tapped. block_size: B, anchor included. head: "dflash", "domino", or the projector_type found.
    thinking: the chat template's mode in training. max_length: longest training sequence in tokens.
    objective: training loss, with "auf" in its name where it was Accept-Until-Fail; of a curriculum all its parts.
    adapted: None where it was not made by `sglang-auf adapt`. derived: made from config.json.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    target_name: str | None
    target_revision: str | None = None
    target_config_hash: str | None
    target_layer_ids: tuple[int, ...] | None
    mask_token_id: StrictInt | None = Field(ge=0)
    block_size: StrictInt = Field(ge=2)
    head: str
    thinking: Literal["on", "off"] | None = None
    chat_template_hash: str | None = None
    max_length: int | None = Field(default=None, ge=1)
    objective: str | None = None
    recipe: str | dict[str, Any] | None = None
    tau: MeasuredTau | None = None
    adapted: Adaptation | None = None
    derived: bool = False

    @property
    def unknown(self) -> list[str]:
        """Names of the unknown fields."""
        return [name for name in type(self).model_fields if name != "adapted" and getattr(self, name) is None]


@dataclass(frozen=True, slots=True)
class CheckedDrafter:
    """A drafter that fits its target.

    warnings: sentences on what may lower tau. path: its local directory, links resolved. vocabulary: the tokens that it
    may draft, None for all. config: its config.json as it was checked.
    """

    card: DrafterCard
    warnings: tuple[str, ...]
    path: Path
    vocabulary: DraftVocabulary | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def check_drafter(
    drafter: str,
    target: str,
    *,
    drafter_revision: str | None = None,
    target_revision: str | None = None,
    block_size: int | None = None,
    context_length: int | None = None,
    thinking: Thinking = None,
) -> CheckedDrafter:
    """Check a drafter against its target as far as possible without loading either.

    drafter, target: directory or hub id. The rest as in `check_card`. Raises CardError or TargetError. No weight is
    read, no pickle is opened, and no code of the checkpoint runs: SGLang uses its own class whatever auto_map says.
    """
    # What is loaded later must be what is checked now, also where a link on the way to it points elsewhere by then.
    path = find_model(drafter, ("*.json", "*.safetensors", MASK_EMBEDDING), CardError, drafter_revision).resolve()
    if (path / MASK_EMBEDDING).exists():
        raise CardError(
            f"{MASK_EMBEDDING} in {path}",
            "a drafter that uses the target's own embedding of its mask token",
            f"delete {MASK_EMBEDDING} if the drafter works without it; SGLang would write it into the target's "
            "embedding table, and the target must not change",
        )
    config = read_json(path / CONFIG, CardError)
    refuse_unconverted(config, drafter, target)
    card = load_card(path)
    if (listed := draft_vocabulary.load(path)) is not None:
        draft_vocabulary.check(listed, config)
    warnings = check_weights(path, config)
    facts = TargetFacts.of(find_model(target, ("*.json", "*.jinja"), TargetError, target_revision))
    warnings += check_card(card, config, facts, block_size=block_size, context_length=context_length, thinking=thinking)
    return CheckedDrafter(card, tuple(warnings), path, listed, config)


# What a config.json may say otherwise than that of the drafter whose place is taken: SGLang builds the same from it.
INERT = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


def check_replaces(config: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Raises CardError unless a drafter with this config.json may take the place of a running one.

    The cache of keys and values, the tapped layers, the block and the rotary tables are those of the running one.
    """
    differing = [
        f"{key} {config.get(key)!r} where the running drafter has {running.get(key)!r}"
        for key in sorted((config.keys() | running.keys()) - INERT)
        if config.get(key) != running.get(key)
    ]
    if differing:
        raise CardError(
            f"{CONFIG}: {'; '.join(differing)}",
            "a drafter of the running one's shape, block, taps and head, with other weights",
            "start a server with this drafter; a swap changes weights and the draft vocabulary alone",
        )


def load_card(drafter: Path) -> DrafterCard:
    """The card beside the weights, or one derived from config.json. Raises CardError where the two disagree."""
    config = read_json(drafter / CONFIG, CardError)
    derived = _derived_card(config)
    file = drafter / CARD_NAME
    if not file.is_file():
        return derived
    card = _checked_card(read_json(file, CardError), CARD_NAME)
    disagreements = [
        f"{name} is {getattr(card, name)} in {CARD_NAME} and {getattr(derived, name)} in {CONFIG}"
        for name in ("block_size", "mask_token_id", "target_layer_ids", "head")
        if getattr(card, name) != getattr(derived, name)
    ]
    if disagreements:
        raise CardError(
            f"{drafter}: {'; '.join(disagreements)}",
            f"a card that agrees with the {CONFIG} that SGLang loads",
            "correct the wrong one; they may come from different drafters",
        )
    return card


def check_card(
    card: DrafterCard,
    config: Mapping[str, Any],
    target: TargetFacts,
    *,
    block_size: int | None = None,
    context_length: int | None = None,
    thinking: Thinking = None,
) -> list[str]:
    """Warnings on what may lower tau. Raises CardError when the drafter cannot work with the target as
    trained, TargetError for a target that SGLang cannot tap.

    config: the drafter's config.json. block_size: B to serve with, None for the card's. context_length: tokens, None
    for the target's own. thinking: the mode of all requests, None where each request chooses.
    """
    faults = _faults(card, config, target)
    if faults:
        raise CardError(
            "; ".join(faults),
            f"a drafter trained for {target.name}",
            f"serve it with {card.target_name or 'the target it was trained for'}, or give another drafter",
        )
    served = context_length or target.max_position_embeddings or 0
    unknown = [name for name in MATTERS if name in card.unknown]
    unread = unknown_settings(config)
    origin = f"there is no {CARD_NAME}, and config.json does not say" if card.derived else f"{CARD_NAME} does not say"
    notes: list[tuple[bool, str]] = [
        (bool(unknown), f"{origin}: {', '.join(unknown)}; tau falls where serving differs from training"),
        (
            card.derived and draft_setting(config, "block_size") is None,
            f"config.json has no block_size: SGLang takes {DEFAULT_BLOCK_SIZE}",
        ),
        (
            card.mask_token_id is None,
            "config.json has no mask_token_id: SGLang looks up "
            f"{draft_setting(config, 'mask_token', DEFAULT_MASK_TOKEN)} in the target's tokenizer, adding it if absent",
        ),
        (
            card.derived and card.target_layer_ids is not None and draft_setting(config, "target_layer_ids") is None,
            f"config.json has no target_layer_ids: SGLang taps {list(card.target_layer_ids or ())}, its own choice",
        ),
        (
            bool(unread),
            f"SGLang does not read {', '.join(unread)} in dflash_config; tau falls if the drafter was trained with it",
        ),
        (
            card.objective is not None and "auf" not in card.objective.lower(),
            f"the drafter was not trained with AUF but with {card.objective}",
        ),
        (
            _differ(card.target_name, target.hub_id),
            f"the drafter was trained for {card.target_name}, the target is {target.hub_id}",
        ),
        (
            _differ(card.target_revision, target.revision),
            f"the drafter was trained for revision {card.target_revision}, the target is at {target.revision}",
        ),
        (
            card.chat_template_hash is not None and card.chat_template_hash != target.chat_template_hash,
            "the target's chat template is not the one the drafter was trained with",
        ),
        (
            _differ(card.thinking, thinking),
            f"the drafter was trained with thinking {card.thinking}, and is served with thinking {thinking}",
        ),
        (
            _differ(card.block_size, block_size),
            f"the drafter was trained with blocks of {card.block_size}, and is served with {block_size}",
        ),
        (
            card.max_length is not None and card.max_length < served,
            f"the drafter was trained on up to {card.max_length} tokens, and is served up to {served}",
        ),
    ]
    return [text for applies, text in notes if applies]


def _faults(card: DrafterCard, config: Mapping[str, Any], target: TargetFacts) -> list[str]:
    """What in the drafter contradicts the target."""
    layers, tappable = target.num_layers, target.tappable_layers
    sizes = (
        ("hidden_size", config_size(config, "hidden_size"), target.hidden_size),
        ("vocab_size", config_size(config, "vocab_size"), target.vocab_size),
        ("num_target_layers", draft_setting(config, "num_target_layers", layers), layers),
    )
    faults = [
        f"the drafter has {key} {drafter}, where the target's is {wanted}"
        for key, drafter, wanted in sizes
        if drafter != wanted
    ]
    if _differ(card.target_config_hash, target.config_hash):
        faults.append(f"target_config_hash {card.target_config_hash} in the card, {target.config_hash} of the target")
    if card.mask_token_id is not None and card.mask_token_id >= target.vocab_size:
        faults.append(f"mask_token_id {card.mask_token_id} is outside the target's vocabulary of {target.vocab_size}")
    scale = draft_setting(config, "input_embedding_scale")
    if scale and not (isinstance(scale, int | float) and math.isclose(scale, target.embedding_scale, rel_tol=2**-7)):
        faults.append(f"input_embedding_scale {scale}, where SGLang scales the target's by {target.embedding_scale:g}")
    outside = [layer for layer in card.target_layer_ids or () if not 0 <= layer < tappable]
    if outside:
        faults.append(f"tapped layers {outside}, where SGLang taps 0..{tappable - 1} of the target's {layers} layers")
    return faults


def _differ(trained: object, served: object) -> bool:
    """True where both are known and not equal."""
    return trained is not None and served is not None and trained != served


def _derived_card(config: Mapping[str, Any]) -> DrafterCard:
    """The card that config.json alone gives, read as SGLang reads it."""
    values = {
        "target_name": None,
        "target_config_hash": None,
        "target_layer_ids": tapped_layers(config),
        "mask_token_id": draft_setting(config, "mask_token_id"),
        "block_size": draft_setting(config, "block_size", DEFAULT_BLOCK_SIZE),
        "head": head_of(config),
        "derived": True,
    }
    return _checked_card(values, CONFIG)


def _checked_card(values: Mapping[str, Any], source: str) -> DrafterCard:
    return checked(DrafterCard, values, source, "the fields of a drafter card, format 1", error=CardError)
