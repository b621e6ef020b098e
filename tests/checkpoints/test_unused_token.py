"""The token id for the slots of a block: none that a text of the target has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints.unused_token import unused_token
from sglang_auf.errors import TargetError

WORDS = ["the", "reserved", "word"]
"""A word of texts is no added token, whatever it looks like."""


def target(directory: Path, *added: str, template: str | None = None, generation: Any = None, **named: str) -> Path:
    """A tokenizer of three words and of these special tokens, with ids from 3 on. ~ is before what is not special."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="the"))
    for token in added:
        text = token.removeprefix("~")
        tokenizer.add_tokens([AddedToken(text, special=text == token, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_a_padded_table_has_ids_that_are_no_token(tmp_path: Path) -> None:
    assert unused_token(target(tmp_path, "<|reserved_0|>"), 8) == 4


@pytest.mark.parametrize(
    "name",
    [
        *("<|reserved_special_token_0|>", "<unused5>", "~<unused0>", "<|placeholder1|>", "<place▁holder▁no▁0>"),
        *("[control_9]", "<SPECIAL_20>", "<|extra_id_0|>", "<|dummy_0|>", "[UNUSED_TOKEN_141]"),
    ],
)
def test_a_token_that_is_kept_for_later_comes_before_other_special_ones(tmp_path: Path, name: str) -> None:
    directory = target(tmp_path, "<file>", "~<think>", name, "<|reserved_9|>")
    assert unused_token(directory, 7) == 5


def test_a_special_token_that_no_text_has(tmp_path: Path) -> None:
    """Not what begins, ends or pads a text, what the chat template writes, or what is no special token."""
    directory = target(
        tmp_path,
        *("<s>", "</s>", "<pad>", "<|end|>", "<|turn|>", "~<think>", "<file>", "<name>"),
        template="{{ '<|turn|>' + messages[0].content }}",
        generation={"eos_token_id": [4, 6]},
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    assert unused_token(directory, 11) == 9
    with pytest.raises(TargetError, match=r"mask_token_id=ID"):
        unused_token(directory, 9)


def test_a_target_whose_texts_may_have_every_id(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="each of its 4 ids") as caught:
        unused_token(target(tmp_path, "</s>", eos_token="</s>"), 4)
    assert "drafter.mask_token_id=ID" in caught.value.remedy


def test_a_target_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="tokenizer") as caught:
        unused_token(tmp_path, 64)
    assert "drafter.mask_token_id=ID" in caught.value.remedy
