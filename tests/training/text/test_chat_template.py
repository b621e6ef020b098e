"""Rows are rendered token for token as SGLang's own chat route renders the same conversation, or refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.normalizers import Prepend

from sglang_auf.checkpoints.prepare import default_directory
from sglang_auf.training.text.chat_template import ChatTemplate
from sglang_auf.training.text.chats import Chat
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.rows import BadRow
from tests.support import toy_tokenizer as toy

QUESTION = {"role": "user", "content": "Say hi."}
ANSWER = {"role": "assistant", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be brief."}
LATER = {"role": "user", "content": "And now?"}
BYE = {"role": "assistant", "content": "Bye."}
TOOL = {
    "type": "function",
    "function": {"parameters": {"type": "object", "properties": {"x": {"type": "varchar"}}}, "name": "weather"},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"x": "Ulm \\u00e9"}'}}
CALLING = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12 degrees", "tool_call_id": "1"}
HALVES = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
TURN = "<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nMore."
"""The end of an answer, and an invented turn."""
PARTS = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hi."}]


@pytest.fixture(autouse=True)
def settings_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang publishes them when a server starts."""
    from sglang.srt.entrypoints.openai import serving_chat

    serving = SimpleNamespace(default_chat_template_kwargs=None, trust_request_chat_template=False)
    monkeypatch.setattr(serving_chat, "get_serving", lambda: serving)
    monkeypatch.setattr(serving_chat, "get_model", lambda: SimpleNamespace(context_length=None))


def served(tokenizer: Any, request: dict[str, Any]) -> list[int]:
    """The prompt's ids as SGLang's chat route makes them."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.parser.template_manager import TemplateManager

    model = SimpleNamespace(
        hf_config=SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"]),
        is_multimodal=False,
        get_default_sampling_params=dict,
    )
    manager: Any = SimpleNamespace(
        tokenizer=tokenizer,
        processor=None,
        model_config=model,
        config_value=lambda name: None,
        server_args=None,
        served_model_name="toy",
    )
    templates = TemplateManager()
    templates.load_chat_template(manager, None, "toy")
    chat = OpenAIServingChat(manager, templates)
    asked = ChatCompletionRequest.model_validate(request)
    assert chat._validate_request(asked) is None
    ids: list[int] = chat._process_messages(asked, False).prompt_ids
    return ids


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Conversation]:
    """load(tokenizer, row, thinking): the one conversation of the row; AssertionError with the reason if refused."""

    def one(tokenizer: Any, row: dict[str, Any], thinking: bool | None = None) -> Conversation:
        file = tmp_path / "rows.jsonl"
        good = {"id": "good", "prompt_ids": [1], "response_ids": [1]}
        file.write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
        loaded = load_conversations(file, tokenizer, max_length=2000, min_answer_tokens=1, thinking=thinking)
        assert not loaded.rejected, next(iter(loaded.rejected))
        return loaded.conversations[0]

    return one


def tokenizer_of(template: str) -> Any:
    """The toy with one of its templates, or SmolLM2's own."""
    if template != "SmolLM2":
        return toy.toy_tokenizer(getattr(toy, template))
    from transformers import AutoTokenizer

    if not default_directory("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not prepared")
    return AutoTokenizer.from_pretrained(default_directory("smollm2-135m"))


def last_label(tokenizer: Any, conversation: Conversation) -> tuple[list[int], str]:
    """The ids before the last answer, and its text."""
    mask = conversation.loss_mask
    start = len(mask) - mask[::-1].index(False)
    assert all(mask[start:])
    return conversation.input_ids[:start], tokenizer.decode(conversation.input_ids[start:])


CASES = {
    "OpenAI": ({"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}, "Hi."),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "Human", "value": "Say hi."},
                {"from": "GPT", "value": "Hi."},
                {"from": "user", "value": "And now?"},
                {"from": "bing", "value": "Bye."},
            ]
        },
        {"messages": [SYSTEM, QUESTION, ANSWER, LATER]},
        "Bye.",
    ),
    "TRL": (
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
        {"messages": [SYSTEM, QUESTION]},
        "Hi.",
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
        {"messages": [SYSTEM, {"role": "user", "content": "Add.\n\n1 2"}]},
        "3",
    ),
    "system of the row": (
        {"messages": [QUESTION, ANSWER], "system": "Be brief."},
        {"messages": [SYSTEM, QUESTION]},
        "Hi.",
    ),
    "a user with a name": (
        {"messages": [QUESTION | {"name": "Ann"}, ANSWER]},
        {"messages": [QUESTION | {"name": "Ann"}]},
        "Hi.",
    ),
    "text in parts": (
        {"messages": [QUESTION | {"content": PARTS}, ANSWER | {"content": [{"type": "text", "text": "Hi."}]}]},
        {"messages": [QUESTION | {"content": PARTS}]},
        "Hi.",
    ),
    "empty system": (
        {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]},
        {"messages": [{"role": "system", "content": ""}, QUESTION]},
        "Hi.",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", ["CHATML", "TOOLS", "PARTS", "SmolLM2"])
def test_plain_rows(case: str, template: str, load: Callable[..., Conversation]) -> None:
    tokenizer = tokenizer_of(template)
    row, request, answer = CASES[case]
    thinking = False if template == "TOOLS" else None
    if thinking is False:
        request = request | {"chat_template_kwargs": {"enable_thinking": False}}
    prompt, label = last_label(tokenizer, load(tokenizer, {"id": "a"} | row, thinking))
    assert prompt == served(tokenizer, request)
    assert label == f"{answer}<|im_end|>"


NO_THOUGHT = {"enable_thinking": False}
TOOL_CASES = {
    "tools": (
        {"messages": [SYSTEM, QUESTION, ANSWER], "tools": [TOOL], "chat_template_kwargs": NO_THOUGHT},
        {"messages": [SYSTEM, QUESTION], "tools": [TOOL], "chat_template_kwargs": NO_THOUGHT},
        "Hi.",
    ),
    "tools as JSON": (
        {"messages": [QUESTION, ANSWER], "tools": json.dumps([TOOL]), "chat_template_kwargs": NO_THOUGHT},
        {"messages": [QUESTION], "tools": [TOOL], "chat_template_kwargs": NO_THOUGHT},
        "Hi.",
    ),
    "a call": (
        {"messages": [QUESTION, CALLING], "tools": [TOOL], "chat_template_kwargs": NO_THOUGHT},
        {"messages": [QUESTION], "tools": [TOOL], "chat_template_kwargs": NO_THOUGHT},
        'Let me see.\n<tool_call>\nweather {"x": "Ulm é"}\n</tool_call>',
    ),
    "a result": (
        {"messages": [QUESTION, CALLING | {"content": None}, RESULT, BYE], "chat_template_kwargs": NO_THOUGHT},
        {"messages": [QUESTION, CALLING | {"content": None}, RESULT], "chat_template_kwargs": NO_THOUGHT},
        "Bye.",
    ),
    "reasoning": (
        {
            "messages": [QUESTION, ANSWER | {"reasoning_content": "Hm."}],
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {"messages": [QUESTION], "chat_template_kwargs": {"enable_thinking": True}},
        "<think>\nHm.\n</think>\n\nHi.",
    ),
}


@pytest.mark.parametrize("case", TOOL_CASES)
def test_rows_with_tools_calls_and_thoughts(case: str, load: Callable[..., Conversation]) -> None:
    tokenizer = toy.toy_tokenizer(toy.TOOLS)
    row, request, answer = TOOL_CASES[case]
    prompt, label = last_label(tokenizer, load(tokenizer, {"id": "a"} | row))
    assert prompt == served(tokenizer, request)
    assert label == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("CHATML", {"tools": [TOOL], "messages": [QUESTION, ANSWER]}, "the chat template leaves out tools"),
        ("CHATML", {"messages": [QUESTION, CALLING]}, "the chat template leaves out the tool_calls of an answer"),
        (
            "CHATML",
            {"messages": [QUESTION, CALLING | {"content": None}]},
            "the chat template leaves out the tool_calls of an answer",
        ),
        ("CALLS", {"messages": [QUESTION, CALLING]}, "the chat template leaves out the content of an answer"),
        (
            "CHATML",
            {"messages": [QUESTION, ANSWER | {"reasoning_content": "Hm."}]},
            "the chat template leaves out the reasoning_content of an answer",
        ),
        (
            "TOOLS",
            {"messages": [QUESTION, ANSWER | {"reasoning_content": "Hm."}, LATER, BYE]},
            "the chat template changes an answer when the conversation goes on",
        ),
        ("CHATML", {"messages": [QUESTION, ANSWER, BYE]}, "an answer after an answer"),
        *(
            ("CHATML", {"messages": messages}, "text that holds the special token '<|im_")
            for messages in (
                [{"role": "user", "content": "x<|im_end|>y"}, ANSWER],
                [SYSTEM | {"content": "<|im_end|>"}, QUESTION, ANSWER],
                [QUESTION, {"role": "assistant", "content": f"Hi.{TURN}"}],
                [QUESTION, {"role": "assistant", "content": f"Hi.{TURN}"}, LATER, BYE],
            )
        ),
        (
            "TOOLS",
            {"messages": [QUESTION, ANSWER], "tools": [{"function": {"name": "<|im_end|>"}}]},
            "text that holds the special token '<|im_end|>'",
        ),
        (
            "PARTS",
            {"messages": [QUESTION | {"content": HALVES}, ANSWER]},
            "text that holds the special token '<|im_end|>'",
        ),
    ],
)
def test_what_would_be_other_tokens_is_refused(
    template: str, row: dict[str, Any], reason: str, load: Callable[..., Conversation]
) -> None:
    with pytest.raises(AssertionError) as refused:
        load(toy.toy_tokenizer(getattr(toy, template)), {"id": "a"} | row)
    assert str(refused.value).startswith(reason)


def test_labels_end_at_the_first_end_of_a_turn(load: Callable[..., Conversation]) -> None:
    tokenizer = toy.toy_tokenizer(toy.ENDING)
    _, label = last_label(tokenizer, load(tokenizer, {"id": "a", "messages": [QUESTION, ANSWER]}))
    assert label == "Hi.<|im_end|>"


def test_words_that_are_tokens_but_not_special_are_text(load: Callable[..., Conversation]) -> None:
    """Qwen3's think tags: the target writes them, and its template reads them."""
    tokenizer = toy.toy_tokenizer(toy.CHATML)
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi."}
    prompt, label = last_label(tokenizer, load(tokenizer, {"id": "a", "messages": [QUESTION, answer]}))
    assert prompt == served(tokenizer, {"messages": [QUESTION]})
    assert label == f"{answer['content']}<|im_end|>"


@pytest.mark.parametrize("template", ["CHATML", "TRIMMING"])
def test_every_answer_of_a_conversation_follows_the_prompt_of_its_turn(
    template: str, load: Callable[..., Conversation]
) -> None:
    tokenizer = toy.toy_tokenizer(getattr(toy, template))
    messages = [QUESTION, ANSWER, LATER, BYE, QUESTION, ANSWER]
    conversation = load(tokenizer, {"id": "a", "messages": messages})
    starts = [k for k in range(1, len(conversation)) if conversation.loss_mask[k - 1 : k + 1] == [False, True]]
    assert [conversation.input_ids[:start] for start in starts] == [
        served(tokenizer, {"messages": messages[:count]}) for count in (1, 3, 5)
    ]


def test_tools_without_openais_wrapper_where_a_template_wants_them_so(load: Callable[..., Conversation]) -> None:
    flat = "{%- for tool in tools or [] -%}{%- if tool.function -%}{{- raise_exception('flat') -}}{%- endif -%}"
    tokenizer = toy.toy_tokenizer(flat + "{{- tool.name -}}{%- endfor -%}" + toy.CHATML)
    row = {"messages": [QUESTION, ANSWER], "tools": [TOOL]}
    prompt, label = last_label(tokenizer, load(tokenizer, {"id": "a"} | row))
    assert prompt == served(tokenizer, {"messages": [QUESTION], "tools": [TOOL]})
    assert tokenizer.decode(prompt).startswith("weather<|im_start|>")
    assert label == "Hi.<|im_end|>"


def test_what_the_row_and_the_command_disagree_on(load: Callable[..., Conversation]) -> None:
    row = {"id": "a", "messages": [QUESTION, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}
    with pytest.raises(AssertionError, match="enable_thinking True, and the command says False"):
        load(toy.toy_tokenizer(toy.TOOLS), row, False)


class OfBeginnings(ChatTemplate):
    """A border as it is defined: the text before it, alone, has the tokens that the complete text begins with."""

    def _tokens(self, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
        ids, *beginnings = self._encoded([text, *(text[:border] for border in borders)])
        for beginning in beginnings:
            if ids[: len(beginning)] != beginning:
                raise BadRow("a token reaches across the border of an answer")
        return ids, [len(beginning) for beginning in beginnings]


FRAGMENTS = [
    "Hi",
    "hi.",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "12",
    "'s",
    "e",
    "\u0301",
    "\u00e9",
    "\u3002",
    "\U0001f999",
    "</think>",
]


def said(dice: random.Random) -> str:
    return "".join(dice.choice(FRAGMENTS) for _ in range(dice.randrange(1, 7)))


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("template", ["CHATML", "TRIMMING", "THINKING", "SmolLM2"])
def test_answers_are_found_where_the_beginnings_of_the_text_end(template: str, spaced: bool) -> None:
    """spaced: the tokenizer puts a space before whatever it encodes, as Llama 2's: pieces then have other tokens."""
    tokenizer = tokenizer_of(template)
    if spaced:
        tokenizer.backend_tokenizer.normalizer = Prepend(" ")
    found, defined = ChatTemplate(tokenizer, None), OfBeginnings(tokenizer, None)
    dice, outcomes = random.Random(7), Counter[str]()
    for _ in range(80):
        turns = range(2 * dice.randrange(1, 5))
        chat = Chat([{"role": ("user", "assistant")[turn % 2], "content": said(dice)} for turn in turns])
        outcome = encoded_by(found, chat)
        assert outcome == encoded_by(defined, chat), chat
        outcomes[outcome if isinstance(outcome, str) else "found"] += 1
    assert outcomes["found"] > 20
    if template in ("CHATML", "SmolLM2"):  # the others leave no newline beside a border
        assert outcomes["a token reaches across the border of an answer"] > 10


def encoded_by(template: ChatTemplate, chat: Chat) -> Any:
    try:
        return template.encode(chat)
    except BadRow as fault:
        return str(fault)


def test_what_is_encoded_does_not_grow_with_the_square_of_the_turns() -> None:
    tokenizer, encoded = toy.toy_tokenizer(), 0
    template = ChatTemplate(tokenizer, None)

    def counted(texts: list[str]) -> list[list[int]]:
        nonlocal encoded
        encoded += sum(map(len, texts))
        return of_texts(texts)

    of_texts, template._encoded = template._encoded, counted  # type: ignore[method-assign]
    ids, spans = template.encode(Chat([QUESTION, ANSWER] * 50))
    assert len(spans) == 50
    assert encoded < 2.1 * len(tokenizer.decode(ids)), "once as it is and once in pieces"
