"""Tools, and the calls of an answer, as SGLang's server hands them to a chat template.

The server reads them into its own models, which add and leave out fields, and a template prints what it is given. So
SGLang's models are used here too (`OpenAIServingChat._apply_jinja_template` and `_validate_request` of SGLang). They
take seconds to import; only rows with tools need them.
"""

from __future__ import annotations

import json
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.training.text.rows import BadRow

_SRT = "sglang.srt"
SEAMS = (
    Seam(f"{_SRT}.entrypoints.openai.protocol:Tool", "training.text.tools"),
    Seam(f"{_SRT}.entrypoints.openai.protocol:ToolCall", "training.text.tools"),
    Seam(f"{_SRT}.function_call.utils:normalize_json_schema_types", "training.text.tools", ("schema",)),
    Seam(
        f"{_SRT}.parser.jinja_template_utils:detect_jinja_template_content_format",
        "training.text.chat_template",
        ("chat_template",),
    ),
)


def tools_of(value: Any) -> list[dict[str, Any]]:
    """OpenAI's list of tools, or the same as JSON text. Raises BadRow for what the server refuses."""
    from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.utils import normalize_json_schema_types

    found = [_model(Tool, tool, "tools") for tool in _list(value, "tools")]
    for tool in found:
        schema = tool["function"]["parameters"]
        if schema is None:
            continue
        try:
            normalize_json_schema_types(schema)
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            raise BadRow("tools with parameters that are no JSON schema") from error
    return found


def calls_of(value: Any) -> list[dict[str, Any]]:
    """The `tool_calls` of a message; their arguments are objects, or JSON text of one. Raises BadRow."""
    from sglang.srt.entrypoints.openai.protocol import ToolCall

    found = [_model(ToolCall, call, "tool_calls") for call in _list(value, "tool_calls")]
    for call in found:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = call["function"]["arguments"] = _json(arguments)
        if not call["function"]["name"] or not isinstance(arguments, dict):
            raise BadRow("tool_calls without a name, or with arguments that are no JSON object")
    return found


def _list(value: Any, what: str) -> list[Any]:
    value = _json(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"{what} that are no list")
    return value


def _json(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _model(model: Any, value: Any, what: str) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        dumped: dict[str, Any] = model.model_validate(value).model_dump()
    except (ValidationError, RecursionError) as error:
        raise BadRow(f"{what} that are not as OpenAI defines them") from error
    return dumped
