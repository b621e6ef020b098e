"""`sglang-auf prompts`: the target writes prompts too, for when there are none or too few kinds of them.

A chat model that is given its template up to where a user begins continues with what a user would say. Asked often at
temperature 1, it covers the kinds of request it was trained on (Magpie, arXiv 2406.08464). `regenerate` then has the
model answer these prompts. Texts that are empty, repeated or cut off at the limit are counted and not kept. The server
needs OpenAI's completions route and must take a prompt as token ids. To get one kind of request more often, give the
first words of the user (`opening`).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.contrib.logging import logging_redirect_tqdm

from sglang_auf import __version__
from sglang_auf.errors import DataError, ServerError
from sglang_auf.training.generation.client import AnswerError, TargetClient
from sglang_auf.training.generation.output_file import OutputFile, OutputManifest
from sglang_auf.training.generation.settings import PromptSettings
from sglang_auf.training.generation.workers import GIVE_UP_AFTER, Progress, run_workers, seed_of
from sglang_auf.training.text.chat_template import ChatTemplate
from sglang_auf.training.text.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

USELESS_IN_A_ROW = 200
"""Texts in a row that cannot be kept, after which a run stops: the model does not write what a user says."""


def write_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Counter[str]]:
    """Ask until settings.out has settings.count rows {"id", "turns": [text]}.

    Returns the number of rows in that file, and outcome -> number of texts. Raises DataError if the template or the
    model does not allow it, ServerError if the server gives no text. The rows in the file are kept in both cases, and
    the same command continues it.
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
    """text: what the user has said so far. ids: the template up to the end of it."""

    text: str
    ids: list[int]


async def _write(settings: PromptSettings, openings: list[_Opening], end: int | None) -> tuple[int, Counter[str]]:
    """end: the token that ends a user's turn; None if the model stops at it anyway."""
    async with TargetClient(settings) as client:
        model = settings.model or await client.only_model()
        manifest = OutputManifest(
            model=model,
            thinking="server",
            input_sha256=hashlib.sha256(repr([opening.ids for opening in openings]).encode()).hexdigest(),
            version=__version__,
            **settings.model_dump(include={"temperature", "max_tokens", "seed"}),
        )
        with OutputFile(settings.out, manifest) as file:
            with Progress(settings.count, len(file.done)) as progress:
                workers = _Workers(client, model, openings, end, settings, file, progress)
                await workers.ask()
            return len(file.done), workers.outcomes


@dataclass(frozen=True, slots=True)
class _RowId:
    """number: which of the texts asked for. digest: of the text, to find repetitions."""

    number: int
    digest: str

    @classmethod
    def of(cls, number: int, text: str) -> _RowId:
        return cls(number, hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def read(cls, id: str) -> _RowId:
        _, number, digest = id.split("-")
        return cls(int(number), digest)

    def __str__(self) -> str:
        return f"prompt-{self.number}-{self.digest}"


class _Workers:
    """They share the numbers of the texts still to ask for. outcomes: outcome -> number of texts."""

    def __init__(
        self,
        client: TargetClient,
        model: str,
        openings: list[_Opening],
        end: int | None,
        settings: PromptSettings,
        file: OutputFile,
        progress: Progress,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client, self._model, self._openings, self._end = client, model, openings, end
        self._settings, self._file, self._progress = settings, file, progress
        try:
            before = [_RowId.read(id) for id in file.done]
        except ValueError:
            raise DataError(
                f"{file.path} has other rows", "rows that this command wrote", "give another --out"
            ) from None
        self._known = {id.digest for id in before}
        self._numbers = itertools.count(max((id.number for id in before), default=-1) + 1)
        self._useless = self._faults = 0

    async def ask(self) -> None:
        missing = self._settings.count - len(self._file.done)
        await run_workers(self._work() for _ in range(min(self._settings.concurrency, missing)))

    def _missing(self) -> Iterator[int]:
        while len(self._file.done) < self._settings.count:
            yield next(self._numbers)

    async def _work(self) -> None:
        for number in self._missing():
            opening = self._openings[number % len(self._openings)]
            seed = seed_of(self._settings.seed, "prompt", number)
            try:
                found = await self._client.complete(self._model, opening.ids, self._end, seed)
            except AnswerError as error:
                self.outcomes["failed"] += 1
                self._faults += 1
                logger.error("text %d failed: %s", number, error)
                if self._faults >= GIVE_UP_AFTER:
                    raise ServerError(
                        f"{self._faults} requests in a row failed, the last one: {error}",
                        "a server with OpenAI's completions route, which takes a prompt as token ids",
                        f"then run the same command again: {self._file.path} keeps its {len(self._file.done)} rows",
                    ) from error
                continue
            self._faults = 0
            self._progress.add_tokens(found.tokens)
            self._keep(number, (opening.text + found.text).strip() if found.text.strip() else "", found.finish_reason)

    def _keep(self, number: int, text: str, finish_reason: str) -> None:
        id = _RowId.of(number, text)
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
            self._progress.add_row()
            return
        self._useless += 1
        if self._useless >= USELESS_IN_A_ROW:
            counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
            raise DataError(
                f"{self._useless} texts in a row of no use ({counts})",
                "a chat model that continues with what a user would say",
                "raise --max-tokens if most are cut off; otherwise give prompts of your own",
            )
