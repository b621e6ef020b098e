"""The benchmark tasks: where the rows come from, how a row becomes a prompt, and which rows are asked.

The six tasks of Spec-AUF (arXiv 2607.01893): GSM8K 200, MATH-500 200, HumanEval 164, MBPP 200, MT-Bench 80 of two
turns, Alpaca 200. The paper does not say how its 200 were chosen nor which Alpaca it used. This benchmark shuffles the
rows in file order by `random.Random(42)` and asks the first ones, as the public DFlash scripts do. Its Alpaca is the
instruction set of AlpacaEval. A limit takes the head of the same order, so a small run is part of a large one.

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
from typing import Any

from sglang_auf.errors import ConfigError, DataError

SELECTION_SEED = 42
SAMPLE_FILE = Path(__file__).parent / "data" / "sample.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hugging Face data set. revision: a commit, or "main" where none could be verified."""

    repo: str
    filename: str
    revision: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation. turns: what the user says; the model's own answers come between them."""

    task: str
    id: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """count: number of prompts asked. source: None for a task of SAMPLE_FILE. turns: hub row -> user turns.

    row_id: the column of a hub row that identifies it; None: the row's index does.
    """

    name: str
    count: int
    version: int = 1
    source: HubFile | None = None
    turns: Callable[[Row], Sequence[str]] | None = None
    row_id: str | None = None


def _boxed(question: str) -> str:
    return f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def _python(problem: str) -> str:
    return (
        f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{problem}\n```"
    )


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
    ),
    Task(
        "alpaca",
        200,
        source=HubFile("tatsu-lab/alpaca_eval", "alpaca_eval.json", "0cd24d711fe90d0c1aae5bde03fe98ee48ae52f8"),
        turns=lambda row: [row["instruction"]],
    ),
)

# Four prompts of our own in the style of each task. They ship with the code and need no network.
SAMPLE_TASKS = tuple(Task(f"sample_{task.name}", 4) for task in PAPER_TASKS)

TASKS = {task.name: task for task in PAPER_TASKS + SAMPLE_TASKS}
GROUPS = {"paper": [task.name for task in PAPER_TASKS], "sample": [task.name for task in SAMPLE_TASKS]}


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompts of one task that a run asks. origin: where they come from, for the run's record."""

    task: Task
    prompts: tuple[Prompt, ...]
    origin: str

    @property
    def sha256(self) -> str:
        """Digest of ids and turns in order. Equal digests mean the same questions."""
        text = json.dumps([[prompt.id, prompt.turns] for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


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


def select(task: Task, data_dir: Path | None = None, limit: int | None = None) -> Selection:
    """The prompts of one task: the same ones in the same order for the same rows. Raises DataError.

    data_dir: directory of <task>.jsonl files, read instead of the hub.
    """
    if task.source is None:
        prompts, origin = read_prompts(SAMPLE_FILE, task.name, sample=True), f"sample file, version {task.version}"
    elif data_dir is not None:
        path = data_dir / f"{task.name}.jsonl"
        prompts, origin = read_prompts(path, task.name), path.name
    else:
        prompts, origin = _read_hub_prompts(task, task.source)
    wanted = task.count if limit is None else min(task.count, limit)
    if len(prompts) < wanted:
        raise DataError(
            f"{len(prompts)} prompts for task {task.name} ({origin})",
            f"at least {wanted}",
            f"give the complete data set, or ask fewer with --limit {max(len(prompts), 1)}",
        )
    order = list(range(len(prompts)))
    random.Random(SELECTION_SEED).shuffle(order)
    return Selection(task, tuple(prompts[i] for i in order[:wanted]), origin)


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


def read_prompts(path: Path, task: str, sample: bool = False) -> list[Prompt]:
    """Prompts, as they are sent, of a JSONL file with rows `{"id": str, "turns": [str, ...]}`. Other keys are ignored.

    sample: the file holds several tasks; take only the rows whose "task" is this one. Raises DataError.
    """
    if not path.is_file():
        raise DataError(
            f"no file {path}",
            f'{task}.jsonl with one {{"id": ..., "turns": [...]}} a line',
            "leave --data-dir out to download from the hub",
        )
    prompts: dict[str, Prompt] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(path, number, line)
            if sample and row.get("task") != task:
                continue
            if row["id"] in prompts:
                raise _bad_row(path, number, f"id {row['id']!r} for the second time")
            prompts[row["id"]] = Prompt(task, row["id"], tuple(row["turns"]))
    return list(prompts.values())


def _parse(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_row(path, number, f"no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise _bad_row(path, number, "no object with a string id")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise _bad_row(path, number, "turns that are no list of non-empty strings")
    return row


def _bad_row(path: Path, number: int, found: str) -> DataError:
    return DataError(f"{found} in {path}, line {number}", '{"id": "...", "turns": ["...", ...]}')


def _read_hub_prompts(task: Task, source: HubFile) -> tuple[list[Prompt], str]:
    assert task.turns is not None
    rows, commit = read_hub_rows(source)
    try:
        prompts = [
            Prompt(task.name, f"{task.name}/{row[task.row_id] if task.row_id else index}", tuple(task.turns(row)))
            for index, row in enumerate(rows)
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"rows of {source.repo}/{source.filename} at {commit} without what the prompt needs ({error!r})",
            "the columns of the pinned revision",
            "clear the hub cache, or read a local copy with --data-dir",
        ) from None
    return prompts, f"{source.repo}/{source.filename}@{commit}"


def read_hub_rows(source: HubFile) -> tuple[list[Row], str]:
    """The rows of a hub file in file order, and the commit that they come from. Raises DataError.

    Not `datasets.load_dataset`, which says nothing of the commit that "main" was, and cannot read a file that only
    the hub's cache has.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(source.repo, source.filename, repo_type="dataset", revision=source.revision))
    except Exception as error:  # the hub client raises its own, requests', httpx' and the system's errors
        raise DataError(
            f"{source.repo}/{source.filename} cannot be fetched: {type(error).__name__}: {error}",
            "a reachable hub, or the file in its cache",
            "give the rows as <task>.jsonl files with --data-dir, or use --tasks sample, which needs no network",
        ) from error
    return _rows_of(path), path.parts[path.parts.index("snapshots") + 1]  # .../snapshots/<commit>/<filename>


def _rows_of(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]
