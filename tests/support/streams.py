"""What a streamed chat answer says about its tokens: in its counts, and in its spans (hooks/spans.py)."""

from __future__ import annotations

import json
from typing import Any


def events(body: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def truth(chunks: list[dict[str, Any]]) -> tuple[int, int, str]:
    """Drafted tokens in the answer, all its tokens, its text: from the counts and the text that SGLang replied."""
    [usage] = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    [details] = [found for chunk in chunks if (found := (chunk.get("sglext") or {}).get("spec_tokens_details"))]
    tokens, accepted = usage["completion_tokens"], usage["completion_tokens_details"]["accepted_prediction_tokens"]
    cut = 1 + accepted + details["verify_steps"] - tokens
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    # Of the last step, a stop cuts off the target's own token first, then drafted ones.
    return accepted - max(cut - 1, 0), tokens, text


def said(chunks: list[dict[str, Any]]) -> list[tuple[str, bool | None]]:
    """(text, drafted) of each token, from the spans."""
    spans = [chunk["sglext"]["spans"]["tokens"] for chunk in chunks if "spans" in (chunk.get("sglext") or {})]
    return [(text, drafted) for tokens in spans for text, drafted in tokens]
