"""Find the answers in a conversation that is rendered by a tokenizer's own chat template.

Templates do not say where an answer begins and ends, and some write an answer differently once the conversation goes
on: Qwen3 puts an empty think block before the last answer and none before earlier ones. So a conversation is rendered
as serving renders it at each of its turns, and every border is checked, both in the text and in the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_auf.training.data.rows import BadRow, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start..end-1 are an answer; the last of them is the end-of-turn token if `closed`."""

    start: int
    end: int
    closed: bool


class ChatTemplate:
    """The template of a tokenizer in one thinking mode (None: the template's own default)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        switches = [{"enable_thinking": mode} for mode in (True, False)] if _knows_thinking(tokenizer) else []
        mode = {} if thinking is None or not switches else {"enable_thinking": thinking}
        self._modes = [mode, *(switch for switch in switches if switch != mode)]
        """The mode of the rows comes first; the others are ways in which an earlier turn's header may be written."""

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        """Token ids of a conversation that ends with an answer, and the span of every answer in it. Raises BadRow."""
        text = self._render(messages)
        if not text.startswith(self._prompt(messages[:-1])):
            raise BadRow("the last answer does not follow the prompt that serving writes (thinking on or off?)")
        return self._locate(text, messages, _answers(messages))

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        """The same for a conversation that ends where its next answer begins, as a server gets it."""
        return self._locate(self._prompt(messages), messages, _answers(messages))

    def user_turn(self) -> tuple[list[int], int]:
        """Token ids before the first user message, and the first token after that message. Raises BadRow."""
        said = "q7zxv"  # a text that no template holds
        opening, *rest = self._render([{"role": "user", "content": said}]).split(said)
        if len(rest) != 1 or not opening or not rest[0]:
            raise BadRow("the chat template puts no text before and after a user message")
        ids, after = self._tokens([opening, rest[0]])
        return ids, after[0]

    def _locate(self, text: str, messages: Sequence[Message], answers: Sequence[int]) -> tuple[list[int], list[Span]]:
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise BadRow(f"the chat template leaves out what role {message['role']!r} says")
        borders = [border for index in answers for border in self._borders(text, messages, index)]
        ids, *beginnings = self._tokens([text, *(text[:border] for border in borders)])
        for beginning in beginnings:
            if ids[: len(beginning)] != beginning:
                raise BadRow("a token reaches across the border of an answer")
        places = [len(beginning) for beginning in beginnings]
        return ids, [self._span(ids, *places[k : k + 2]) for k in range(0, len(places), 2)]

    def _borders(self, text: str, messages: Sequence[Message], index: int) -> tuple[int, int]:
        """Characters of `text` where answer `index` begins, and where what the template adds after it ends."""
        headers = [self._render(messages[:index], mode, add_generation_prompt=True) for mode in self._modes]
        alone = self._render(messages[: index + 1])
        start = _longest_beginning(text, headers)
        answer = alone[_longest_beginning(alone, headers) :]
        if not text.startswith(answer, start):
            raise BadRow("the chat template changes an answer when the conversation goes on (reasoning left out?)")
        return start, start + len(answer)

    def _span(self, ids: Sequence[int], start: int, end: int) -> Span:
        """The end-of-turn token is the last special one. A newline after it is the template's."""
        special = next((k for k in reversed(range(start, end)) if ids[k] in self._special), None)
        return Span(start, end if special is None else special + 1, special is not None)

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, add_generation_prompt=True)

    def _render(
        self, messages: Sequence[Message], mode: dict[str, bool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(self._modes[0] if mode is None else mode),
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from error
        return text

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Some are equal, as the last answer mostly ends with the conversation."""
        unique = list(dict.fromkeys(texts))
        ids = dict(zip(unique, self._tokenizer(unique, add_special_tokens=False)["input_ids"], strict=True))
        return [ids[text] for text in texts]


def _knows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    template: Any = tokenizer.chat_template
    return "enable_thinking" in (template if isinstance(template, str) else " ".join((template or {}).values()))


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _longest_beginning(text: str, headers: Sequence[str]) -> int:
    lengths = [len(header) for header in headers if text.startswith(header)]
    if not lengths:
        raise BadRow("the chat template writes another header before an answer than before a new one")
    return max(lengths)
