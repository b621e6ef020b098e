from __future__ import annotations

from benchmarks.shapes.qwen3_8b import TOY
from benchmarks.shapes.tokenizer import number_tokenizer


def test_a_word_is_its_id_and_back() -> None:
    tokenizer = number_tokenizer(TOY)
    assert len(tokenizer) == TOY["vocab_size"]
    assert tokenizer("17 0 2047 2039")["input_ids"] == [17, 0, 2047, 2039]
    assert tokenizer.decode([17, 0, 2047]) == "17 0 2047"


def test_a_chat_has_qwen3s_special_tokens_and_ends_with_the_target() -> None:
    tokenizer = number_tokenizer(TOY)
    messages = [{"role": "user", "content": "17 99"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    unknown, start, end = 2040, 2041, 2042  # "user" and "assistant" are no words
    assert asked == [start, unknown, 17, 99, end, start, unknown]
    assert tokenizer.eos_token_id == TOY["eos_token_id"] == end
