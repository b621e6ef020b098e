"""A tokenizer without a language: the word "17" is the token 17, so a prompt of random ids can be sent as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
"""Qwen3's special tokens, and nothing for thinking."""


def number_tokenizer(target: Mapping[str, Any]) -> Any:
    """A tokenizer of transformers for the target with config.json `target`.

    Every id of its vocabulary is a word. The ids from bos_token_id to eos_token_id are Qwen3's special tokens. A word
    that is no id becomes the first of them.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first, end = target["bos_token_id"], target["eos_token_id"]
    special = dict(zip(range(first, end + 1), ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), strict=True))
    words = {special.get(token, str(token)): token for token in range(target["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token=special[first]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[first], eos_token=special[end])
    made.chat_template = TEMPLATE
    return made
