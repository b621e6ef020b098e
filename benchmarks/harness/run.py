"""One run: a server that is asked prompts, and a directory with run.json and records.jsonl."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.harness.client import FAILURES, ChatClient, Reply
from benchmarks.harness.config import AskedTasks, PromptSources, RunConfig
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Key, Record, RecordWriter, drop_torn_line, latest, read_records
from benchmarks.harness.server_info import asked_facts, flush_cache, run_warnings, server_facts, wrong_server
from benchmarks.harness.sources.arrivals import due_times, until
from benchmarks.harness.sources.files import select_from_files
from benchmarks.harness.sources.prompt import Prompt, TokenIds, messages_of
from benchmarks.harness.sources.recordings import check_replay, without_unknown_ids
from benchmarks.harness.tasks import Selection, resolve, select
from sglang_auf import ALGORITHM
from sglang_auf.errors import ConfigError, ServerError
from sglang_auf.training.text.messages import Message

logger = logging.getLogger(__name__)

WARMUP_TOKENS = 32
RECORDS, MANIFEST = "records.jsonl", "run.json"


def chosen_prompts(questions: AskedTasks, group_by: str | None = None) -> list[Selection]:
    """The prompts that `questions` names, task by task. Raises ConfigError or DataError.

    group_by: the field of a user's own rows that is the prompt's group.
    """
    return prompts_of(questions, questions.tasks, questions.limit, group_by=group_by)


def prompts_of(
    sources: PromptSources,
    tasks: Sequence[str],
    limit: int | None,
    *,
    fewer: bool = False,
    group_by: str | None = None,
) -> list[Selection]:
    """The prompts of these tasks and groups, and of the user's own files; `limit` of each at most.

    fewer: a task may have fewer rows than are to be asked of it. group_by: as for `chosen_prompts`.
    """
    chosen = [select(task, sources.data_dir, limit, fewer) for task in resolve(tasks)]
    return chosen + select_from_files(
        sources.prompts, raw=sources.raw_prompts, thinking=sources.thinking, limit=limit, group_by=group_by
    )


def ask(
    config: RunConfig,
    selections: list[Selection],
    label: str,
    *,
    prompts: Sequence[Prompt] | None = None,
    resume: bool = False,
) -> BenchmarkRun:
    """Ask all prompts of `selections`, or what is missing of them. Returns the finished run.

    label: of the progress bar. prompts: the same prompts in another order (default: task by task). resume: continue the
    run in config.out if there is one. Raises ConfigError where config.out holds another run, ServerError where the
    server is down or not of the kind that config.plain says, or where its drafter was swapped meanwhile.
    """
    if prompts is None:
        prompts = [prompt for chosen in selections for prompt in chosen.prompts]
    run = BenchmarkRun.begin(config, selections, resume)
    if run.unfinished(prompts):
        run.prepare()
        if config.empty_cache:
            flush_cache(config.base_url, vllm=run.manifest.server.vllm is not None)
        run.ask(prompts, label)
        run.require_same_drafter()
    run.require_tau()
    return run


@dataclass(slots=True)
class BenchmarkRun:
    """A run that can be asked. records: what is known so far, by key; a failure stays until it is asked again.

    left_out: prompts that this server cannot be asked.
    """

    config: RunConfig
    manifest: RunManifest
    records: dict[Key, Record]
    left_out: frozenset[Prompt] = frozenset()

    @classmethod
    def begin(cls, config: RunConfig, selections: list[Selection], resume: bool = False) -> BenchmarkRun:
        """Look at the server and the directory, and write nothing.

        A run in config.out is continued where `resume` is set and its settings are the same. Raises ConfigError
        otherwise, ServerError where the server is down or not of the kind that config.plain says.
        """
        server = asked_facts(config)
        if config.plain != (server.algorithm is None):
            raise wrong_server(config, server, f"a server with speculative_algorithm {server.algorithm}")
        if config.record_steps and server.algorithm != ALGORITHM:
            raise ServerError(
                f"--record-steps, and a server with speculative_algorithm {server.algorithm} at {config.base_url}",
                f"{ALGORITHM}, whose streams say which tokens were drafted",
                "leave --record-steps out",
            )
        unchecked = check_replay(config, server, selections)
        asked = without_unknown_ids(server, selections)
        manifest, path = RunManifest.of(config, server, asked), config.out / MANIFEST
        manifest.warnings = run_warnings(config, server, manifest.rendered) + unchecked
        for warning in manifest.warnings:
            logger.warning("%s", warning)
        records: dict[Key, Record] = {}
        if path.exists():
            if not resume:
                raise ConfigError(f"a run in {config.out}", "an empty directory", "add --resume, or another --out")
            before = RunManifest.read(path)
            before.require_same(manifest, config.out)
            manifest.sessions = before.sessions
            if (config.out / RECORDS).exists():
                records = {record.key: record for record in latest(read_records(config.out / RECORDS))}
        whole, rest = ({prompt for chosen in some for prompt in chosen.prompts} for some in (selections, asked))
        return cls(config, manifest, records, frozenset(whole - rest))

    def prepare(self) -> None:
        """Warm up, then make the directory ready for records. A server that is refused leaves nothing behind."""
        asyncio.run(self._warm_up())
        self.config.out.mkdir(parents=True, exist_ok=True)
        if (self.config.out / RECORDS).exists():
            drop_torn_line(self.config.out / RECORDS)
        elif self.manifest.token_ids:
            (self.config.out / RECORDS).touch(0o600)  # they are what users wrote
        self.manifest.begin_session()
        self.manifest.write(self.config.out / MANIFEST)

    def _connect(self) -> ChatClient:
        config, server = self.config, self.manifest.server
        return ChatClient(
            config.base_url,
            server.model,
            config,
            config.stream,
            spans=config.record_steps,
            engine="sglang" if server.sglang else "vllm" if server.vllm else "other",
        )

    def unfinished(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        return [prompt for prompt in prompts if any(self._due(prompt, turn) for turn in range(len(prompt.turns)))]

    def _due(self, prompt: Prompt, turn: int) -> bool:
        record = self.records.get((prompt.task, prompt.id, turn))
        return prompt not in self.left_out and (record is None or record.failed)

    async def _warm_up(self) -> None:
        """Send requests with other prompts, which are not recorded, and check whether the server speculates."""
        count = self.config.warmup_requests
        tokens = min(WARMUP_TOKENS, self.config.max_tokens)
        texts = [f"Count upwards from {number}." for number in range(1, count + 1)]
        asked = [messages_of(text) if self.manifest.rendered else text for text in texts]
        async with self._connect() as client:
            jobs = [client.ask(one, max_tokens=tokens) for one in asked]
            outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        replies = [_answered(outcome) for outcome in outcomes]
        if any(reply.completion_tokens > 1 for reply in replies):
            self._require_kind(reply.verify_steps for reply in replies)
        self._require_same_block({len(reply.histogram) for reply in replies} - {0})

    def _require_same_block(self, said: set[int]) -> None:
        """Of vLLM, whose facts do not say it: a resumed run must go on with as many drafts. Raises ConfigError."""
        kept = {record.block_size for record in self.records.values() if record.block_size}
        if said and kept and said != kept:
            raise ConfigError(
                f"replies with blocks of {sorted(said)} tokens at {self.config.base_url}",
                f"blocks of {sorted(kept)}, as the run in {self.config.out} has them",
                "resume with the run's own server, or start a new run with another --out",
            )

    def _require_kind(self, verify_steps: Iterable[int]) -> None:
        if self.config.plain == any(verify_steps):
            found = "replies with verify steps" if self.config.plain else "no verify step in any reply"
            raise wrong_server(self.config, self.manifest.server, found)

    def require_tau(self) -> None:
        """After the last request: a run without a verify step has no tau. Raises ServerError, as `begin` does."""
        answered = [record for record in self.records.values() if record.completion_tokens > 1 and not record.failed]
        if answered:
            self._require_kind(record.verify_steps for record in answered)

    def require_same_drafter(self) -> None:
        """After the last request: answers of two drafters are no run. Raises ServerError, and run.json names both."""
        begun = self.manifest.server
        if begun.swaps is None:
            return
        now = server_facts(self.config.base_url, self.config.model)
        if now != begun:
            self.manifest.server = begun.model_copy(update={"drafter": f"{begun.drafter}, then {now.drafter}"})
            self.manifest.write(self.config.out / MANIFEST)
            raise ServerError(
                f"drafter {now.drafter} after {now.swaps} swaps at {self.config.base_url}, when all was asked",
                f"drafter {begun.drafter} after {begun.swaps}, as at the beginning",
                f"swap no drafter while a run asks, and start the run in {self.config.out} again in another directory",
            )

    def ask(self, prompts: Sequence[Prompt], label: str) -> None:
        """Ask what is missing of `prompts`, with `concurrency` conversations in flight. label: of the progress bar.

        With a rate no more than these are in flight, each begun when it is due or as soon as there is room.
        Each record is on disk before its conversation continues.
        """
        asyncio.run(self._ask(prompts, label))

    async def _ask(self, prompts: Sequence[Prompt], label: str) -> None:
        queue = zip(self.unfinished(prompts), due_times(self.config.rate, self.config.seed), strict=False)
        total = sum(len(prompt.turns) for prompt in prompts)
        done = sum(not self._due(prompt, turn) for prompt in prompts for turn in range(len(prompt.turns)))
        # disable=None: no bar where standard error is no terminal
        bar = tqdm(total=total, initial=done, desc=label, unit="request", disable=None)

        async def work(client: ChatClient, writer: RecordWriter) -> None:
            for prompt, due in queue:
                await until(due)
                async for record in self._converse(client, prompt, due):
                    writer.write(record)
                    self.records[record.key] = record
                    bar.update()

        with bar, RecordWriter(self.config.out / RECORDS) as writer:
            async with self._connect() as client, asyncio.TaskGroup() as group:
                for _ in range(self.config.concurrency):
                    group.create_task(work(client, writer))

    async def _converse(self, client: ChatClient, prompt: Prompt, due: float | None) -> AsyncIterator[Record]:
        """Records of the turns of one prompt that are missing. Later turns have the model's own answers as history.

        due: when the first of them is; None: now (arrivals.py).
        """
        messages: list[Message] = []
        ended: str | None = None
        for turn, said in enumerate(prompt.turns):
            messages += messages_of(said)
            record = self.records.get((prompt.task, prompt.id, turn))
            if record is None or record.failed:
                if ended is None:
                    record = await self._request(client, prompt, turn, messages, due)
                    due = None
                else:
                    error = f"not asked: turn {ended}"
                    record = self._record(prompt, turn, time.time(), 0.0, error=error)
                yield record
            if record.failed and ended is None:
                ended = f"{turn} of this conversation failed"
            elif record.finish_reason == "tool_calls" and ended is None:
                ended = f"{turn} of this conversation calls a tool, whose result the row does not have"
            messages.append({"role": "assistant", "content": record.output_text})

    async def _request(
        self, client: ChatClient, prompt: Prompt, turn: int, messages: list[Message], due: float | None
    ) -> Record:
        asked = messages if prompt.continued is None else prompt.continued
        sent = time.perf_counter()
        waited_s = None if due is None else sent - due
        begun = sent if due is None else due
        started_at = time.time() - (sent - begun)
        reply, error = None, None
        try:
            reply = await client.ask(asked, self._seed(prompt, turn), prompt.request)
        except FAILURES as failure:
            error = describe(failure)
        latency_s = time.perf_counter() - begun
        if reply is not None and reply.ttft_s is not None:
            reply.ttft_s += sent - begun
        return self._record(prompt, turn, started_at, latency_s, reply, error, waited_s)

    def _seed(self, prompt: Prompt, turn: int) -> int | None:
        """Depends on the prompt and its turn alone, so that filters and concurrency do not change answers."""
        if self.config.temperature == 0:
            return None
        return zlib.crc32(f"{self.config.seed}/{prompt.task}/{prompt.id}/{turn}".encode()) & 0x7FFFFFFF

    def _record(
        self,
        prompt: Prompt,
        turn: int,
        started_at: float,
        latency_s: float,
        reply: Reply | None = None,
        error: str | None = None,
        waited_s: float | None = None,
    ) -> Record:
        reply = reply or Reply()
        return Record(
            task=prompt.task,
            prompt_id=prompt.id,
            turn=turn,
            group=prompt.group,
            seed=self._seed(prompt, turn),
            temperature=self.config.temperature,
            prompt_ids=reply.prompt_ids,
            output_ids=reply.output_ids,
            output_text="" if isinstance(prompt.continued, TokenIds) else reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=reply.completion_tokens,
            verify_steps=reply.verify_steps,
            accepted_histogram=reply.histogram,
            accepted_by_step=reply.accepted_by_step,
            proposed=reply.proposed,
            block_size=len(reply.histogram) or None,
            strict_tools=any(tool["function"].get("strict") for tool in prompt.request.get("tools", ())),
            started_at=started_at,
            ttft_s=reply.ttft_s,
            latency_s=latency_s,
            waited_s=waited_s,
            error=error,
        )


def discard(directory: Path) -> None:
    """Remove the run in a directory, if there is one."""
    for name in (MANIFEST, RECORDS):
        (directory / name).unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _answered(outcome: Reply | BaseException) -> Reply:
    if isinstance(outcome, FAILURES):
        raise ServerError(
            f"a warm-up request failed: {describe(outcome)}", "an answer", "read the server's log"
        ) from outcome
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
