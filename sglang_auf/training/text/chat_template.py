"""Find the answers in a conversation that is rendered by a tokenizer's own chat template.

Templates do not say where an answer begins and ends, and some write an answer differently once the conversation goes
on: Qwen3 puts an empty think block before the last answer and none before earlier ones. So a conversation is rendered
as serving renders it at each of its turns, and every border is checked, both in the text and in the tokens.

Serving takes the text of a special token for the token, whoever wrote it. A row that holds one is refused: an answer
would go on behind the end of its turn, or a user would open a turn.

Some templates print today's date. Here they always print the same one, so that a text has the same tokens on every day:
a run that is resumed, a cache of features and an evaluation see what the first start saw. Tokens that a server gave
keep the date that is in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from sglang_auf.training.text.chats import Chat
from sglang_auf.training.text.messages import Message, texts
from sglang_auf.training.text.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "q7zxv"
"""A text that no template holds."""
TODAY = datetime(2024, 7, 26)
"""For templates that print the date: the one that Llama's print where nothing gives them another."""
DATE = "strftime_now"
"""The function by which templates ask for it, as transformers and SGLang name it."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start..end-1 are an answer; the last of them is the end-of-turn token if `closed`.

    unthought: it stands behind the longer header of the other thinking mode, which ends with an empty think block.
    served: whether the text before it is what a server is asked with for this answer.
    """

    start: int
    end: int
    closed: bool
    unthought: bool = False
    served: bool = True


class ChatTemplate:
    """The template of a tokenizer in one thinking mode (None: the template's own default, or what a row asks for)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added
        self._special = frozenset(special.values())
        self._special_texts = sorted(filter(None, special), key=len, reverse=True)
        switches = [{"enable_thinking": mode} for mode in (True, False)] if _knows_thinking(tokenizer) else []
        mode = {} if thinking is None or not switches else {"enable_thinking": thinking}
        self._modes = [mode, *(switch for switch in switches if switch != mode)]
        """The mode of the rows comes first; the others are ways in which an earlier turn's header may be written."""

    def encode(self, chat: Chat) -> tuple[list[int], list[Span]]:
        """Token ids of a conversation that ends with an answer, and the span of every answer in it. Raises BadRow."""
        self._check(chat)
        text = self._render(chat)
        if not text.startswith(self._prompt(chat.first(-1))):
            raise BadRow("the last answer does not follow the prompt that serving writes (thinking on or off?)")
        return self._locate(text, chat)

    def encode_prompt(self, chat: Chat) -> tuple[list[int], list[Span]]:
        """The same for a conversation that ends where its next answer begins, as a server gets it."""
        self._check(chat)
        return self._locate(self._prompt(chat), chat)

    def as_of(self, chat: Chat, prompt: Sequence[int]) -> Chat:
        """The chat with the date that a template printed into `prompt`, its token ids; unchanged where it prints none.

        Where the ids are of another chat or template, nothing is found and the chat is unchanged too. Raises BadRow.
        """
        marks: dict[str, str] = {}

        def mark(layout: str) -> str:
            return marks.setdefault(layout, f"{PROBE}{len(marks)}_")

        pattern = re.escape(self._prompt(_with_date(chat, mark)))
        for name in marks.values():
            before, found, after = pattern.partition(name)
            if found:  # a template may ask for the date and not print it
                pattern = f"{before}(?P<{name}>.+){after.replace(name, f'(?P={name})')}"
        if not marks:
            return chat
        printed = re.fullmatch(pattern, str(self._tokenizer.decode(prompt, clean_up_tokenization_spaces=False)))
        if printed is None:
            return chat
        dates = {layout: printed[name] for layout, name in marks.items() if name in printed.groupdict()}
        return _with_date(chat, lambda layout: dates.get(layout) or TODAY.strftime(layout))

    def is_of_other_mode(self, prompt: Sequence[int]) -> bool:
        """Whether `prompt`, token ids as a server got them, ends as prompts of the other thinking mode do, and not as
        those of this one. False where no mode is asked for, or where the template ends the prompts of both alike.
        """
        found = [list(prompt[-len(end) :]) == end for end in self._ends_of_prompts]
        return self._thinking is not None and any(found) and not found[0]

    @cached_property
    def _ends_of_prompts(self) -> list[list[int]]:
        """What each mode puts where an answer is to begin; nothing at all where that cannot be seen."""
        asked = Chat([{"role": "user", "content": PROBE}])
        try:
            texts = [
                (self._render(asked, mode), self._render(asked, mode, add_generation_prompt=True))
                for mode in self._modes
            ]
        except BadRow:  # a template that refuses so short a conversation
            return []
        if not all(prompt.startswith(before) and prompt != before for before, prompt in texts):
            return []
        return self._encoded([prompt.removeprefix(before) for before, prompt in texts])

    def user_turn(self) -> tuple[list[int], int]:
        """Token ids before the first user message, and the first token after that message. Raises BadRow."""
        opening, *rest = self._render(Chat([{"role": "user", "content": PROBE}])).split(PROBE)
        if len(rest) != 1 or not opening or not rest[0]:
            raise BadRow("the chat template puts no text before and after a user message")
        ids, after = self._encoded([opening, rest[0]])
        return ids, after[0]

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer's turn: the tokenizer's own, and the special one that the template writes first."""
        ends = end_of_text(self._tokenizer)
        with suppress(BadRow):  # a template that refuses so short a conversation
            asked = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}])
            after = self._encoded([self._render(asked).rpartition(PROBE)[2]])[0]
            ends |= set([token for token in after if token in self._special][:1])
        return ends

    def _check(self, chat: Chat) -> None:
        """Raise BadRow for what would be other tokens than it says."""
        chat.require_thinking(self._thinking)
        for said in (*chat.strings(), *("".join(texts(message)) for message in chat.messages)):
            for token in self._special_texts:
                if token in said:
                    raise BadRow(f"text that holds the special token {token!r}, which a server takes for the token")
        if chat.tools and self._render(chat) == self._render(Chat(chat.messages, None, chat.template_kwargs)):
            raise BadRow("the chat template leaves out tools")

    def _locate(self, text: str, chat: Chat) -> tuple[list[int], list[Span]]:
        for message in chat.messages:
            if message["role"] != "assistant" and any(said.strip() not in text for said in texts(message)):
                raise BadRow(f"the chat template leaves out what role {message['role']!r} says")
        found = [self._borders(text, chat, index) for index in chat.answers]
        ids, places = self._tokens(text, [border for start, end, _, _ in found for border in (start, end)])
        pairs = zip(places[::2], places[1::2], found, strict=True)
        return ids, [self._span(ids, start, end, *kinds) for start, end, (_, _, *kinds) in pairs]

    def _borders(self, text: str, chat: Chat, index: int) -> tuple[int, int, bool, bool]:
        """Where answer `index` begins in `text`, and where what the template adds after it ends; as Span: `unthought`
        and `served`.
        """
        headers = [self._render(chat.first(index), mode, add_generation_prompt=True) for mode in self._modes]
        alone = self._render(chat.first(index + 1))
        said = [name for name in ("content", "reasoning_content", "tool_calls") if chat.messages[index].get(name)]
        for name in said if said != ["content"] else ():  # content alone is what every template writes
            if alone == self._render(_without(chat.first(index + 1), name)):
                raise BadRow(f"the chat template leaves out the {name} of an answer")
        start = _longest_beginning(text, headers)
        answer = alone[_longest_beginning(alone, headers) :]
        if not text.startswith(answer, start):
            raise BadRow("the chat template changes an answer when the conversation goes on (reasoning left out?)")
        return start, start + len(answer), start > len(headers[0]), text.startswith(headers[0])

    def _span(self, ids: Sequence[int], start: int, end: int, unthought: bool, served: bool) -> Span:
        """Up to the first end of turn. What the template writes behind it (a newline) is not the answer's.

        Some templates end a turn with tool calls by another special token: then it is the last one.
        """
        place = next((k for k in range(start, end) if ids[k] in self.ends), None)
        if place is None:
            place = next((k for k in reversed(range(start, end)) if ids[k] in self._special), None)
        return Span(start, end if place is None else place + 1, place is not None, unthought, served)

    def _prompt(self, chat: Chat) -> str:
        return self._render(chat, add_generation_prompt=True)

    def _render(self, chat: Chat, mode: dict[str, bool] | None = None, add_generation_prompt: bool = False) -> str:
        """As `OpenAIServingChat._apply_jinja_template` of SGLang does, which tries tools in two forms."""
        from jinja2 import TemplateError

        messages = [self._as_served(message) for message in chat.messages]
        variables = {DATE: TODAY.strftime} | chat.template_kwargs | (self._modes[0] if mode is None else mode)
        forms = [chat.tools, [tool["function"] for tool in chat.tools]] if chat.tools else [None]
        reason: Exception | None = None
        for tools in forms:
            try:
                return str(
                    self._tokenizer.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
                    )
                )
            except (TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
                reason = error
        raise BadRow(f"the chat template refuses it: {reason}") from reason

    def _as_served(self, message: Message) -> Message:
        """Text in parts stays so only for templates that take parts."""
        if isinstance(message["content"], str) or (self._takes_parts and message["role"] != "tool"):
            return message
        return message | {"content": " ".join(texts(message))}

    @cached_property
    def _takes_parts(self) -> bool:
        from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format

        return bool(detect_jinja_template_content_format(_source(self._tokenizer)) == "openai")

    def _tokens(self, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids of a text, and how many of them stand before each border. Raises BadRow for a border in a token.

        borders: places in the text, ascending. A border is between two tokens where the text before it, alone, has the
        tokens that the complete text begins with. Encoding all these beginnings takes a time that grows with the square
        of the number of turns. So the pieces between the borders are encoded first: where they give the tokens of the
        text side by side, each beginning has those of its pieces.
        """
        ids, *pieces = self._encoded([text, *(text[start:end] for start, end in pairwise([0, *borders, len(text)]))])
        if list(chain.from_iterable(pieces)) == ids:
            return ids, list(accumulate(map(len, pieces[:-1])))
        beginnings = self._encoded([text[:border] for border in borders])
        if any(ids[: len(beginning)] != beginning for beginning in beginnings):
            raise BadRow("a token reaches across the border of an answer")
        return ids, list(map(len, beginnings))

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return ids


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's end token, if it has one."""
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return template if isinstance(template, str) else " ".join((template or {}).values())


def _knows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "enable_thinking" in _source(tokenizer)


def _without(chat: Chat, name: str) -> Chat:
    """The chat whose last message lacks a field; its content is empty then."""
    last = {"content": ""} | {key: value for key, value in chat.messages[-1].items() if key != name}
    return Chat([*chat.messages[:-1], last], chat.tools, chat.template_kwargs)


def _with_date(chat: Chat, printed: Callable[[str], str]) -> Chat:
    """printed: the text of the date, from a layout as strftime takes it."""
    return replace(chat, template_kwargs=chat.template_kwargs | {DATE: printed})


def _longest_beginning(text: str, headers: Sequence[str]) -> int:
    lengths = [len(header) for header in headers if text.startswith(header)]
    if not lengths:
        raise BadRow("the chat template writes another header before an answer than before a new one")
    return max(lengths)
