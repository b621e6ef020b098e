"""The benchmark tasks: where the rows come from, how a row becomes a prompt, and which rows are asked.

The six tasks of Spec-AUF (arXiv 2607.01893): GSM8K 200, MATH-500 200, HumanEval 164, MBPP 200, MT-Bench 80 of two
turns, Alpaca 200. The paper does not say how its 200 were chosen nor which Alpaca it used. This benchmark shuffles the
rows in file order by `random.Random(42)` and asks the first ones, as the public DFlash scripts do. Its Alpaca is the
instruction set of AlpacaEval. A limit takes the head of the same order, so a small run is part of a large one.

Other public sets are in the group `more`: AIME 2024 and 2025, the newest part of LiveCodeBench, Arena-Hard v0.1. A
user's own file is a task too (sources/files.py).

A task's version grows whenever its prompts change. Figures compare only where versions are the same.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from pydantic import Field

from benchmarks.harness.results import StrictModel
from benchmarks.harness.sources.hub import HubFile, Row, read_hub_rows
from benchmarks.harness.sources.prompt import Prompt, TokenIds, group_of
from benchmarks.harness.sources.task_files import read_task_rows
from sglang_auf.errors import ConfigError, DataError

SELECTION_SEED = 42
SAMPLE_FILE = Path(__file__).parent / "data" / "sample.jsonl"


@dataclass(frozen=True, slots=True)
class Task:
    """count: number of prompts asked. source: None for a task of SAMPLE_FILE. turns: hub row -> user turns.

    row_id: the column of a hub row that identifies it; None: the row's index does. group: the field of a row that is
    its prompt's group, where the row has it.
    """

    name: str
    count: int
    version: int = 1
    source: HubFile | None = None
    turns: Callable[[Row], Sequence[str]] | None = None
    row_id: str | None = None
    group: str | None = None


def _boxed(question: str) -> str:
    return f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def _python(problem: str) -> str:
    return (
        f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{problem}\n```"
    )


def _contest(problem: str, starter: str | None) -> str:
    ends = f"Begin with this code:\n```python\n{starter}\n```" if starter else "Read from stdin and write to stdout."
    return f"Write a Python program that solves this problem.\n\n{problem}\n\n{ends}"


PAPER_TASKS = (
    Task(
        "gsm8k",
        200,
        source=HubFile("openai/gsm8k", "main/test-00000-of-00001.parquet", "740312add88f781978c0658806c59bc2815b9866"),
        turns=lambda row: [_boxed(row["question"])],
    ),
    Task(
        "math500",
        200,
        source=HubFile("HuggingFaceH4/MATH-500", "test.jsonl", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
        turns=lambda row: [_boxed(row["problem"])],
    ),
    Task(
        "humaneval",
        164,
        source=HubFile(
            "openai/openai_humaneval",
            "openai_humaneval/test-00000-of-00001.parquet",
            "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ),
        turns=lambda row: [_python(row["prompt"])],
    ),
    Task(
        "mbpp",
        200,
        source=HubFile(
            "google-research-datasets/mbpp",
            "sanitized/test-00000-of-00001.parquet",
            "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        ),
        turns=lambda row: [row["prompt"]],
    ),
    Task(
        "mt_bench",
        80,
        # No commit of this repository could be verified. Every run records the commit that "main" was.
        source=HubFile("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", "main"),
        turns=lambda row: row["turns"],
        row_id="question_id",
        group="category",
    ),
    Task(
        "alpaca",
        200,
        source=HubFile("tatsu-lab/alpaca_eval", "alpaca_eval.json", "0cd24d711fe90d0c1aae5bde03fe98ee48ae52f8"),
        turns=lambda row: [row["instruction"]],
    ),
)

MORE_TASKS = (
    Task(
        "aime24",
        30,
        source=HubFile(
            "HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
        ),
        turns=lambda row: [_boxed(row["problem"])],
    ),
    Task(
        "aime25",
        30,
        source=HubFile("math-ai/aime25", "test.jsonl", "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
        turns=lambda row: [_boxed(row["problem"])],
    ),
    # The problems that release 6 added. The file is large, since it holds their tests.
    Task(
        "livecodebench",
        100,
        source=HubFile("livecodebench/code_generation_lite", "test6.jsonl", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"),
        turns=lambda row: [_contest(row["question_content"], row.get("starter_code"))],
        row_id="question_id",
    ),
    Task(
        "arena_hard",
        200,
        source=HubFile(
            "lmarena-ai/arena-hard-auto",
            "data/arena-hard-v0.1/question.jsonl",
            "15f3746e21432264ce9b453999bde4f3c946d2e6",
        ),
        turns=lambda row: [row["prompt"]],
        row_id="uid",
    ),
)

# Four prompts of our own in the style of each task. They ship with the code and need no network.
SAMPLE_TASKS = tuple(Task(f"sample_{task.name}", 4) for task in PAPER_TASKS)

_GROUPS = {"paper": PAPER_TASKS, "more": MORE_TASKS, "sample": SAMPLE_TASKS}
TASKS = {task.name: task for tasks in _GROUPS.values() for task in tasks}
GROUPS = {name: [task.name for task in tasks] for name, tasks in _GROUPS.items()}


class PromptFile(StrictModel):
    """A user's own file of prompts. rows: all that are not blank. broken: "FILE:LINE: fault" of those not asked.

    sha256: of the file. without_group: "FILE:LINE" of the rows that are asked and lack the field of --group-by.
    """

    sha256: str
    rows: int
    broken: list[str]
    without_group: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompts of one task that a run asks. origin: where they come from, for the run's record.

    file: the user's own file that the task was made of. recording: the directory of the recording that it is of.
    """

    task: Task
    prompts: tuple[Prompt, ...]
    origin: str
    file: PromptFile | None = None
    recording: Path | None = None

    @property
    def token_ids(self) -> int:
        """How many of the prompts are token ids."""
        return sum(isinstance(prompt.continued, TokenIds) for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Digest of what is asked, in order. Equal digests mean the same questions."""
        asked = [
            [prompt.id, prompt.turns, *([prompt.request, prompt.raw] if prompt.request or prompt.raw else [])]
            for prompt in self.prompts
        ]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def resolve(names: Iterable[str]) -> list[Task]:
    """The tasks of these task and group names, in order, each once. Raises ConfigError for an unknown name."""
    expanded = [member for name in names for member in GROUPS.get(name, [name])]
    for name in expanded:
        if name not in TASKS:
            raise ConfigError(
                f"task {name!r}",
                "one of " + ", ".join([*GROUPS, *TASKS]),
                "name tasks or groups, comma-separated: --tasks gsm8k,mt_bench",
            )
    return [TASKS[name] for name in dict.fromkeys(expanded)]


def select(task: Task, data_dir: Path | None = None, limit: int | None = None, fewer: bool = False) -> Selection:
    """The prompts of one task: the same ones in the same order for the same rows. Raises DataError.

    data_dir: directory of <task>.jsonl files, read instead of the hub. fewer: there may be fewer than are asked for.
    """
    if task.source is None:
        prompts, origin = read_prompts(SAMPLE_FILE, task, sample=True), f"sample file, version {task.version}"
    elif data_dir is not None:
        path = data_dir / f"{task.name}.jsonl"
        prompts, origin = read_prompts(path, task), path.name
    else:
        prompts, origin = _read_hub_prompts(task, task.source)
    wanted = task.count if limit is None else min(task.count, limit)
    if len(prompts) < wanted and not fewer:
        raise DataError(
            f"{len(prompts)} prompts for task {task.name} ({origin})",
            f"at least {wanted}",
            f"give the complete data set, or ask fewer with --limit {max(len(prompts), 1)}",
        )
    return Selection(task, head(prompts, wanted), origin)


def head(prompts: Sequence[Prompt], count: int | None) -> tuple[Prompt, ...]:
    """The first `count` prompts in the fixed random order; all where it is None."""
    order = list(range(len(prompts)))
    random.Random(SELECTION_SEED).shuffle(order)
    return tuple(prompts[i] for i in order[:count])


def broken_rows(selections: Iterable[Selection]) -> list[str]:
    """ "FILE:LINE: fault" of the rows of a user's own files that are not asked."""
    return [row for chosen in selections if chosen.file for row in chosen.file.broken]


def first_turns(selections: Iterable[Selection]) -> list[Selection]:
    """The same prompts with their first turn only. The history of a later turn holds the model's own answers."""
    return [
        replace(chosen, prompts=tuple(replace(prompt, turns=prompt.turns[:1]) for prompt in chosen.prompts))
        for chosen in selections
    ]


def in_turn(selections: Iterable[Selection]) -> list[Prompt]:
    """The prompts with the tasks taking turns, so that the head of the list has prompts of every task."""
    rows = zip_longest(*(chosen.prompts for chosen in selections))
    return [prompt for row in rows for prompt in row if prompt is not None]


def keep(selections: Iterable[Selection], prompts: Iterable[Prompt]) -> list[Selection]:
    """The selections with only these prompts. A task that has none of them is left out."""
    wanted = set(prompts)
    kept = [replace(chosen, prompts=tuple(p for p in chosen.prompts if p in wanted)) for chosen in selections]
    return [chosen for chosen in kept if chosen.prompts]


def read_prompts(path: Path, task: Task, sample: bool = False) -> list[Prompt]:
    """The prompts of a file <task>.jsonl (sources/task_files.py), as they are sent. Raises DataError."""
    rows = read_task_rows(path, task.name, sample)
    return [Prompt(task.name, row["id"], tuple(row["turns"]), group=_group(task, row)) for row in rows]


def _read_hub_prompts(task: Task, source: HubFile) -> tuple[list[Prompt], str]:
    assert task.turns is not None
    rows, commit = read_hub_rows(source)
    try:
        prompts = [
            Prompt(
                task.name,
                f"{task.name}/{row[task.row_id] if task.row_id else index}",
                tuple(task.turns(row)),
                group=_group(task, row),
            )
            for index, row in enumerate(rows)
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"rows of {source.repo}/{source.filename} at {commit} without what the prompt needs ({error!r})",
            "the columns of the pinned revision",
            "clear the hub cache, or read a local copy with --data-dir",
        ) from None
    return prompts, f"{source.repo}/{source.filename}@{commit}"


def _group(task: Task, row: Row) -> str | None:
    return (group_of(row, task.group) or None) if task.group else None
