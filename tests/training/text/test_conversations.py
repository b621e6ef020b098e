"""Chat rows to token ids and loss masks: what is a label, and what is rejected under which name."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from sglang_auf.checkpoints.prepare import default_directory
from sglang_auf.errors import DataError
from sglang_auf.recording.manifest import MANIFEST
from sglang_auf.training.text import rows as reader
from sglang_auf.training.text.conversations import LoadedConversations, Ranks, load_conversations
from sglang_auf.training.text.reader import Conversation
from tests.support import toy_tokenizer as toy

QUESTION = {"role": "user", "content": "Say hi."}
ANSWER = {"role": "assistant", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [QUESTION, ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye."}]

Load = Callable[..., LoadedConversations]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(rows or lines, template=..., **settings): through a JSONL file named rows.jsonl."""

    def load_rows(rows: list[Any], template: str | None = toy.CHATML, **settings: Any) -> LoadedConversations:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        settings = {"max_length": 500, "min_answer_tokens": 1} | settings
        return load_conversations(file, toy.toy_tokenizer(template), **settings)

    return load_rows


def labels(conversation: Conversation) -> list[str]:
    """The text of each run of labels."""
    tokenizer = toy.toy_tokenizer()
    runs: list[list[int]] = []
    before = False
    for token, label in zip(conversation.input_ids, conversation.loss_mask, strict=True):
        if label and not before:
            runs.append([])
        if label:
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def text(conversation: Conversation) -> str:
    decoded: str = toy.toy_tokenizer().decode(conversation.input_ids)
    return decoded


def chat(*messages: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "a", "messages": list(messages), **more}


def test_answers_of_all_turns_with_their_ends_are_labels_and_nothing_else(load: Load) -> None:
    system = {"role": "system", "content": "Be brief."}
    [conversation] = load([chat(system, *TWO_TURNS)]).conversations
    assert labels(conversation) == ["Hi.<|im_end|>", "Bye.<|im_end|>"]
    assert text(conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi."
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]},
        {"id": "a", "conversations": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
        chat(QUESTION, ANSWER, {"role": "user", "content": "a question nobody answered"}),
        chat(QUESTION, ANSWER, prompt_ids=None, response_ids=None, turns=None, category="writing"),
        chat(QUESTION, ANSWER, QUESTION, ANSWER | {"weight": 0}),
    ],
)
def test_forms_of_a_row(load: Load, row: dict[str, Any]) -> None:
    assert load([row]).conversations == load([chat(QUESTION, ANSWER)]).conversations


def test_a_row_without_an_id_has_the_same_one_in_another_file_and_place(tmp_path: Path) -> None:
    row, other = {"messages": TWO_TURNS}, {"messages": TWO_TURNS[:2]}

    def ids(name: str, *rows: dict[str, Any]) -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        return [row.id for row in reader.read_rows(path, hashlib.sha256())]

    first, second, own = ids("a/rows.jsonl", row, other, {"id": 7, **row})
    assert (len({first, second}), own) == (2, "7")
    assert ids("b/renamed.jsonl", other, {"messages": TWO_TURNS}) == [second, first]
    assert ids("c/rows.jsonl", row, row, other, row) == [first, f"{first}-2", second, f"{first}-3"]
    both = [tmp_path / "a/rows.jsonl", tmp_path / "b/renamed.jsonl"]
    together = [row.id for row in reader.read_rows(both, hashlib.sha256())]
    assert together == [first, second, "7", f"{second}-2", f"{first}-2"]
    assert ids("d/answers.jsonl", {"id": first, "messages": TWO_TURNS}, row, row) == [first, f"{first}-2", f"{first}-3"]


def test_an_answer_without_a_thought_is_named_where_thinking_is_on(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    thought = ANSWER | {"reasoning_content": "Hm."}
    inline = ANSWER | {"content": "<think>\nHm.\n</think>\n\nHi."}
    rows = [
        chat(QUESTION, thought),
        chat(QUESTION, inline, id="inline"),
        chat(QUESTION, ANSWER, id="none"),
        chat(*TWO_TURNS[:3], thought, id="earlier ones are never shown"),
        chat(QUESTION, ANSWER, id="off", chat_template_kwargs={"enable_thinking": False}),
        {"id": "exact", "prompt_ids": [1], "response_ids": [2, 3]},
    ]
    loaded = load(rows, toy.THINKING)
    assert len(loaded.conversations) == 6
    assert loaded.unthought == ["none (rows.jsonl:3)"]
    assert "1 of 6 rows have an answer without a thought" in caplog.text
    assert load(rows[:4], toy.THINKING, thinking=True).unthought == ["none (rows.jsonl:3)"]
    assert load([rows[2], rows[4]], toy.THINKING, thinking=False).unthought == []
    assert load(rows[2:3]).unthought == []  # a template that knows no thoughts


@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_answers_before_the_first_question_are_left_out(
    before: list[dict[str, str]], load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """Frequent in ShareGPT, whose conversations were cut to pieces. The rest is as a row that never had them."""
    later = [*before, QUESTION, ANSWER | {"weight": 0}, *TWO_TURNS]
    rows = [
        chat(
            *before, ANSWER, ANSWER, *later[len(before) :], finish_reasons=["length", "stop", "stop", "length", "stop"]
        ),
        chat(*later, id="b", finish_reasons=["stop", "length", "stop"]),
    ]
    led, never = load(rows).conversations
    assert (led.input_ids, led.loss_mask, led.unserved) == (never.input_ids, never.loss_mask, never.unserved)
    assert labels(led) == ["Hi.", "Bye.<|im_end|>"]
    assert "1 of 2 rows begin with an answer that nothing asked for" in caplog.text
    assert "a (rows.jsonl:1)" in caplog.text and "b (" not in caplog.text


def test_template_that_trims_and_ends_a_turn_without_newline(load: Load) -> None:
    answer = {"role": "assistant", "content": " Hi.\n"}
    [conversation] = load([chat(QUESTION, answer, *TWO_TURNS)], template=toy.TRIMMING).conversations
    assert labels(conversation) == ["Hi.<|im_end|>", "Hi.<|im_end|>", "Bye.<|im_end|>"]


def test_an_answer_of_weight_0_is_no_label(load: Load) -> None:
    bad = {"role": "assistant", "content": "Bad.", "weight": 0}
    rows = [
        chat(QUESTION, bad, *TWO_TURNS, finish_reasons=["stop", "length", "stop"]),
        chat(*TWO_TURNS, QUESTION, bad, id="b", finish_reasons=["stop", "length", "stop"]),
        chat(QUESTION, bad, id="c"),
    ]
    loaded = load(rows)
    assert [labels(conversation) for conversation in loaded.conversations] == [
        ["Hi.", "Bye.<|im_end|>"],
        ["Hi.<|im_end|>", "Bye."],
    ]
    assert "Bad." in text(loaded.conversations[0]) and "Bad." not in text(loaded.conversations[1])
    assert loaded.rejected == {"no answer but those of weight 0": ["c (rows.jsonl:3)"]}


def test_labels_within_the_prompt_of_trl_are_none(load: Load) -> None:
    [conversation] = load([{"id": "a", "prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}]).conversations
    assert labels(conversation) == ["Bye.<|im_end|>"]


def test_generation_marks_of_a_template_agree_with_the_answers_found(load: Load) -> None:
    [conversation] = load([chat(*TWO_TURNS)], template=toy.MARKED).conversations
    marked = toy.toy_tokenizer(toy.MARKED).apply_chat_template(
        TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(conversation)
    assert conversation.input_ids == marked["input_ids"][:length]
    assert conversation.loss_mask == [bool(mark) for mark in marked["assistant_masks"][:length]]
    assert not any(marked["assistant_masks"][length:])


@pytest.mark.parametrize("thinking", [None, False, True])
def test_empty_think_block_of_the_last_turn_is_no_label(load: Load, thinking: bool | None) -> None:
    [conversation] = load([chat(*TWO_TURNS)], template=toy.THINKING, thinking=thinking).conversations
    assert "assistant\n<think>\n\n</think>\n\nBye." in text(conversation)
    assert "assistant\nHi." in text(conversation)
    assert labels(conversation) == ["Hi.<|im_end|>", "Bye.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "thinking", "served"),
    [
        (toy.THINKING, False, ["Bye.<|im_end|>"]),  # the server's prompt for "Hi." ends with an empty think block
        (toy.THINKING, True, ["Hi.<|im_end|>", "Bye.<|im_end|>"]),
        (toy.THINKING, None, ["Hi.<|im_end|>", "Bye.<|im_end|>"]),
        (toy.CHATML, None, ["Hi.<|im_end|>", "Bye.<|im_end|>"]),
    ],
)
def test_answers_that_a_server_is_asked_for_so(
    load: Load, template: str, thinking: bool | None, served: list[str]
) -> None:
    rendered = toy.toy_tokenizer(template).apply_chat_template
    prompt = rendered(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    rows = [chat(*TWO_TURNS), exact(chat(*TWO_TURNS, id="b"), prompt, "Bye.<|im_end|>")]
    for conversation in load(rows, template=template, thinking=thinking).conversations:
        assert labels(conversation) == ["Hi.<|im_end|>", "Bye.<|im_end|>"]
        assert labels(conversation.as_served()) == served
        assert conversation.as_served().input_ids == conversation.input_ids


def test_of_a_row_that_is_cut_before_its_last_answer_the_last_one_left_counts(load: Load) -> None:
    three = chat(QUESTION, ANSWER, *TWO_TURNS)
    whole = load([three], template=toy.THINKING, thinking=False).conversations[0]
    assert labels(whole.as_served()) == ["Bye.<|im_end|>"]
    length = whole.unserved[-1][1] - 1
    [cut] = load([three], template=toy.THINKING, thinking=False, max_length=length, overlong="truncate").conversations
    assert [labels(cut), labels(cut.as_served())] == [["Hi.<|im_end|>", "Hi."], ["Hi."]]


def test_reasoning_is_a_label_when_thinking_is_on_and_a_fault_when_it_is_off(load: Load) -> None:
    in_text = chat(QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi."})
    beside = chat(QUESTION, ANSWER | {"reasoning_content": "Hm."})
    for row in (in_text, beside):
        [conversation] = load([row], template=toy.THINKING, thinking=True).conversations
        assert labels(conversation) == ["<think>\nHm.\n</think>\n\nHi.<|im_end|>"]
        rejected = load([row, chat(QUESTION, ANSWER, id="b")], template=toy.THINKING, thinking=False).rejected
        assert [(reason[:42], rows) for reason, rows in rejected.items()] == [
            ("the last answer does not follow the prompt", ["a (rows.jsonl:1)"])
        ]


def test_earlier_answer_that_the_template_shortens_rejects_the_row(load: Load) -> None:
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi."}
    rows = [chat(QUESTION, thought, *TWO_TURNS), chat(*TWO_TURNS, id="b")]
    loaded = load(rows, template=toy.THINKING, thinking=True)
    assert [conversation.id for conversation in loaded.conversations] == ["b"]
    assert ["changes an answer" in reason for reason in loaded.rejected] == [True]


def test_answer_cut_at_a_token_limit_has_no_end_of_turn(load: Load) -> None:
    rows = [
        chat(*TWO_TURNS, finish_reason="length"),
        chat(*TWO_TURNS, id="b", finish_reason="stop", finish_reasons=["length", "stop"]),
    ]
    last, first = load(rows).conversations
    assert labels(last) == ["Hi.<|im_end|>", "Bye."]
    assert text(last).endswith("assistant\nBye.")
    assert labels(first) == ["Hi.", "Bye.<|im_end|>"]


def exact(row: dict[str, Any], prompt: str, response: str) -> dict[str, Any]:
    encode = functools.partial(toy.toy_tokenizer().encode, add_special_tokens=False)
    return row | {"prompt_ids": encode(prompt), "response_ids": encode(response)}


def test_exact_ids_are_used_as_they_are(load: Load) -> None:
    rows = [exact({"id": "a"}, "any prompt", "any answer"), exact(chat(QUESTION, ANSWER, id="b"), "no", "yes")]
    first, second = load(rows, template=None).conversations
    assert (text(first), labels(first)) == ("any promptany answer", ["any answer"])
    assert (text(second), labels(second)) == ("noyes", ["yes"])


def test_earlier_answers_within_exact_ids_are_labels_too(load: Load) -> None:
    prompt = toy.toy_tokenizer().apply_chat_template(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True)
    row = chat(*TWO_TURNS, finish_reasons=["length", "length"])
    [conversation] = load([exact(row, prompt, "Bye")]).conversations
    assert labels(conversation) == ["Hi.", "Bye"]
    assert text(conversation) == prompt + "Bye"
    with pytest.raises(DataError, match="prompt_ids are not what the tokenizer's chat template gives"):
        load([exact(row, "x" + prompt, "Bye")])
    weighted = chat(QUESTION, ANSWER | {"weight": 0}, *TWO_TURNS[2:])
    [conversation] = load([exact(weighted, prompt, "Bye")]).conversations
    assert labels(conversation) == ["Bye"]


class Clock(datetime):
    """The next day comes with each look."""

    days = itertools.count(1)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 10, next(cls.days))


def test_a_template_that_prints_the_date_gives_the_same_tokens_on_every_day(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    first, second = (load([chat(*TWO_TURNS)], template=toy.DATED) for _ in range(2))
    assert first == second
    assert labels(first.conversations[0]) == ["Hi.<|im_end|>", "Bye.<|im_end|>"]
    assert text(first.conversations[0]).startswith("<|im_start|>system\n\nToday: 26 Jul 2024 (2024, 26 Jul 2024).")


def test_exact_ids_keep_the_date_of_the_day_they_were_served(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=lambda: datetime(2025, 2, 3))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    served = toy.toy_tokenizer(toy.DATED).apply_chat_template
    prompt = served(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert "Today: 03 Feb 2025 (2025, 03 Feb 2025)" in prompt
    clock.now = lambda: datetime(2025, 2, 4)
    [conversation] = load([exact(chat(*TWO_TURNS), prompt, "Bye.<|im_end|>")], template=toy.DATED).conversations
    assert labels(conversation) == ["Hi.<|im_end|>", "Bye.<|im_end|>"]
    assert text(conversation) == f"{prompt}Bye.<|im_end|>"
    two_dates = prompt.replace("03 Feb 2025)", "04 Feb 2025)")
    for other in (two_dates, f"x{prompt}", prompt.replace("Say hi.", "Say ho.")):
        with pytest.raises(DataError, match="prompt_ids are not what the tokenizer's chat template gives"):
            load([exact(chat(*TWO_TURNS), other, "Bye.<|im_end|>")], template=toy.DATED)


def test_exact_ids_behind_an_end_of_turn_or_of_no_weight_are_refused(load: Load) -> None:
    rows = [
        GOOD,
        exact({"id": "a"}, "prompt", "Hi.<|im_end|>\n<|im_start|>user"),
        exact(chat(QUESTION, ANSWER | {"weight": 0}, id="b"), "prompt", "Hi.<|im_end|>"),
        exact({"id": "c", "loss_mask": [1]}, "prompt", "Hi.<|im_end|>"),
        exact({"id": "d"}, "prompt", "Hi.<|im_end|>"),
    ]
    for template in (toy.CHATML, None):
        loaded = load(rows if template else rows[1:], template=template)
        assert [conversation.id for conversation in loaded.conversations] == (["good", "d"] if template else ["d"])
        assert [reason[:40] for reason in loaded.rejected] == [
            "response_ids that go on behind an end-of",
            "response_ids of an answer with weight 0",
            "a field 'loss_mask': write a weight of 0",
        ]


GOOD = chat(QUESTION, ANSWER, id="good")


@pytest.mark.parametrize(
    ("row", "reason", "name"),
    [
        ('{"id": "a", "messages": [', "broken JSON", "rows.jsonl:2"),
        ("[1, 2]", "no JSON object", "rows.jsonl:2"),
        ({"id": ["a"], "messages": TWO_TURNS}, "an id that is neither text nor a number", "rows.jsonl:2"),
        ({"id": "good", "messages": TWO_TURNS}, "an id for the second time", "good (rows.jsonl:2)"),
        ({"id": "a", "text": "?"}, "none of messages, conversations, ", None),
        ({"id": "a", "messages": "hello"}, "messages that are a text, and not a list of messages", None),
        ({"id": "a", "messages": ["hello"]}, "messages that are no objects", None),
        ({"id": "a", "messages": [{"content": "?"}, ANSWER]}, "a message without a role", None),
        (chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "content with a part that is not", None),
        (chat({"role": "user", "content": 3}, ANSWER), "content that is no text", None),
        (chat({"role": "Narrator", "content": "?"}, ANSWER), "a message of role 'Narrator', which no server", None),
        (chat(QUESTION, ANSWER, ANSWER), "an answer after an answer", None),
        (chat({"role": "user", "content": "\ud83d"}, ANSWER), "content with half a surrogate pair", None),
        ({"id": "a", "turns": ["What?"]}, "no answer (a prompt row?", None),
        (chat(ANSWER), "an answer before any question", None),
        (chat(ANSWER, {"role": "tool", "content": "12"}, QUESTION, ANSWER), "an answer before any question", None),
        (chat(ANSWER, QUESTION), "no answer (a prompt row?", None),
        (chat(QUESTION, {"role": "assistant", "content": " \n"}), "an empty answer", None),
        (chat(QUESTION, {"role": "assistant", "content": "x" * 500}), "longer than 500 tokens", None),
        (chat(QUESTION, {"role": "assistant", "content": "x"}), "fewer than 4 answer tokens", None),
        (chat(QUESTION, {"role": "assistant", "content": "\nHi, you."}), "a token reaches across the border", None),
        (chat(*TWO_TURNS, finish_reasons=["stop"]), "finish_reasons that are not one for each answer", None),
        ({"id": "a", "prompt_ids": [1], "response_ids": []}, "no answer tokens", None),
        ({"id": "a", "prompt_ids": [1]}, "response_ids that are no list of token ids", None),
        ({"id": "a", "prompt_ids": [True], "response_ids": [1]}, "prompt_ids that are no list of token ids", None),
        ({"id": "a", "prompt_ids": [1], "response_ids": [261]}, "token ids outside the vocabulary of 261", None),
        ({"id": "a", "prompt_ids": [-1], "response_ids": [1]}, "token ids outside the vocabulary of 261", None),
    ],
)
def test_bad_rows_are_named_with_their_reason(load: Load, row: Any, reason: str, name: str | None) -> None:
    loaded = load([GOOD, row], min_answer_tokens=4)
    assert [conversation.id for conversation in loaded.conversations] == ["good"]
    [(found, names)] = loaded.rejected.items()
    assert found.startswith(reason)
    assert names == [name or "a (rows.jsonl:2)"]


def test_text_with_tokens_that_the_target_lacks(load: Load) -> None:
    with pytest.raises(DataError, match="token ids outside the vocabulary of 257: good"):
        load([GOOD], vocab_size=257)


def test_roles_a_template_refuses_or_leaves_out(load: Load) -> None:
    system = chat({"role": "system", "content": "Be brief."}, QUESTION, ANSWER)
    assert list(load([GOOD, system], template=toy.TRIMMING).rejected) == [
        "the chat template refuses it: no system role"
    ]
    tool = chat(QUESTION, {"role": "tool", "content": "12 degrees"}, ANSWER)
    rejected = load([GOOD, tool], template=toy.THINKING).rejected
    assert list(rejected) == ["the chat template leaves out what role 'tool' says"]


def test_template_with_another_header_before_a_new_answer(load: Load) -> None:
    with pytest.raises(DataError, match="the last answer does not follow the prompt"):
        load([GOOD], template=toy.UNLIKE)


def test_text_without_a_chat_template(load: Load) -> None:
    with pytest.raises(DataError, match=r"the tokenizer has no chat template: good \(rows.jsonl:1\)"):
        load([GOOD], template=None)


def test_rejections_are_logged_with_names_and_counts(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load([GOOD, *({"id": f"bad{i}", "turns": ["?"]} for i in range(12))])
    [record] = caplog.records
    assert record.message.startswith("12 of 13 rows rejected, no answer")
    assert "bad0 (rows.jsonl:2)" in record.message
    assert record.message.endswith(" and 2 more")


def test_rows_over_the_limit_can_be_cut_instead(load: Load) -> None:
    long = chat(QUESTION, {"role": "assistant", "content": "x" * 500})
    loaded = load([GOOD, long], max_length=120, overlong="truncate")
    assert loaded.truncated == ["a (rows.jsonl:2)"]
    cut = loaded.conversations[1]
    assert len(cut) == len(cut.loss_mask) == 120
    assert set(labels(cut)[0]) == {"x"}
    header = len(toy.toy_tokenizer().apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"])
    nothing_left = load([GOOD | {"id": "b", "messages": [QUESTION, ANSWER]}, long], max_length=header + 4)
    assert [c.id for c in nothing_left.conversations] == ["b"]


def test_several_files_lists_and_the_digest_of_what_was_read(tmp_path: Path) -> None:
    lines, listed = tmp_path / "one.jsonl", tmp_path / "two.json"
    lines.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(chat(*TWO_TURNS)) + "\n")
    listed.write_text(json.dumps([chat(*TWO_TURNS, id="c"), chat(QUESTION, ANSWER)]))
    loaded = load_conversations([lines, str(listed)], toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)
    assert [conversation.id for conversation in loaded.conversations] == ["good", "a", "c"]
    assert loaded.rejected == {"an id for the second time": ["a (two.json[1])"]}
    assert loaded.sha256 != load_conversations([lines], toy.toy_tokenizer(), max_length=500, min_answer_tokens=1).sha256
    assert loaded.answer_tokens == sum(map(sum, (c.loss_mask for c in loaded.conversations)))


class Given(Exception):
    """Carries what a rank gives to the others."""


def shares_of(load: Load, rows: list[Any], count: int) -> list[Any]:
    def give(own: list[Any]) -> list[Any]:
        raise Given(*own)

    shares = []
    for rank in range(count):
        with pytest.raises(Given) as given:
            load(rows, ranks=Ranks(rank, count, give))
        shares.append(pickle.loads(pickle.dumps(given.value.args[0])))
    return shares


@pytest.mark.parametrize("count", [2, 3, 9])
def test_ranks_that_read_together_get_what_one_process_reads(load: Load, count: int) -> None:
    rows = [
        {"messages": TWO_TURNS},
        "broken",
        {"prompt_ids": [1, 2], "response_ids": [3, 4]},
        {"messages": [ANSWER, *TWO_TURNS]},
        {"messages": [QUESTION]},
        {"messages": [SYSTEM, *TWO_TURNS, *TWO_TURNS]},
        chat(*TWO_TURNS),
    ]
    alone = load(rows, max_length=60, overlong="truncate")
    assert (len(alone.conversations), len(alone.rejected), len(alone.truncated)) == (5, 2, 4)
    shares = shares_of(load, rows, count)
    assert sum(map(len, shares)) == len(rows)
    for rank in range(count):
        ranks = Ranks(rank, count, lambda own: shares)
        assert load(rows, max_length=60, overlong="truncate", ranks=ranks) == alone


@pytest.mark.parametrize("changed", [[GOOD], [GOOD, chat(*TWO_TURNS), chat(*TWO_TURNS, id="more")]])
def test_rows_that_differ_between_the_ranks(load: Load, changed: list[Any]) -> None:
    shares = shares_of(load, changed, 2)
    with pytest.raises(DataError, match="is another one where another rank reads it"):
        load([GOOD, chat(*TWO_TURNS, id="b"), chat(*TWO_TURNS, id="c")], ranks=Ranks(0, 2, lambda own: shares))


def test_digest_changes_with_the_file_and_with_the_tokens(load: Load) -> None:
    """So a version that renders otherwise does not go on with a run."""
    row = chat(*TWO_TURNS)
    digests = [
        load([row]).sha256,
        load([json.dumps(row) + " "]).sha256,
        load([row], template=toy.TRIMMING).sha256,
        load([row], template=toy.ENDING.replace("'<|im_start|>' -%}", "'' -%}")).sha256,
    ]
    assert load([row]).sha256 == digests[0]
    assert len(set(digests)) == len(digests)


def test_a_file_that_holds_its_rows_as_data(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": [GOOD]}))
    loaded = load_conversations(tmp_path / "data.json", toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)
    assert [conversation.id for conversation in loaded.conversations] == ["good"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "empty.jsonl").write_text("")
    for name, found in (
        ("missing.jsonl", "no file"),
        ("object.json", "is no JSON list"),
        ("empty.jsonl", "it has no rows"),
    ):
        with pytest.raises(DataError, match=found):
            load_conversations(tmp_path / name, toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)


def test_folder_of_data_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", functools.partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"))
    )
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    rows = [
        {"id": "a", "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Nobody answers."}]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_conversations(folder, toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)
    assert [labels(conversation) for conversation in loaded.conversations] == [["Hi.<|im_end|>"]]
    assert list(loaded.rejected.values()) == [[f"b ({folder}[1])"]]
    with pytest.raises(DataError, match="validation"):
        load_conversations(folder, toy.toy_tokenizer(), max_length=500, min_answer_tokens=1, split="validation")


def test_a_null_that_arrow_may_have_added_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A struct has the fields of all rows. JSON keeps to its own, so a null in it was given."""
    import datasets

    def calling(id: str, arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return chat(QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, id=id)

    def tool(**more: Any) -> dict[str, Any]:
        function = {"name": "weather", "parameters": {"type": "object", **more}}
        return chat(QUESTION, ANSWER, id="f", tools=[{"type": "function", "function": function}])

    def load(name: str, *rows: dict[str, Any], as_json: bool = False) -> LoadedConversations:
        data = datasets.Dataset.from_list(list(rows), on_mixed_types="use_json" if as_json else None)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        return load_conversations(name, toy.toy_tokenizer(toy.TOOLS), max_length=900, min_answer_tokens=1)

    given = [calling("a", {"city": "Ulm"}), calling("b", {"city": "Ulm", "zone": "CET"})]
    structs = load("owner/structs", *given, chat(QUESTION, ANSWER, id="c"))
    assert [conversation.id for conversation in structs.conversations] == ["b", "c"]
    assert [reason[:31] for reason in structs.rejected] == ["a null in a call's arguments or"]
    tools = load("owner/tools", tool(default=None), tool(default="Ulm") | {"id": "g"})
    assert [conversation.id for conversation in tools.conversations] == ["g"]
    json_text = load("owner/text", *(calling(id, json.dumps({"city": None})) for id in "de"))
    as_json = load("owner/json", *given, calling("d", {"city": None}), as_json=True)
    assert [labels(loaded.conversations[-1]) for loaded in (json_text, as_json)] == [
        ['\n<tool_call>\nweather {"city": null}\n</tool_call><|im_end|>']
    ] * 2


def test_a_recording_is_read_as_it_grows(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    for day, answers in ((2, [(3, [5, 6]), (4, [7])]), (1, [(1, [5, 5]), (2, [6])])):
        lines = [json.dumps({"id": f"{id:032x}", "prompt_ids": [1], "response_ids": ids}) + "\n" for id, ids in answers]
        (tmp_path / f"2026110{day}T000000000000Z.jsonl").write_text("".join(lines))
    with (tmp_path / "20261102T000000000000Z.jsonl").open("a") as newest:
        newest.write('{"id":"00')  # the server is writing it
    loaded = load_conversations(tmp_path, toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)
    assert [int(conversation.id, 16) for conversation in loaded.conversations] == [1, 2, 3, 4]
    assert labels(loaded.conversations[0]) == [toy.toy_tokenizer().decode([5, 5])]
    assert loaded.rejected == {"broken JSON": ["20261102T000000000000Z.jsonl:3"]}


def test_a_file_that_the_server_removes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    kept = tmp_path / "20261101T000000000000Z.jsonl"
    kept.write_text(json.dumps({"id": "a", "prompt_ids": [1], "response_ids": [5, 5]}) + "\n")
    monkeypatch.setattr(reader, "row_files", lambda directory: [directory / "removed", kept])
    loaded = load_conversations(tmp_path, toy.toy_tokenizer(), max_length=500, min_answer_tokens=1)
    assert [conversation.id for conversation in loaded.conversations] == ["a"]


@pytest.mark.parametrize("exact", [True, False])
def test_a_row_of_the_other_mode_of_thinking_is_refused(exact: bool, load: Load) -> None:
    ids = {"prompt_ids": [1, 2], "response_ids": [3, 4]} if exact else {}
    asked = [
        chat(*TWO_TURNS[:2], id=str(mode), chat_template_kwargs={"enable_thinking": mode}, **ids)
        for mode in (False, True)
    ]
    loaded = load(asked, thinking=False)
    assert [conversation.id for conversation in loaded.conversations] == ["False"]
    ((reason, rows),) = loaded.rejected.items()
    assert "enable_thinking True, and the command says False" in reason
    assert len(rows) == 1


@pytest.mark.parametrize(("trained", "other"), [(False, True), (True, False)])
def test_exact_ids_of_the_other_mode_of_thinking(
    trained: bool, other: bool, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """As a stock server gives them, which thinks where nothing is said: no field of the row says so."""
    render = functools.partial(toy.toy_tokenizer(toy.THINKING).apply_chat_template, tokenize=False)
    prompts = {mode: render([QUESTION], add_generation_prompt=True, enable_thinking=mode) for mode in (True, False)}
    rows = {
        mode: [
            exact(chat(QUESTION, ANSWER, id=f"regenerated {mode}"), prompt, "Hi."),
            exact({"id": f"{mode}"}, prompt, "Ho."),
        ]
        for mode, prompt in prompts.items()
    }
    unknown = exact(chat(QUESTION, ANSWER, id="of another template"), "no header", "Hi.")
    loaded = load([*rows[trained], *rows[other], unknown], toy.THINKING, thinking=trained)
    kept = [f"regenerated {trained}", f"{trained}", f"{other}", "of another template"]
    assert [conversation.id for conversation in loaded.conversations] == kept
    mode = "on" if trained else "off"
    assert loaded.rejected == {
        f"prompt_ids that were not asked with thinking {mode}": [f"regenerated {other} (rows.jsonl:3)"]
    }
    assert "1 of 4 rows are of the other mode of thinking than is trained for" in caplog.text
    assert f"all the same: {other} (rows.jsonl:4)" in caplog.text
    caplog.clear()
    for template, thinking in ((toy.THINKING, None), (toy.CHATML, False), (None, False)):
        assert len(load([*rows[True], *rows[False]], template, thinking=thinking).conversations) == 4
    assert not caplog.records


@pytest.mark.skipif(not default_directory("smollm2-135m").is_dir(), reason="smollm2-135m is not prepared")
def test_smollm2_text_gives_the_ids_that_serving_saw(tmp_path: Path) -> None:
    """A reply of the real server: its own prompt and output ids equal the ids that we get from its text."""
    from transformers import AutoTokenizer

    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    question = [2, 198, 1, 4093, 198, 1780, 314, 216, 33, 27, 33, 47, 19842, 351, 582, 1230, 805, 30, 2, 198, 1, 520]
    row = {
        "id": "a",
        "messages": [
            {"role": "user", "content": "What is 1+1? Answer with one number only."},
            {"role": "assistant", "content": "1 + 1 = 2"},
        ],
    }
    ids = {"prompt_ids": [*system, *question, 9531, 198], "response_ids": [33, 1232, 216, 33, 446, 216, 34, 2]}
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    (tmp_path / "exact.jsonl").write_text(json.dumps(row | ids))
    tokenizer = AutoTokenizer.from_pretrained(default_directory("smollm2-135m"))
    from_text, from_ids = (
        load_conversations(
            tmp_path / name, tokenizer, max_length=100, min_answer_tokens=8, thinking=False
        ).conversations
        for name in ("text.jsonl", "exact.jsonl")
    )
    assert from_text == from_ids
