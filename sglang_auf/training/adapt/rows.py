"""The rows of an adaptation: which are trained on, and which decide.

A recording grows while it is read, and a killed run must go on with the rows it began with. So they are written into
the run's directory once, before the first step.

The last rows by time are held out, since what a server will be asked next is like what it was asked last. A row with
the prompt of one that is held out is not trained on, whether it was recorded or is data of before. Of the latter, rows
are drawn by the hash of their id.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_auf.errors import DataError
from sglang_auf.files import write_whole
from sglang_auf.settings import enable_thinking
from sglang_auf.training.adapt.settings import AdaptSettings
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TRAINED, OLD, HELD_OUT, OLD_HELD_OUT = "recorded.jsonl", "old.jsonl", "held-out.jsonl", "old-held-out.jsonl"


def write_rows(
    settings: AdaptSettings, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> dict[str, int]:
    """Write the four files; the last two belong to --data and are absent without it. Returns the rows of each.

    Raises DataError where there are too few.
    """
    recorded = load(settings.recorded, recipe, tokenizer)
    if len(recorded) < settings.min_rows:
        raise DataError(
            f"{len(recorded)} rows in {settings.recorded} that can be trained on",
            f"{settings.min_rows} or more",
            "record for longer, or lower --min-rows",
        )
    count = max(3, round(len(recorded) * settings.held_out))
    asked = {tuple(conversation.prompt) for conversation in recorded[-count:]}
    trained = [conversation for conversation in recorded[:-count] if tuple(conversation.prompt) not in asked]
    if repeated := len(recorded) - count - len(trained):
        logger.info("%d recorded rows have the prompt of one that is held out, and are not trained on", repeated)
    files = {TRAINED: list(map(_exact, trained)), HELD_OUT: list(map(_exact, recorded[-count:]))}
    if settings.data:
        wanted = round(len(trained) * settings.old_share / (1 - settings.old_share))
        files[OLD], files[OLD_HELD_OUT] = _drawn(settings.data, wanted, count, recipe, tokenizer, asked)
    for name, rows in files.items():
        if not rows:
            raise DataError(f"no row for {name}", "rows to train on and rows that decide", "give more rows")
        write_whole(directory / name, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def load(
    source: Path | Sequence[str], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> list[Conversation]:
    """The usable rows of a source, as the trainer reads them. Raises DataError if there are none."""
    return load_conversations(
        source,
        tokenizer,
        max_length=recipe.data.max_length,
        min_answer_tokens=recipe.min_answer_tokens,
        thinking=enable_thinking(recipe.data.thinking),
        overlong=recipe.data.overlong,
        split=split,
    ).conversations


def _drawn(
    sources: Sequence[str],
    wanted: int,
    held_out: int,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    asked: Collection[tuple[int, ...]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Usable rows of data of before (to train on, held out): disjoint, and the same for any order of the rows.

    asked: prompts that no row may have. The rows stay as they are, since only text says where earlier answers are.
    """
    split = recipe.data.split
    prompts = {row.id: tuple(row.prompt) for row in load(list(sources), recipe, tokenizer, split)}
    rows = [
        row
        for row in read_rows(list(sources), hashlib.sha256(), split=split)
        if row.fault is None and row.id in prompts and prompts[row.id] not in asked
    ]
    if repeated := len(prompts) - len(rows):
        logger.info("%d rows of --data have the prompt of a recorded one that is held out, and are left out", repeated)
    rows.sort(key=lambda row: hashlib.sha256(row.id.encode()).digest())
    held_out = min(held_out, len(rows) // 5)
    kept_back = {prompts[row.id] for row in rows[:held_out]}
    chosen = [row for row in rows[held_out:] if prompts[row.id] not in kept_back][:wanted]
    if len(chosen) < wanted:
        logger.warning("--data has %d rows to train on, where %d were wanted: all are used", len(chosen), wanted)
    return _with_ids(chosen), _with_ids(rows[:held_out])


def _with_ids(rows: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [{**row.fields, "id": f"old/{row.id}"} for row in rows]


def _exact(conversation: Conversation) -> Mapping[str, Any]:
    """A recorded row again, as it was cut to the longest length."""
    prompt = conversation.prompt
    response = conversation.input_ids[len(prompt) :]
    return {"id": conversation.id, "prompt_ids": prompt, "response_ids": response}
