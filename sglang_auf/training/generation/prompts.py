"""`sglang-auf prompts`: let the target write the prompts too, where none are at hand or theirs are too narrow.

A chat model that is given its template up to where a user would begin goes on with what a user would say; asked often
enough at temperature 1, it covers the kinds of request it was trained on (Magpie, arXiv 2406.08464). The text goes to
`regenerate`, which has the model answer it. What is cut off at the limit, empty or there already is not kept, and is
counted. Any server with OpenAI's completions route will do that takes a prompt as token ids. Where a kind of request is
wanted more often than the model writes it by itself, the user's first words are given (`opening`).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from tqdm.contrib.logging import logging_redirect_tqdm

from sglang_auf import __version__
from sglang_auf.errors import DataError, ServerError
from sglang_auf.training.data.chat_template import ChatTemplate
from sglang_auf.training.data.rows import BadRow
from sglang_auf.training.generation.client import AnswerError, ChatServer
from sglang_auf.training.generation.output_file import AnswerFile, Manifest
from sglang_auf.training.generation.regenerate import GIVE_UP_AFTER, Progress, seed_of, together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

USELESS_IN_A_ROW = 200
"""Texts in a row that cannot be kept before the run stops: the model does not write what a user says."""


class PromptSettings(BaseModel):
    """target: directory, hub id or prepared target whose chat template it is. count: prompts in `out` in the end.
    opening: what users begin with, in turn; without any, the model begins too. max_tokens: of one prompt, without its
    opening; longer ones are not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(min_length=1)
    out: Path
    base_url: str = Field(pattern=r"^https?://[^/]+")
    count: int = Field(ge=1)
    opening: tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...] = ()
    model: str | None = Field(default=None, min_length=1)
    concurrency: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0, le=2)
    seed: int = Field(default=42, ge=0, lt=2**31)
    max_tokens: int = Field(default=256, ge=1)
    timeout_s: float = Field(default=3600.0, gt=0)
    retries: int = Field(default=6, ge=0)


def write_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Counter[str]]:
    """Ask until settings.out has settings.count rows {"id", "turns": [text]}.

    Returns the number of rows in it, and what became of the texts that were asked for.

    Raises DataError for a template or a model that does not lend itself to it, ServerError where the server gives no
    text; the rows in the file are kept, and the same command goes on with them.
    """
    try:
        user_turn, end = ChatTemplate(tokenizer, thinking=None).user_turn()
    except BadRow as fault:
        expected = "a chat template with a place for what a user says"
        raise DataError(str(fault), expected, "give prompts of your own") from fault
    openings = [
        _Opening(text, user_turn + tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in settings.opening or [""]
    ]
    with logging_redirect_tqdm():
        return asyncio.run(_write(settings, openings, None if end == tokenizer.eos_token_id else end))


@dataclass(frozen=True, slots=True)
class _Opening:
    """text: what the user has said so far. ids: the template up to there."""

    text: str
    ids: list[int]


async def _write(settings: PromptSettings, openings: list[_Opening], end: int | None) -> tuple[int, Counter[str]]:
    """end: the token that ends a user's turn, where the model does not stop at it by itself."""
    async with ChatServer(
        settings.base_url,
        concurrency=settings.concurrency,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        thinking=None,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
    ) as server:
        model = settings.model or await server.only_model()
        manifest = Manifest(
            model=model,
            thinking="server",
            input_sha256=hashlib.sha256(repr([opening.ids for opening in openings]).encode()).hexdigest(),
            version=__version__,
            **settings.model_dump(include={"temperature", "max_tokens", "seed"}),
        )
        with AnswerFile(settings.out, manifest) as file:
            with Progress(settings.count, len(file.done)) as progress:
                run = _Run(server, model, openings, end, settings, file, progress)
                await run.ask()
            return len(file.done), run.outcomes


@dataclass(frozen=True, slots=True)
class _Id:
    """Of a row: which of the texts asked for it is, and a digest by which its like is known."""

    number: int
    digest: str

    @classmethod
    def of(cls, number: int, text: str) -> _Id:
        return cls(number, hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def read(cls, id: str) -> _Id:
        _, number, digest = id.split("-")
        return cls(int(number), digest)

    def __str__(self) -> str:
        return f"prompt-{self.number}-{self.digest}"


class _Run:
    """Workers that share the numbers of the texts to ask for, and what became of them."""

    def __init__(
        self,
        server: ChatServer,
        model: str,
        openings: list[_Opening],
        end: int | None,
        settings: PromptSettings,
        file: AnswerFile,
        progress: Progress,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._server, self._model, self._openings, self._end = server, model, openings, end
        self._settings, self._file, self._progress = settings, file, progress
        try:
            before = [_Id.read(id) for id in file.done]
        except ValueError:
            raise DataError(
                f"{file.path} has other rows", "rows that this command wrote", "give another --out"
            ) from None
        self._known = {id.digest for id in before}
        self._numbers = itertools.count(max((id.number for id in before), default=-1) + 1)
        self._useless = self._faults = 0

    async def ask(self) -> None:
        missing = self._settings.count - len(self._file.done)
        await together(self._work() for _ in range(min(self._settings.concurrency, missing)))

    def _missing(self) -> Iterator[int]:
        while len(self._file.done) < self._settings.count:
            yield next(self._numbers)

    async def _work(self) -> None:
        for number in self._missing():
            opening = self._openings[number % len(self._openings)]
            seed = seed_of(self._settings.seed, "prompt", number)
            try:
                found = await self._server.go_on(self._model, opening.ids, self._end, seed)
            except AnswerError as error:
                self.outcomes["failed"] += 1
                self._faults += 1
                log.error("text %d failed: %s", number, error)
                if self._faults >= GIVE_UP_AFTER:
                    raise ServerError(
                        f"{self._faults} requests in a row failed, the last one: {error}",
                        "a server with OpenAI's completions route, which takes a prompt as token ids",
                        f"then run the same command again: {self._file.path} keeps its {len(self._file.done)} rows",
                    ) from error
                continue
            self._faults = 0
            self._progress.tokens(found.tokens)
            self._keep(number, (opening.text + found.text).strip() if found.text.strip() else "", found.finish_reason)

    def _keep(self, number: int, text: str, finish_reason: str) -> None:
        id = _Id.of(number, text)
        if len(self._file.done) >= self._settings.count:
            self.outcomes["one too many"] += 1
            return
        if finish_reason != "stop":
            outcome = "cut off"
        elif not text:
            outcome = "empty"
        else:
            outcome = "there already" if id.digest in self._known else "kept"
        self.outcomes[outcome] += 1
        if outcome == "kept":
            self._useless = 0
            self._known.add(id.digest)
            self._file.append({"id": str(id), "turns": [text]})
            self._progress.row()
            return
        self._useless += 1
        if self._useless >= USELESS_IN_A_ROW:
            counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
            raise DataError(
                f"{self._useless} texts in a row of no use ({counts})",
                "a chat model that goes on with what a user would say",
                "raise --max-tokens if most are cut off; else give prompts of your own",
            )
