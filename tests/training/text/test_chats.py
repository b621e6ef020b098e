"""What a row says as a chat: every form, and every field that would change it. Both commands read rows this way."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_auf.training.text.chats import REFUSED, Chat, chat_of, question_of, text_of
from sglang_auf.training.text.messages import ROLES
from sglang_auf.training.text.rows import BadRow

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def row(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


@pytest.mark.parametrize(
    "fields",
    [
        row(QUESTION, ANSWER),
        {"Conversation": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": []},
        row(QUESTION, ANSWER, tools=[], system=None, chat_template_kwargs={"enable_thinking": None}, images=[]),
        row(QUESTION | {"tool_calls": None, "name": "Ann"}, ANSWER | {"tool_calls": [], "thinking": ""}),
        # Fields of public dumps that nothing reads: UltraChat, tulu, Nemotron, SlimOrca, WildChat, ShareGPT, LMSYS.
        row(QUESTION, ANSWER, prompt="q", prompt_id="x", source="tulu", license="odc", used_in_training="yes"),
        row(QUESTION | {"weight": 0, "toxic": True}, ANSWER | {"weight": 1.0, "timestamp": 3}, weight=1, turns=2),
        {
            "conversations": [{"from": "human", "value": "q", "markdown": "q"}, {"from": "gpt", "value": "a"}],
            "views": 3,
        },
    ],
)
def test_forms_of_one_conversation(fields: dict[str, Any]) -> None:
    assert chat_of(fields) == Chat([QUESTION, ANSWER])


def test_prompt_rows() -> None:
    assert chat_of({"turns": ["q", "r"]}).messages == [QUESTION, {"role": "user", "content": "r"}]
    assert chat_of({"instruction": "q", "input": "r"}).messages == [{"role": "user", "content": "q\n\nr"}]


@pytest.mark.parametrize(
    ("said", "role"),
    [
        *(("Human", "user"), ("USER", "user"), ("GPT", "assistant"), ("ChatGPT", "assistant"), ("bing", "assistant")),
        *(("bard", "assistant"), ("model", "assistant"), ("System", "system"), ("observation", "tool")),
        *((role, role) for role in ("system", "developer", "user", "assistant", "tool", "function")),
    ],
)
def test_roles_of_dumps(said: str, role: str) -> None:
    messages = chat_of({"conversations": [QUESTION, {"from": said, "value": "x"}]}).messages
    assert messages[1] == {"role": role, "content": "x"}
    assert role in ROLES.values()


@pytest.mark.parametrize("role", ["function_call", "Assistent", "narrator", "<|im_start|>user"])
def test_an_unknown_role_is_named(role: str) -> None:
    with pytest.raises(BadRow, match=r"a message of role '.*', which no server knows: write one of") as fault:
        chat_of(row(QUESTION, {"role": role, "content": "x"}))
    assert repr(role) in str(fault.value)


def test_fields_that_change_the_text_are_kept() -> None:
    call = {"id": "1", "index": None, "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    answer = ANSWER | {"reasoning_content": "hm", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}
    kwargs = {"enable_thinking": True, "reasoning_effort": "low"}
    chat = chat_of(row(QUESTION, answer, result, ANSWER, tools=[TOOL], system="s", chat_template_kwargs=kwargs))
    assert chat.messages == [SYSTEM, QUESTION, answer | {"tool_calls": [call]}, result, ANSWER]
    function = TOOL["function"] | {"description": None}  # type: ignore[operator]
    assert chat.tools == [{"type": "function", "function": function, "defer_loading": None}]
    assert chat.template_kwargs == kwargs


def test_a_tool_call_needs_no_content() -> None:
    messages = chat_of(row(QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]})).messages
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("name", ["system", "system_prompt", "System_Message"])
def test_a_system_text_of_the_row_comes_first(name: str) -> None:
    assert chat_of(row(QUESTION, ANSWER, **{name: "s"})).messages == [SYSTEM, QUESTION, ANSWER]
    assert chat_of(row(SYSTEM, QUESTION, ANSWER, **{name: "s"})).messages == [SYSTEM, QUESTION, ANSWER]
    with pytest.raises(BadRow, match="a system text on the row, and another one"):
        chat_of(row({"role": "system", "content": "t"}, QUESTION, ANSWER, **{name: "s"}))


def test_answers_of_weight_0_and_answers_within_a_prompt_are_no_labels() -> None:
    bad = ANSWER | {"weight": 0}
    assert chat_of(row(QUESTION, bad, QUESTION, ANSWER)).untrained == {1}
    assert chat_of(row(QUESTION, bad, QUESTION, ANSWER, system="s")).untrained == {2}
    chat = chat_of({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    assert {1} <= chat.untrained and 3 not in chat.untrained


def test_text_in_parts_stays_in_parts() -> None:
    parts = [{"type": "text", "text": "q", "image_url": None}, {"type": "text", "text": "r"}]
    assert chat_of(row(QUESTION | {"content": parts})).messages[0]["content"] == [
        {"type": "text", "text": "q"},
        {"type": "text", "text": "r"},
    ]


@pytest.mark.parametrize("name", sorted({name.upper() for name in REFUSED} | set(REFUSED)))
def test_a_field_of_the_row_that_would_change_it_is_refused(name: str) -> None:
    with pytest.raises(BadRow, match=f"a field '{name.lower()}': "):
        chat_of(row(QUESTION, ANSWER, **{name: [0]}))


@pytest.mark.parametrize("name", ["thinking", "reasoning", "function_call", "refusal", "audio", "train", "loss", "new"])
def test_an_unknown_field_of_a_message_is_refused(name: str) -> None:
    with pytest.raises(BadRow, match=f"a message with the field '{name}', which has no known meaning"):
        chat_of(row(QUESTION, ANSWER | {name: "x"}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (row(QUESTION, ANSWER, turns=["q"]), "messages and turns: which one is the conversation"),
        (row(QUESTION, prompt=[QUESTION], completion=[ANSWER]), "messages and prompt with completion: which one"),
        ({"prompt": "q", "completion": "a"}, "a prompt that is text, which TRL puts into no chat template"),
        ({"prompt": [QUESTION], "completion": "a"}, "a completion that is text"),
        ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}, "none of messages, conversations, "),
        ({"data": ["q", "a"]}, "none of messages, conversations, "),
        ({"instruction": ["q"], "output": "a"}, "instruction that is no text"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "a field 'history': write all turns"),
        (row(QUESTION, ANSWER, tools="x"), "tools that are no list"),
        (row(QUESTION, ANSWER, tools=[{"name": "f"}]), "tools that are not as OpenAI defines them"),
        (
            row(QUESTION, ANSWER, tools=[{"function": {"name": "f", "parameters": {"type": "thing"}}}]),
            "tools with parameters that are no JSON schema",
        ),
        (row(QUESTION, ANSWER | {"tool_calls": [{"name": "f"}]}), "tool_calls that are not as OpenAI defines them"),
        (row(QUESTION, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}), "tool_calls without"),
        (row(QUESTION | {"tool_calls": [CALL]}, ANSWER), "reasoning_content or tool_calls in a message of role 'user'"),
        (row(QUESTION, ANSWER | {"weight": 0.5}), "a weight that is neither 0 nor 1"),
        (row(QUESTION, ANSWER | {"from": "human"}), "a message with two roles: assistant, human"),
        (row(QUESTION, ANSWER | {"value": "b"}), "a message with a content and another value"),
        (row(QUESTION, ANSWER | {"Content": "b"}), "a message with the field 'content' twice"),
        (row(QUESTION, ANSWER, chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs with a chat_templ"),
        (row(QUESTION, ANSWER, chat_template_kwargs="x"), "chat_template_kwargs that are no object"),
        (row(QUESTION, ANSWER, chat_template_kwargs={"x": "\ud83d"}), "content with half a surrogate pair"),
        (row(QUESTION | {"content": [{"type": "image_url", "image_url": "u"}]}), "content with a part that is not"),
        (row(QUESTION | {"content": ["q"]}), "content with a part that is not"),
        (row(QUESTION | {"content": None}), "a message without content"),
        (row(QUESTION | {"content": " "}), "an empty message of a user"),
        ({"turns": [" "]}, "an empty message of a user"),
        (row(QUESTION, ANSWER, system="s", system_prompt="t"), "two of system, system_prompt, system_message"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as fault:
        chat_of(fields)
    assert str(fault.value).startswith(reason)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q"},
        {"Prompt": "q", "messages": []},
        {"prompt": "q", "completion": "a"},
        {"prompt": [QUESTION]},
        {"turns": ["q"]},
        {"messages": [QUESTION], "prompt": " q\n", "prompt_ids": [1]},
        {"instruction": "q", "prompt": "### Instruction:\nq\n### Response:\n"},
    ],
)
def test_a_row_that_is_only_asked_may_hold_a_prompt_alone(fields: dict[str, Any]) -> None:
    assert question_of(fields).messages == [QUESTION]


ASKED = {"role": "user", "content": "What is a cat?\nBe brief."}


@pytest.mark.parametrize("prompt", ["x", "What is a dog?", ["x"], [ASKED, {"role": "user", "content": "x"}]])
@pytest.mark.parametrize("form", [{"turns": [ASKED["content"]]}, row(ASKED, ANSWER), {"instruction": ASKED["content"]}])
def test_a_prompt_that_says_something_else_than_the_conversation_is_refused(form: dict[str, Any], prompt: Any) -> None:
    for read in (chat_of, question_of):
        with pytest.raises(BadRow, match=f"^prompt and {next(iter(form))}, which say different things"):
            read({**form, "prompt": prompt})


@pytest.mark.parametrize(
    "prompt", ["What is a cat?", "<user> What is a cat?\n\n Be brief.</user>", [ASKED["content"]], [ASKED], 7]
)
def test_a_prompt_may_be_a_copy_of_what_the_conversation_asks(prompt: Any) -> None:
    for read in (chat_of, question_of):
        assert read(row(ASKED, ANSWER, prompt=prompt)).messages == [ASKED, ANSWER]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"turns": "one"}, "turns that are a text, and not a list of texts"),
        ({"turns": 3}, "turns that are a number, and not a list of texts"),
        ({"messages": "q"}, "messages that are a text, and not a list of messages"),
        ({"conversations": {"from": "human"}}, "conversations that are an object, and not a list of messages"),
        ({"turns": []}, "nothing in turns: write the turns as "),
        ({"Messages": None, "turns": []}, "nothing in messages and turns: "),
        ({"prompt": ""}, "nothing in prompt: "),
        ({"prompt_ids": []}, "nothing in prompt_ids: "),
        ({"text": "q"}, "none of messages, conversations, "),
    ],
)
def test_a_field_without_a_conversation_in_it_is_named(fields: dict[str, Any], reason: str) -> None:
    for read in (chat_of, question_of):
        with pytest.raises(BadRow) as fault:
            read(fields)
        assert str(fault.value).startswith(reason)


def test_beside_a_prompt_the_other_fields_count() -> None:
    chat = question_of({"prompt": "q", "system": "s", "chat_template_kwargs": {"x": 1}})
    assert chat.messages == [SYSTEM, QUESTION]
    assert chat.template_kwargs == {"x": 1}
    with pytest.raises(BadRow, match="images"):
        question_of({"prompt": "q", "images": ["x"]})


def test_a_row_that_is_trained_on_needs_more_than_a_prompt() -> None:
    for fields in ({"prompt": "q"}, {"prompt": [QUESTION]}):
        with pytest.raises(BadRow):
            chat_of(fields)


def test_a_text_to_continue_is_a_prompt_alone() -> None:
    assert text_of({"PROMPT": " q ", "id": 3}) == " q "
    for fields, fault in (
        ({"prompt": [QUESTION]}, "no text"),
        ({"turns": ["q"]}, "no prompt"),
        ({"prompt": ""}, "no prompt"),
        ({"prompt": "q", "system_prompt": "s"}, "system_prompt"),
        ({"prompt": "q", "tools": [TOOL]}, "tools"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "x", "turns": ["y"]}, "prompt and turns, which say different things"),
        ({"prompt": "<user>q", "messages": []}, None),
        ({"prompt": "<user>q", "messages": [QUESTION]}, None),
    ):
        if fault is None:
            assert text_of(fields) == "<user>q"
            continue
        with pytest.raises(BadRow, match=fault):
            text_of(fields)
