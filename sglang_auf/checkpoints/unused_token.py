"""A token id that no text of a target uses: what stands in the slots that its drafter fills."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_auf.errors import TargetError
from sglang_auf.files import CONFIG, read_json

RESERVED = re.compile(r"reserved|unused|place.?holder|dummy|extra_id|control_\d|special_\d", re.IGNORECASE)
"""Names of added tokens that makers of tokenizers keep for later."""


def unused_token(target: Path, vocab_size: int) -> int:
    """An id below `vocab_size`, the rows of the target's embedding, that no text of the target in this directory uses.

    The first id that is no token, since tables are often padded; else the first added token that is reserved by its
    name; else the first special token that begins, ends and pads no text and is not in the chat template. Raises
    TargetError where there is none, or no tokenizer.
    """
    tokenizer = _tokenizer(target)
    tokens = set(tokenizer.get_vocab().values())
    if (free := next((id for id in range(vocab_size) if id not in tokens), None)) is not None:
        return free
    used = set(_used(tokenizer, target))
    spare = {id: token for id, token in tokenizer.added_tokens_decoder.items() if id < vocab_size and id not in used}
    reserved = [id for id, token in spare.items() if RESERVED.search(token.content)]
    special = [id for id, token in spare.items() if token.special]
    if not (candidates := reserved or special):
        raise TargetError(
            f"{target}, whose texts may have each of its {vocab_size} ids",
            "an id that is no token, or a special token that no text has",
            "name one that your texts do not have: --set drafter.mask_token_id=ID",
        )
    return int(min(candidates))


def _used(tokenizer: Any, target: Path) -> Iterator[int]:
    """Ids of the added tokens that begin, end or pad texts, or that are in a chat template."""
    for file in (target / CONFIG, target / "generation_config.json"):
        content = read_json(file, TargetError) if file.is_file() else {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = content.get(name, [])
            yield from ids if isinstance(ids, list) else [ids]
    templates = tokenizer.chat_template or ""
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    for id, token in tokenizer.added_tokens_decoder.items():
        if any(token.content in text for text in (*texts, *tokenizer.special_tokens_map.values())):
            yield id


def _tokenizer(target: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TargetError(
            f"transformers cannot load the tokenizer of {target} ({reason})",
            "a target with its tokenizer, which says what ids no text uses",
            "fetch the target again, or name such an id: --set drafter.mask_token_id=ID",
        ) from error
