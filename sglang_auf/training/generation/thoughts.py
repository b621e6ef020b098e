"""Whether thoughts come with the answers that were asked with thinking on.

A server may lose them: without the model's reasoning parser, or in a field that nothing reads. A row without its
thought would be trained on behind an empty think block, which the target did not write there. But a model may also
think nothing now and then. So the first rows wait until one of them has a thought. If none has, the run ends, and none
of them is in the file.
"""

from __future__ import annotations

from typing import Any

from sglang_auf.errors import ServerError

FIRST_ROWS = 16
"""A run ends after this many rows if none of them has a thought: the server is taken to lose thoughts."""
END = "</think>"
"""Ends a thought in the text of an answer, where a server has no reasoning parser. Chat templates look for it."""


class Thoughts:
    """Of one run. lacking: ids of the rows that came without a thought."""

    def __init__(self) -> None:
        self.lacking: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._come = False

    def ready(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows that may be written now that this one is answered. Raises ServerError."""
        if not _needs_one(row):
            return [row]
        self._waiting.append(row)
        if _has_one(row):
            self._come = True
        else:
            self.lacking.append(row["id"])
        if self._come:
            return self.rest()
        if len(self._waiting) >= FIRST_ROWS:
            raise ServerError(
                f"thinking was on, and the first {FIRST_ROWS} answers came without a thought, the last one {row['id']}",
                f"a thought in some of them, as reasoning_content, as reasoning, or in the text up to {END}",
                "start the server with the reasoning parser of this model (--reasoning-parser of SGLang and vLLM), and "
                "run the same command again: it asks these rows again; for a model that does not think, --thinking off",
            )
        return []

    def rest(self) -> list[dict[str, Any]]:
        """The rows that wait. They may be written too once all rows are answered."""
        rows, self._waiting = self._waiting, []
        return rows


def _needs_one(row: dict[str, Any]) -> bool:
    """Exact token ids hold whatever the target wrote."""
    return row.get("chat_template_kwargs", {}).get("enable_thinking") is True and "response_ids" not in row


def _has_one(row: dict[str, Any]) -> bool:
    answer = row["messages"][-1]
    return "reasoning_content" in answer or END in answer["content"]
