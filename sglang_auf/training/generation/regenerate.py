"""`sglang-auf regenerate`: let the target itself answer the prompts a drafter is to be trained on.

A drafter learns to guess what the target says, so its training text should be the target's own. Any OpenAI-compatible
server will do, a router in front of many too. Turns are asked in order, each with the target's own earlier replies.
Every finished row is on disk before it counts (answer_file.py): after a kill the same command goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sglang_auf import __version__
from sglang_auf.errors import DataError, ServerError
from sglang_auf.training.data.rows import BadRow, Message, grouped, messages_of, named, read_rows
from sglang_auf.training.generation.client import Answer, AnswerError, ChatServer
from sglang_auf.training.generation.output_file import AnswerFile, Manifest

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 16
"""Rows in a row that fail by the server's fault before the run stops: it is down, and the rest would fail too."""


class RegenerateSettings(BaseModel):
    """inputs: prompt files or data sets (rows.py). model None: the only one the server has. thinking: "server" leaves
    the template as it is. limit: so many rows of each input, from its first. timeout_s: of one answer. retries: of
    one request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[str, ...] = Field(min_length=1)
    out: Path
    base_url: str = Field(pattern=r"^https?://[^/]+")
    model: str | None = Field(default=None, min_length=1)
    concurrency: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = Field(default=42, ge=0, lt=2**31)
    max_tokens: int = Field(default=2048, ge=1)
    limit: int | None = Field(default=None, ge=1)
    thinking: Literal["server", "on", "off"] = "server"
    split: str = Field(default="train", min_length=1)
    timeout_s: float = Field(default=3600.0, gt=0)
    retries: int = Field(default=6, ge=0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row without answers: what is said before each answer of the target, in order."""

    id: str
    turns: tuple[tuple[Message, ...], ...]

    @classmethod
    def of(cls, id: str, messages: Iterable[Message]) -> Prompt:
        """Answers are left out, and every user message ends a turn. Raises BadRow."""
        turns: list[tuple[Message, ...]] = []
        said: list[Message] = []
        for message in messages:
            if message["role"] not in ("system", "developer", "user", "assistant"):
                raise BadRow(f"a message of role {message['role']!r}, which cannot be asked again")
            if message["role"] == "assistant":
                continue
            if not message["content"].strip():
                raise BadRow("an empty message")
            said.append({"role": message["role"], "content": message["content"]})
            if message["role"] == "user":
                turns.append(tuple(said))
                said = []
        if not turns:
            raise BadRow("no message of a user")
        return cls(id, tuple(turns))


@dataclass(frozen=True, slots=True)
class Prompts:
    """unusable: reason -> rows that cannot be asked. sha256: of all that was read, limit or not."""

    prompts: list[Prompt]
    unusable: dict[str, list[str]]
    sha256: str


def read_prompts(inputs: Sequence[str], *, split: str = "train", limit: int | None = None) -> Prompts:
    """The first `limit` rows of each input, unusable ones among them. Raises DataError if all are unusable."""
    digest = hashlib.sha256()
    prompts: list[Prompt] = []
    faults: list[tuple[str, str]] = []
    for row in read_rows(inputs, digest, split=split):
        if limit is not None and row.position >= limit:
            continue  # read on for the digest, so that a later run may raise the limit
        try:
            if row.fault:
                raise BadRow(row.fault)
            prompts.append(Prompt.of(row.id, messages_of(row.fields)))
        except BadRow as fault:
            faults.append((str(fault), row.name))
    unusable = grouped(faults)
    if not prompts:
        raise DataError(
            f"no prompt in {', '.join(inputs)} ({_listed(unusable) or 'no rows'})",
            'rows with "turns", "messages" or "conversations"',
            "check the input",
        )
    return Prompts(prompts, unusable, digest.hexdigest())


def regenerate(settings: RegenerateSettings) -> int:
    """Answer every prompt that settings.out has no row for; returns the number of rows in it.

    Raises ServerError or DataError, with all good rows kept, if any row has no answer in the end; each is named.
    """
    prompts = read_prompts(settings.inputs, split=settings.split, limit=settings.limit)
    with logging_redirect_tqdm():
        return asyncio.run(_regenerate(settings, prompts))


async def _regenerate(settings: RegenerateSettings, prompts: Prompts) -> int:
    async with ChatServer(
        settings.base_url,
        concurrency=settings.concurrency,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        thinking={"server": None, "on": True, "off": False}[settings.thinking],
        timeout_s=settings.timeout_s,
        retries=settings.retries,
    ) as server:
        model = settings.model or await server.only_model()
        manifest = Manifest(
            model=model, input_sha256=prompts.sha256, version=__version__, **settings.model_dump(include=_MANIFESTED)
        )
        with AnswerFile(settings.out, manifest) as file:
            todo = [prompt for prompt in prompts.prompts if prompt.id not in file.done]
            with Progress(len(prompts.prompts), len(prompts.prompts) - len(todo)) as progress:
                run = _Run(server, model, settings.seed, file, progress)
                await run.ask(todo, settings.concurrency)
            _require_all(run.failed, prompts.unusable, settings.out)
            return len(file.done)


_MANIFESTED = {"temperature", "max_tokens", "seed", "thinking"}


class _Run:
    """Workers that share what is to do, what failed, and how many rows in a row the server has failed."""

    def __init__(self, server: ChatServer, model: str, seed: int, file: AnswerFile, progress: Progress) -> None:
        self.failed: dict[str, str] = {}
        self._server = server
        self._model = model
        self._seed = seed
        self._file = file
        self._progress = progress
        self._faults_in_a_row = 0

    async def ask(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        todo = iter(prompts)
        await together(self._work(todo) for _ in range(min(concurrency, len(prompts))))

    async def _work(self, todo: Iterator[Prompt]) -> None:
        for prompt in todo:
            try:
                row = await self._row(prompt)
            except AnswerError as error:
                self.failed[prompt.id] = str(error)
                log.error("row %s failed: %s", prompt.id, error)
                self._faults_in_a_row += error.server
                if self._faults_in_a_row >= GIVE_UP_AFTER:
                    raise ServerError(
                        f"{self._faults_in_a_row} rows in a row without an answer, the last one {prompt.id}: {error}",
                        "a server that answers",
                        f"start it, then run the same command again: the {len(self._file.done)} rows in "
                        f"{self._file.path} are kept",
                    ) from error
            else:
                self._faults_in_a_row = 0
                self._file.append(row)
                self._progress.row()

    async def _row(self, prompt: Prompt) -> dict[str, Any]:
        """All turns of one prompt. Raises AnswerError."""
        messages: list[Message] = []
        answers: list[Answer] = []
        for turn, said in enumerate(prompt.turns):
            messages += said
            answer = await self._server.answer(self._model, messages, seed_of(self._seed, prompt.id, turn))
            answers.append(answer)
            messages = [*messages, {"role": "assistant", "content": answer.text}]
            self._progress.tokens(answer.tokens)
        last = answers[-1]
        if last.reasoning:
            messages[-1]["reasoning_content"] = last.reasoning
        row: dict[str, Any] = {"id": prompt.id, "messages": messages, "finish_reason": last.finish_reason}
        if len(answers) > 1:
            row["finish_reasons"] = [answer.finish_reason for answer in answers]
        if last.prompt_ids and last.response_ids:
            row |= {"prompt_ids": last.prompt_ids, "response_ids": last.response_ids}
        return row


async def together(workers: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all of them; the first that raises ends the others, and its error is raised."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Progress:
    """A bar of rows with tokens a second and the time left; tokens of turns whose row is not finished count."""

    def __init__(self, rows: int, done: int) -> None:
        self._bar = tqdm(total=rows, initial=done, unit="row", dynamic_ncols=True, smoothing=0.05)
        self._tokens = 0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tokens(self, count: int) -> None:
        self._tokens += count
        rate = self._tokens / max(time.monotonic() - self._started, 1e-3)
        self._bar.set_postfix_str(f"{self._tokens} tokens, {rate:.0f} tokens/s", refresh=False)

    def row(self) -> None:
        self._bar.update()


def seed_of(seed: int, id: str, turn: int) -> int:
    """A stream of its own for every request, the same one in a resumed run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}/{turn}".encode()).digest()[:4]) >> 1


def _require_all(failed: dict[str, str], unusable: dict[str, list[str]], out: Path) -> None:
    """Nothing is missing from the output, or it is named."""
    if failed:
        reasons = grouped((reason, id) for id, reason in failed.items())
        also = f"; of the input cannot be asked: {_listed(unusable)}" if unusable else ""
        raise ServerError(
            f"{len(failed)} rows failed: {_listed(reasons)}{also}",
            f"an answer for every row (the others are in {out})",
            "run the same command again: it asks only what is missing; take rows out that the server refuses again",
        )
    if unusable:
        raise DataError(
            f"{sum(map(len, unusable.values()))} rows cannot be asked: {_listed(unusable)}",
            f"prompts alone (the answers to the others are in {out})",
            "mend the rows, or train without them",
        )


def _listed(rows: dict[str, list[str]]) -> str:
    return "; ".join(f"{reason}: {named(names)}" for reason, names in rows.items())
