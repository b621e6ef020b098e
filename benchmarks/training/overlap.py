"""Find benchmark prompts that training prompts repeat or nearly repeat. A drafter must not be measured on them.

A run is `words` successive words of a prompt, in lower case and without punctuation. A prompt's overlap is the largest
share of its runs that one training prompt has too. Runs that more than a tenth of a task's prompts share are the task's
wording and do not count. A prompt without other runs counts only if it is identical to a training prompt.

Rows of token ids alone, as recordings have, are read with the target's tokenizer. Their words are those of the whole
rendered prompt, so that a benchmark prompt without a run of words is not found in them.

Of a prompt of several turns, each turn of `words` words or more is looked at as well as all turns together, and the
largest overlap counts.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from benchmarks.harness.config import CommandConfig, Names
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.sources.prompt import Prompt, TokenIds
from benchmarks.harness.sources.recordings import ids_of
from benchmarks.harness.tasks import resolve, select
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.reports.numbers import number
from sglang_auf.errors import DataError
from sglang_auf.recording.manifest import require_target
from sglang_auf.training.text.chats import chat_of
from sglang_auf.training.text.messages import texts
from sglang_auf.training.text.rows import BadRow, ChatRow, grouped, named, read_rows

logger = logging.getLogger(__name__)

Words = tuple[str, ...]

WORD = re.compile(r"\w+")
OF_THE_TASK = 0.1
NO_TOKENIZER = "token ids alone, whose words the target's tokenizer says"


class OverlapConfig(CommandConfig):
    """Benchmark prompts that the prompts of training data repeat, or nearly do."""

    training: tuple[str, ...] = Field(min_length=1, description="file, folder or hub data set; may be repeated")
    target: str | None = Field(
        None,
        description="directory, hub id or prepared name; its tokenizer reads rows of token ids (recordings)",
    )
    tasks: Names = Field(("paper",), description="comma-separated tasks or groups (paper, sample)")
    limit: int | None = Field(None, ge=1, description="at most this many prompts of each task")
    data_dir: Path | None = Field(None, description="read <task>.jsonl from here instead of the hub")
    words: int = Field(8, ge=1, description="words of a run that two prompts may have in common")
    share: float = Field(0.5, gt=0, le=1, description="overlap from which on a prompt is named")
    out: Path = Field(Path("runs/overlap"), description="result directory; earlier results are replaced")


class Near(StrictModel):
    """A benchmark prompt and the training prompt nearest to it. overlap: share of runs, 1 where all is equal."""

    prompt: str
    training_row: str
    overlap: float


class TaskOverlap(StrictModel):
    """identical: prompts of which all, or a turn, is a training prompt word for word.

    near: overlap `share` or more, largest first.
    """

    task: str
    prompts: int
    identical: int
    near: list[Near]
    nearest: Near | None


class OverlapReport(Measured, Report):
    """overlap.json. training_prompts: how many rows say what no row before them says."""

    STEM: ClassVar[str] = "overlap"

    config: OverlapConfig
    training_prompts: int
    tasks: list[TaskOverlap]

    @property
    def passed(self) -> bool:
        return not any(task.identical or task.near for task in self.tasks)

    def markdown(self) -> str:
        config = self.config
        rows = [["task", "prompts", "identical", f"overlap {config.share:g} or more", "largest overlap"]]
        for each in self.tasks:
            largest = number(each.nearest.overlap if each.nearest else 0.0)
            rows.append([each.task, str(each.prompts), str(each.identical), str(len(each.near)), largest])
        asked = (
            f"{self.training_prompts} training prompts; overlap: the largest share of a benchmark prompt's runs of "
            f"{config.words} words that one of them holds"
        )
        lines = [
            f"- {each.task}: {near.prompt} and {near.training_row}, {near.overlap:.2f}"
            for each in self.tasks
            for near in each.near
        ]
        return markdown_document(self, asked, markdown_table(rows), "\n".join(lines))


def measure_overlap(config: OverlapConfig) -> OverlapReport:
    """Raises DataError for training data without a user's words, TargetError for a target that is not here."""
    text_of = None if config.target is None else _decoder(config.target, config.training)
    training = training_prompts(config.training, text_of)
    holders = holders_of_runs(training, config.words)
    return OverlapReport(
        config=config,
        training_prompts=len(set(training.values())),
        tasks=[
            task_overlap(task.name, select(task, config.data_dir, config.limit).prompts, training, holders, config)
            for task in resolve(config.tasks)
        ],
    )


def training_prompts(sources: Sequence[str], text_of: Callable[[TokenIds], str] | None = None) -> dict[Words, str]:
    """Words of all the user's turns in a row, and of each of them -> name of the row. Faulty rows are logged.

    text_of: of a prompt of token ids.
    """
    found: dict[Words, str] = {}
    faults: list[tuple[str, str]] = []
    for row in read_rows(list(sources), hashlib.sha256()):
        try:
            turns = _turns(row, text_of)
        except BadRow as fault:
            faults.append((str(fault), row.name))
        else:
            for said in (" ".join(turns), *turns):
                found.setdefault(_words(said), row.name)  # so that what a row says stands together
    left_out = grouped(faults)
    for reason, rows in left_out.items():
        logger.warning("%d rows left out, %s: %s", len(rows), reason, named(rows))
    found.pop((), None)
    if not found:
        reasons = "; ".join(f"{reason}: {named(rows)}" for reason, rows in left_out.items())
        raise DataError(
            f"no user's words in {', '.join(sources)} ({reasons or 'no rows'})",
            "rows of conversations, or of token ids and their target",
            "name the target of the token ids with --target" if NO_TOKENIZER in left_out else "",
        )
    return found


def _turns(row: ChatRow, text_of: Callable[[TokenIds], str] | None) -> list[str]:
    """What a user says in a row, turn by turn. Raises BadRow."""
    if row.fault is not None:
        raise BadRow(row.fault)
    ids = ids_of(row.fields)
    if ids is None:
        users = [message for message in chat_of(row.fields).messages if message["role"] == "user"]
        return [" ".join(texts(message)) for message in users]
    if text_of is None:
        raise BadRow(NO_TOKENIZER)
    return [text_of(ids)]


def _decoder(target: str, sources: Sequence[str]) -> Callable[[TokenIds], str]:
    """Raises TargetError, and DataError for a recording of another target."""
    from transformers import AutoTokenizer

    from sglang_auf.training.data.features import find_target

    place = find_target(target)
    require_target(sources, place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    known = len(tokenizer)

    def decoded(ids: TokenIds) -> str:
        if unknown := [token for token in ids if token >= known]:
            raise BadRow(f"token id {unknown[0]}, outside the vocabulary of {known}")
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return decoded


def holders_of_runs(training: Mapping[Words, str], length: int) -> dict[Words, list[str]]:
    """Run of `length` words -> rows that have it."""
    holders: defaultdict[Words, list[str]] = defaultdict(list)
    for words, row in training.items():
        for run in _runs(words, length):
            if holders[run][-1:] != [row]:  # of its turns together, and of one of them
                holders[run].append(row)
    return holders


def task_overlap(
    task: str,
    prompts: Sequence[Prompt],
    training: Mapping[Words, str],
    holders: Mapping[Words, Sequence[str]],
    config: OverlapConfig,
) -> TaskOverlap:
    """training, holders: from training_prompts and holders_of_runs."""
    parts = {prompt.id: _parts(prompt, config.words) for prompt in prompts}
    shared = Counter(run for whole, *_ in parts.values() for run in _runs(whole, config.words))
    common = {run for run, count in shared.items() if count > max(1, OF_THE_TASK * len(prompts))}
    found = []
    for prompt, (whole, *turns) in parts.items():
        nearest: list[Near] = []
        for words in (whole, *turns):
            own = _runs(words, config.words) - common
            held = Counter(row for run in own for row in holders.get(run, ()))
            if words in training:
                nearest.append(Near(prompt=prompt, training_row=training[words], overlap=1.0))
            elif held:
                row, count = held.most_common(1)[0]
                nearest.append(Near(prompt=prompt, training_row=row, overlap=count / len(own)))
        if nearest:
            found.append(max(nearest, key=lambda near: near.overlap))
    found.sort(key=lambda near: -near.overlap)
    return TaskOverlap(
        task=task,
        prompts=len(prompts),
        identical=sum(any(words in training for words in some) for some in parts.values()),
        near=[near for near in found if near.overlap >= config.share],
        nearest=found[0] if found else None,
    )


def _parts(prompt: Prompt, length: int) -> list[Words]:
    """The words of a prompt, and those of each turn that has a run: "Explain it again." is in all training data."""
    turns = [_words(text) for text in prompt.turn_texts] if len(prompt.turns) > 1 else []
    return [_words(prompt.text), *(words for words in turns if len(words) >= length)]


def _words(text: str) -> Words:
    return tuple(WORD.findall(text.lower()))


def _runs(words: Words, length: int) -> set[Words]:
    return {words[start : start + length] for start in range(len(words) - length + 1)}
