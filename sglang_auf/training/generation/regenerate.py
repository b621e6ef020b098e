"""`sglang-auf regenerate`: the target answers the prompts that a drafter is to be trained on.

A drafter learns to guess what the target says, so it is trained on text of the target. Any OpenAI-compatible server or
router can give it. The turns of a prompt are asked in order, each with the target's own earlier replies, and with the
row's tools and variables of the template. A row counts when it is on disk (output_file.py), so after a kill the same
command continues where it stopped. The first rows may wait for a thought before that (thoughts.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from sglang_auf import __version__
from sglang_auf.errors import DataError, ServerError
from sglang_auf.settings import enable_thinking
from sglang_auf.training.generation.client import Answer, AnswerError, TargetClient
from sglang_auf.training.generation.output_file import OutputFile, OutputManifest
from sglang_auf.training.generation.settings import RegenerateSettings
from sglang_auf.training.generation.thoughts import Thoughts
from sglang_auf.training.generation.workers import GIVE_UP_AFTER, Progress, run_workers, seed_of
from sglang_auf.training.text.chats import Chat, chat_of
from sglang_auf.training.text.messages import Message
from sglang_auf.training.text.rows import BadRow, grouped, named, read_rows

logger = logging.getLogger(__name__)

MANIFESTED = {"temperature", "max_tokens", "seed", "thinking"}
"""Settings that decide the answers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row without answers. turns: the messages that come before each answer of the target, in order.

    chat: the row's tools and variables of the template, without messages.
    """

    id: str
    turns: tuple[tuple[Message, ...], ...]
    chat: Chat

    @classmethod
    def of(cls, id: str, chat: Chat, thinking: bool | None) -> Prompt:
        """Leave answers out; every user message ends a turn. Raises BadRow."""
        chat.require_thinking(thinking)
        turns: list[tuple[Message, ...]] = []
        said: list[Message] = []
        for message in chat.messages:
            if message["role"] in ("tool", "function"):
                raise BadRow(f"a message of role {message['role']!r}: its call is of another answer")
            if message["role"] == "assistant":
                continue
            said.append(message)
            if message["role"] == "user":
                turns.append(tuple(said))
                said = []
        if not turns:
            raise BadRow("no message of a user")
        return cls(id, tuple(turns), replace(chat, messages=[], untrained=frozenset()))


@dataclass(frozen=True, slots=True)
class Prompts:
    """unusable: reason -> names of the rows that cannot be asked.

    sha256: of all rows, also those beyond the limit, and of what is asked for them: a version that asks otherwise does
    not continue a file.
    """

    prompts: list[Prompt]
    unusable: dict[str, list[str]]
    sha256: str


def read_prompts(
    inputs: Sequence[str], *, split: str = "train", limit: int | None = None, thinking: bool | None = None
) -> Prompts:
    """The first `limit` rows of each input; unusable rows count. Raises DataError if all are unusable.

    thinking: what the command asks for; a row that asks for the other mode is unusable.
    """
    digest = hashlib.sha256()
    prompts: list[Prompt] = []
    faults: list[tuple[str, str]] = []
    for row in read_rows(inputs, digest, split=split):
        # Rows beyond the limit count in the digest too, so that a later run may raise the limit.
        asked = limit is None or row.position < limit
        try:
            if row.fault:
                raise BadRow(row.fault)
            prompt = Prompt.of(row.id, chat_of(row.fields), thinking)
        except BadRow as fault:
            if asked:
                faults.append((str(fault), row.name))
        else:
            digest.update(_asked(prompt))
            if asked:
                prompts.append(prompt)
    unusable = grouped(faults)
    if not prompts:
        raise DataError(
            f"no prompt in {', '.join(inputs)} ({_listed(unusable) or 'no rows'})",
            'rows with "turns", "messages", "conversations" or another form that docs/training.md lists',
        )
    return Prompts(prompts, unusable, digest.hexdigest())


def _asked(prompt: Prompt) -> bytes:
    return json.dumps([prompt.id, prompt.turns, prompt.chat.tools, prompt.chat.template_kwargs], default=str).encode()


def regenerate(settings: RegenerateSettings) -> int:
    """Answer every prompt that has no row in settings.out yet, and return the number of rows in that file.

    Rows that cannot be asked are named in a warning before the first question, and left out. Raises DataError if no row
    is left, and ServerError if one has no answer in the end: the error names each, and the answered rows are kept.
    Raises ServerError too where thinking is on and no thought comes.
    """
    thinking = enable_thinking(settings.thinking)
    prompts = read_prompts(settings.inputs, split=settings.split, limit=settings.limit, thinking=thinking)
    if unusable := prompts.unusable:
        count = sum(map(len, unusable.values()))
        logger.warning("%d rows cannot be asked and are left out: %s", count, _listed(unusable))
    with logging_redirect_tqdm():
        return asyncio.run(_regenerate(settings, prompts))


async def _regenerate(settings: RegenerateSettings, prompts: Prompts) -> int:
    async with TargetClient(settings, settings.thinking) as client:
        model = settings.model or await client.only_model()
        manifest = OutputManifest(
            model=model, input_sha256=prompts.sha256, version=__version__, **settings.model_dump(include=MANIFESTED)
        )
        with OutputFile(settings.out, manifest) as file:
            todo = [prompt for prompt in prompts.prompts if prompt.id not in file.done]
            with Progress(len(prompts.prompts), len(prompts.prompts) - len(todo)) as progress:
                workers = _Workers(client, model, settings.seed, enable_thinking(settings.thinking), file, progress)
                await workers.ask(todo, settings.concurrency)
            _require_all(workers.failed, settings.out)
            return len(file.done)


class _Workers:
    """They share the prompts still to ask and the count of server faults in a row. failed: row id -> reason."""

    def __init__(
        self, client: TargetClient, model: str, seed: int, thinking: bool | None, file: OutputFile, progress: Progress
    ) -> None:
        self.failed: dict[str, str] = {}
        self._client = client
        self._model = model
        self._seed = seed
        self._mode = {} if thinking is None else {"enable_thinking": thinking}
        self._file = file
        self._progress = progress
        self._faults_in_a_row = 0
        self._thoughts = Thoughts()

    async def ask(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        todo = iter(prompts)
        await run_workers(self._work(todo) for _ in range(min(concurrency, len(prompts))))
        self._keep(self._thoughts.rest())
        if lacking := self._thoughts.lacking:
            logger.warning(
                "thinking was on, and %d answers came without a thought: %s. Training puts an empty think block before "
                "them. If the target did think, start the server with its reasoning parser, and give another --out",
                len(lacking),
                named(lacking),
            )

    async def _work(self, todo: Iterator[Prompt]) -> None:
        for prompt in todo:
            try:
                row = await self._row(prompt)
            except AnswerError as error:
                self.failed[prompt.id] = str(error)
                logger.error("row %s failed: %s", prompt.id, error)
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
                self._keep(self._thoughts.ready(row))

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._file.append(row)
            self._progress.add_row()

    async def _row(self, prompt: Prompt) -> dict[str, Any]:
        """Ask all turns of one prompt. Raises AnswerError."""
        messages: list[Message] = []
        answers: list[Answer] = []
        for turn, said in enumerate(prompt.turns):
            if answers and answers[-1].tool_calls:
                raise AnswerError("the target calls a tool, and the row has no result for it", server=False)
            messages += said
            chat = replace(prompt.chat, messages=messages)
            answer = await self._client.answer(self._model, chat, seed_of(self._seed, prompt.id, turn))
            answers.append(answer)
            messages = [*messages, {"role": "assistant", "content": answer.text}]
            self._progress.add_tokens(answer.tokens)
        last = answers[-1]
        if last.reasoning:
            messages[-1]["reasoning_content"] = last.reasoning
        if last.tool_calls:
            messages[-1]["tool_calls"] = last.tool_calls
        row: dict[str, Any] = {"id": prompt.id, "messages": messages, "finish_reason": last.finish_reason}
        if prompt.chat.tools:
            row["tools"] = prompt.chat.tools
        if kwargs := {**prompt.chat.template_kwargs, **self._mode}:
            row["chat_template_kwargs"] = kwargs
        if len(answers) > 1:
            row["finish_reasons"] = [answer.finish_reason for answer in answers]
        if last.prompt_ids and last.response_ids:
            row |= {"prompt_ids": last.prompt_ids, "response_ids": last.response_ids}
        return row


def _require_all(failed: dict[str, str], out: Path) -> None:
    """Raise ServerError that names every row without an answer, if there is one."""
    if failed:
        reasons = grouped((reason, id) for id, reason in failed.items())
        raise ServerError(
            f"{len(failed)} rows failed: {_listed(reasons)}",
            f"an answer for every row (the others are in {out})",
            "run the same command again: it asks only what is missing; remove rows that the server refuses again",
        )


def _listed(rows: dict[str, list[str]]) -> str:
    return "; ".join(f"{reason}: {named(names)}" for reason, names in rows.items())
