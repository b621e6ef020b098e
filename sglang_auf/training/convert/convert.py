"""DFlash and Domino drafters of SpecForge 0.2.0 and speculators 0.9.0, as SGLang and this project load them.

A drafter that SGLang would not serve exactly as it was trained is refused with the reason. Every change is named in a
sentence. No pickle is ever opened, and no code from a checkpoint runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import CARD_NAME, MASK_EMBEDDING, DrafterCard
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.drafter_settings import written_by_speculators
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import ALIASES, BORROWED, RECOMPUTED
from sglang_auf.checkpoints.writing import write_drafter
from sglang_auf.errors import CardError, TargetError
from sglang_auf.files import CONFIG, HUB_ID, find_model, read_json, weight_files
from sglang_auf.provenance import sha256_of
from sglang_auf.training.convert import specforge, speculators
from sglang_auf.training.convert.common import Reading, refusal

# The target's own norm and head, with which speculators computes its labels.
FOR_LABELS = ("verifier_norm.weight", "verifier_lm_head.weight")
REDUCED = ("t2d", "d2t")
"""What speculators keeps of a reduced draft vocabulary: which tokens are in it (bool [vocabulary]), and for the i-th of
them its id less i (int [drafted])."""
HEAD = "lm_head.weight"
# Early SpecForge kept Domino's head one level down.
HEAD_PREFIX = "logit_head."
TRAIN_COMMAND = "train_command.txt"  # what speculators leaves beside its weights


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted drafter. kind: which trainer wrote the source. changes, warnings: sentences."""

    path: Path
    kind: str
    changes: tuple[str, ...]
    warnings: tuple[str, ...]


def convert(source: str, out: Path, *, target: str | None = None, force: bool = False) -> Conversion:
    """Write the drafter `source` (directory or hub id) to the new directory `out` in this project's format.

    target: directory or hub id to check it against; a speculators checkpoint names its own. Raises CardError for what
    cannot be served as trained, TargetError without a target where one is needed, ConfigError as `write_drafter` does.
    """
    path = find_model(source, ("*.json", "*.safetensors", MASK_EMBEDDING, TRAIN_COMMAND), CardError)
    if (path / CARD_NAME).is_file():
        raise CardError(
            f"{source} is already a drafter of this project ({CARD_NAME}); it needs no conversion",
            "a drafter of SpecForge or speculators",
            "serve it as it is; `sglang-auf check` checks it against a target",
        )
    if (path / MASK_EMBEDDING).exists():
        raise refusal(MASK_EMBEDDING, "SGLang drafts with the target's own embedding of the mask token")
    files = weight_files(path, CardError)
    config = read_json(path / CONFIG, CardError)
    trainer = speculators if written_by_speculators(config) else specforge
    checked_against = target or (speculators.verifier_of(config) if trainer is speculators else None)
    place = None if checked_against is None else _find_target(checked_against, given=target is not None)
    facts = None if place is None else TargetFacts.of(place)
    reading = trainer.read(config, None if facts is None else facts.num_layers)

    weights, weight_changes, vocabulary = _weights(files, reading, place)
    name = source if HUB_ID.fullmatch(source) and not Path(source).exists() else path.resolve().name
    changes = (*reading.changes, *weight_changes)
    origin = {
        "converted_from": {"name": name, "format": reading.kind, "files": sha256_of([path / CONFIG, *files])},
        "changes": list(changes),
    }
    card = _card(reading, facts, path / TRAIN_COMMAND)
    texts = {} if vocabulary is None else {draft_vocabulary.FILE: draft_vocabulary.written(vocabulary)}
    warnings = write_drafter(
        out, reading.config, weights, card, origin, texts, None if place is None else str(place), force
    )
    if trainer is speculators and not str(config.get("speculators_version")).startswith("0.9."):
        warnings.append(f"written by {reading.kind}, but read as a checkpoint of speculators 0.9.0")
    if place is None:
        warnings.append("not checked against a target: name it with --target")
    return Conversion(out, reading.kind, changes, tuple(warnings))


def _find_target(name: str, given: bool) -> Path:
    try:
        return find_model(name, ("*.json", "*.jinja"), TargetError)
    except TargetError as problem:
        if given:
            raise
        raise TargetError(
            f"{problem.found}, which the checkpoint names as its target",
            problem.expected,
            "name the directory of the target with --target",
        ) from problem


def _weights(
    files: list[Path], reading: Reading, target: Path | None
) -> tuple[dict[str, torch.Tensor], list[str], DraftVocabulary | None]:
    """The weights under SGLang's names, sentences on what was renamed, left out and cast, and a draft vocabulary."""
    kept: dict[str, torch.Tensor] = {}
    of_vocabulary: dict[str, torch.Tensor] = {}
    changes: list[str] = []
    cast: Counter[str] = Counter()
    for file in files:
        for stored, tensor in _tensors(file).items():
            name = _name(stored)
            if name in REDUCED and reading.drafted is None:
                raise refusal(
                    f"{stored} in {file.name}",
                    "a reduced draft vocabulary, while SGLang uses the target's",
                )
            if name in REDUCED or (name == HEAD and reading.drafted is not None):
                of_vocabulary[name] = tensor
                continue
            if name in BORROWED:
                changes.append(_left_out(stored, tensor, _target_table(target, name)))
                continue
            if name in FOR_LABELS or name.endswith(RECOMPUTED):
                changes.append(
                    f"weights: {stored} left out: only training reads it"
                    if name in FOR_LABELS
                    else f"weights: {stored} left out: SGLang computes it"
                )
                continue
            if name in kept:
                raise refusal(f"two weights for {name}", "one of them would be lost")
            if name != stored:
                changes.append(f"weights: {stored} -> {name}")
            if tensor.dtype != torch.bfloat16:
                cast[str(tensor.dtype).removeprefix("torch.")] += 1
            kept[name] = tensor
    changes += [f"weights: {count} cast from {kind} to bfloat16" for kind, count in cast.items()]
    vocabulary = None
    if reading.drafted is not None:
        vocabulary = _draft_vocabulary(reading, of_vocabulary, _target_table(target, HEAD))
        changes.append(
            f"weights: {', '.join(of_vocabulary)} -> {draft_vocabulary.FILE}: {reading.drafted} of "
            f"{reading.config['vocab_size']} tokens, whose rows of the head are the target's"
        )
    return kept, changes or ["weights: none changed"], vocabulary


def _draft_vocabulary(
    reading: Reading, weights: Mapping[str, torch.Tensor], table: torch.Tensor | None
) -> DraftVocabulary:
    """The tokens of a reduced vocabulary, whose rows of the head must be those of the target's head `table`.

    Raises CardError where they are others, or where this cannot be known.
    """
    size, of = reading.drafted, reading.config["vocab_size"]
    found = f"a reduced draft vocabulary, {size} of {of} tokens"
    if missing := [name for name in ("d2t", HEAD) if name not in weights]:
        raise refusal(f"{found}, without {' and '.join(missing)}", "what it drafts is not known")
    if table is None:
        raise refusal(
            f"{found}, and no weights of the target",
            "SGLang drafts with the rows of the target's head, which must be compared with the drafter's",
            "name a directory that holds the target's weights with --target",
        )
    offsets, head = weights["d2t"].long(), weights[HEAD]
    tokens = offsets + torch.arange(len(offsets))
    listed = torch.zeros(of, dtype=torch.bool)
    if len(tokens) != size or not ((tokens >= 0) & (tokens < of)).all() or (tokens.diff() <= 0).any():
        raise refusal(f"{found}, with a d2t of {len(tokens)} that are not ascending ids", "what it drafts is not known")
    listed[tokens] = True
    if "t2d" in weights and not torch.equal(weights["t2d"].bool(), listed):
        raise refusal(f"{found}, with a t2d of other tokens than d2t", "what it drafts is not known")
    if head.shape != table[tokens].shape or not torch.equal(head.bfloat16(), table[tokens].bfloat16()):
        raise refusal(
            f"{found}, with a head that is not the target's",
            "SGLang drafts with the target's own head",
            "train it again with the target's head, or with the full vocabulary",
        )
    return DraftVocabulary(tokens=tuple(tokens.tolist()))


def _name(stored: str) -> str:
    """SGLang's name of a stored weight."""
    name = stored.removeprefix("model.")
    name = re.sub(rf"^{re.escape(HEAD_PREFIX)}(?=prefix_gru\.|embed_proj\.)", "", name)
    return ALIASES.get(name, name)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as problem:
        raise CardError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file ({problem})",
            "a complete safetensors file",
            "fetch the drafter again",
        ) from problem


def _left_out(stored: str, tensor: torch.Tensor, table: torch.Tensor | None) -> str:
    """Sentence on a copy of the target's embedding or head. Raises CardError where it differs from the target's."""
    if table is None:
        return f"weights: {stored} left out: SGLang drafts with the target's (not compared: its weights are not here)"
    if tensor.shape != table.shape or not torch.equal(tensor.bfloat16(), table.bfloat16()):
        raise refusal(f"{stored} that is not the target's", "SGLang drafts with the target's own tables")
    return f"weights: {stored} left out: equal to the target's, which SGLang drafts with"


def _target_table(target: Path | None, name: str) -> torch.Tensor | None:
    """The target's embedding or head, None where its directory holds no weights."""
    files = [] if target is None else sorted(target.glob("*.safetensors"))
    for wanted in dict.fromkeys((name, BORROWED[0])):  # a tied head is the embedding
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 (no mapping)
                    if stored == wanted or stored.endswith(f".{wanted}"):
                        return opened.get_tensor(stored)
    return None


def _card(reading: Reading, facts: TargetFacts | None, train_command: Path) -> DrafterCard:
    """The card without thinking, template, length and objective, which the source does not record."""
    named = reading.target_name
    if named is not None and not HUB_ID.fullmatch(named):
        named = Path(named).name  # a path on the machine that trained
    dflash = reading.config["dflash_config"]
    return DrafterCard(
        target_name=named or (facts.name if facts else None),
        target_config_hash=facts.config_hash if facts else None,
        target_layer_ids=tuple(dflash["target_layer_ids"]),
        mask_token_id=dflash["mask_token_id"],
        block_size=reading.config["block_size"],
        head=dflash.get("projector_type", "dflash"),
        recipe=train_command.read_text(encoding="utf-8") if train_command.is_file() else None,
    )
