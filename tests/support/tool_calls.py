"""Answers that call tools, in the formats of SGLang's parsers, and the tokens of such answers."""

from __future__ import annotations

import re
from typing import Any

ARGUMENTS = '{"city": "Bern <b> \\"x\\"", "days": 2}'
PAIRS = "<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"

BARRED = [
    "Hm <|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>look\n```json\n"
    f"{ARGUMENTS}\n```<|tool▁call▁end|><|tool▁calls▁end|>",
    f"Hm <|tool▁calls▁begin|><|tool▁call▁begin|>look<|tool▁sep|>{ARGUMENTS}<|tool▁call▁end|>"
    "<|tool▁call▁begin|>now<|tool▁sep|>{}<|tool▁call▁end|><|tool▁calls▁end|>",
    'Hm\n\n<|DSML|tool_calls>\n<|DSML|invoke name="look">\n<|DSML|parameter name="city" string="true">Bern'
    "</|DSML|parameter>\n</|DSML|invoke>\n</|DSML|tool_calls>",
]
"""DeepSeek's, whose tags have wider bars."""

TEXTS = [
    "No call at all, 5 < 6 [so] far.",
    f'Let me look. <tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    f'<think>Ok.</think> <tool_call>{{"name": "look", "arguments": {ARGUMENTS}}}</tool_call> done',
    f'Well <|python_tag|>{{"name": "look", "parameters": {ARGUMENTS}}}',
    f'[TOOL_CALLS] [{{"name": "look", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
    f"Ok [TOOL_CALLS]look[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    *(text.replace("|", "\N{FULLWIDTH VERTICAL LINE}") for text in BARRED),
    f"Hm <tool_call>look\n{PAIRS}</tool_call>\n<tool_call>now\n</tool_call>",
    "Hm <tool_call>\n<function=look>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>\n",
    f"Hm <tool_calls>\n<tool_call>look<tool_sep>\n{PAIRS}</tool_call>\n</tool_calls>",
    "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.look"
    f"<|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "Hm <|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    'Hm [look(city="Bern", days=2), now()]',
    'Hm <|tool_call_start|>[look(city="Bern", days=2), now()]<|tool_call_end|> ok',
    f'Hm<|function_call|>{{"name": "look", "arguments": {ARGUMENTS}}}',
    'Hm <minimax:tool_call>\n<invoke name="look">\n<parameter name="city">Bern</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    'Hm <|tool_call>call:look{city:<|"|>Bern<|"|>,days:2}<tool_call|>',
    f'Hm <|action_start|> <|plugin|>\n{{"name": "look", "parameters": {ARGUMENTS}}}<|action_end|>',
]


def tokens_of(text: str) -> list[str]:
    """The text cut as a vocabulary that has its tags would cut it."""
    cut = re.findall(r"<[|/]?[^<>\n ]{1,40}>|\[/?[A-Z_]+\]|\s?\w{1,5}|\s?[^\w\s]{1,2}|\s+", text)
    assert "".join(cut) == text
    return cut


def tools() -> list[Any]:
    from sglang.srt.entrypoints.openai.protocol import Function, Tool

    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    return [
        Tool(function=Function(name="look", parameters={"type": "object", "properties": properties})),
        Tool(function=Function(name="now", parameters={"type": "object", "properties": {}})),
    ]


def joined(events: list[tuple[str, list[Any]]]) -> tuple[str, dict[int, tuple[str, str]]]:
    """What a client has of a parser's events: the text, and name and arguments of each call."""
    calls: dict[int, tuple[str, str]] = {}
    for _, items in events:
        for item in items:
            name, arguments = calls.get(item.tool_index, ("", ""))
            calls[item.tool_index] = (name + (item.name or ""), arguments + (item.parameters or ""))
    return "".join(text or "" for text, _ in events), calls
