from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import tasks
from benchmarks.harness.sources.hub import HubFile
from benchmarks.harness.sources.prompt import NO_GROUP, Prompt, group_of
from benchmarks.harness.tasks import GROUPS, TASKS, resolve, select
from sglang_auf.errors import ConfigError, DataError

PAPER = {"gsm8k": 200, "math500": 200, "humaneval": 164, "mbpp": 200, "mt_bench": 80, "alpaca": 200}
HUB_ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "A"}, "gsm8k/0", ("Q?\nPlease reason step by step, and put your final "
                                                             "answer within \\boxed{}.",)),
    "math500": ({"problem": "P", "solution": "S"}, "math500/0", ("P\nPlease reason step by step, and put your final "
                                                                 "answer within \\boxed{}.",)),
    "humaneval": ({"prompt": "def f():\n"}, "humaneval/0", ("Write a solution to the following problem and make sure "
                                                            "that it passes the tests:\n```python\ndef f():\n\n```",)),
    "mbpp": ({"prompt": "Write f.", "code": "x"}, "mbpp/0", ("Write f.",)),
    "mt_bench": ({"question_id": 81, "turns": ["one", "two"]}, "mt_bench/81", ("one", "two")),
    "alpaca": ({"instruction": "Do it.", "output": "x"}, "alpaca/0", ("Do it.",)),
    "aime24": ({"id": 60, "problem": "P", "answer": "204"}, "aime24/0", ("P\nPlease reason step by step, and put your "
                                                                       "final answer within \\boxed{}.",)),
    "aime25": ({"id": "0", "problem": "P", "answer": "70"}, "aime25/0", ("P\nPlease reason step by step, and put your "
                                                                       "final answer within \\boxed{}.",)),
    "livecodebench": ({"question_id": "abc387_c", "question_content": "P", "starter_code": ""},
                      "livecodebench/abc387_c", ("Write a Python program that solves this problem.\n\nP\n\n"
                                                 "Read from stdin and write to stdout.",)),
    "arena_hard": ({"uid": "2edb", "prompt": "Do it.", "cluster": "x"}, "arena_hard/2edb", ("Do it.",)),
}  # fmt: skip


def write_lines(folder: Path, *lines: str, name: str = "gsm8k") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def many(folder: Path, count: int) -> Path:
    return write_lines(folder, *(f'{{"id": "g/{i}", "turns": ["sum {i}"]}}' for i in range(count)))


def test_the_six_tasks_of_the_paper() -> None:
    assert {task.name: task.count for task in resolve(["paper"])} == PAPER


def test_groups_and_names_mix_without_repeats() -> None:
    assert [task.name for task in resolve(["mbpp", "paper", "mbpp"])][:2] == ["mbpp", "gsm8k"]
    assert len(resolve(["paper", "sample"])) == 12


def test_unknown_task_is_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"gsm9k.*gsm8k"):
        resolve(["gsm9k"])


def test_selection_is_the_head_of_a_fixed_shuffle(tmp_path: Path) -> None:
    many(tmp_path, 1319)
    order = [f"g/{i}" for i in range(1319)]
    random.Random(42).shuffle(order)
    chosen = select(TASKS["gsm8k"], tmp_path)
    assert [prompt.id for prompt in chosen.prompts] == order[:200]
    assert chosen.sha256 == select(TASKS["gsm8k"], tmp_path).sha256


def test_a_limit_takes_the_head_of_the_same_order(tmp_path: Path) -> None:
    many(tmp_path, 300)
    whole, part = select(TASKS["gsm8k"], tmp_path), select(TASKS["gsm8k"], tmp_path, limit=7)
    assert part.prompts == whole.prompts[:7]
    assert part.sha256 != whole.sha256


def test_digest_follows_the_text_of_a_prompt(tmp_path: Path) -> None:
    write_lines(tmp_path, '{"id": "a", "turns": ["x"]}')
    before = select(TASKS["gsm8k"], tmp_path, limit=1).sha256
    write_lines(tmp_path, '{"id": "a", "turns": ["y"]}')
    assert select(TASKS["gsm8k"], tmp_path, limit=1).sha256 != before


def test_the_sample_needs_nothing_but_the_checkout() -> None:
    chosen = [select(task) for task in resolve(["sample"])]
    prompts = [prompt for selection in chosen for prompt in selection.prompts]
    assert [len(selection.prompts) for selection in chosen] == [4] * 6
    assert len({prompt.id for prompt in prompts}) == len({prompt.turns for prompt in prompts}) == 24
    two_turns = {prompt.task for prompt in prompts if len(prompt.turns) == 2}
    assert two_turns == {"sample_mt_bench"}


@pytest.mark.parametrize("name", GROUPS["paper"] + GROUPS["more"])
def test_hub_rows_become_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prompt_id, turns = HUB_ROWS[name]

    def rows(source: HubFile) -> tuple[list[dict[str, Any]], str]:
        assert source == TASKS[name].source
        return [row], "abc123"

    monkeypatch.setattr(tasks, "read_hub_rows", rows)
    chosen = select(TASKS[name], limit=1)
    assert (chosen.prompts[0].id, chosen.prompts[0].turns) == (prompt_id, turns)
    assert chosen.origin.endswith("@abc123")


def test_every_further_set_is_pinned_to_a_commit() -> None:
    sources = [task.source for task in resolve(["more"])]
    assert all(source is not None and len(source.revision) == 40 for source in sources)
    assert not set(GROUPS["more"]) & set(GROUPS["paper"])


def test_a_contest_problem_may_begin_with_code(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"question_id": 1, "question_content": "P", "starter_code": "class A:"}
    monkeypatch.setattr(tasks, "read_hub_rows", lambda source: ([row], "abc123"))
    (turn,) = select(TASKS["livecodebench"], limit=1).prompts[0].turns
    assert turn.endswith("P\n\nBegin with this code:\n```python\nclass A:\n```")  # type: ignore[union-attr]


def test_the_text_of_a_prompt_is_all_that_is_said() -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]
    prompt = Prompt("t", "a", ("one", ({"role": "system", "content": parts}, {"role": "user", "content": "four"})))
    assert prompt.text == "one two three four"


def test_hub_rows_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "read_hub_rows", lambda source: ([{"text": "?"}], "abc123"))
    with pytest.raises(DataError, match=r"question.*--data-dir"):
        select(TASKS["gsm8k"], limit=1)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k\.jsonl.*--data-dir"):
        select(TASKS["gsm8k"], tmp_path / "nowhere")


def test_too_few_rows_are_refused_unless_fewer_are_asked(tmp_path: Path) -> None:
    many(tmp_path, 50)
    with pytest.raises(DataError, match=r"50 prompts.*at least 200.*--limit 50"):
        select(TASKS["gsm8k"], tmp_path)
    assert len(select(TASKS["gsm8k"], tmp_path, limit=50).prompts) == 50


DIGESTS = {
    "sample_gsm8k": "e9997f6530ade5d46a1bb5d2b7127dcb642532d7adcd5d353290490077e309b6",
    "sample_mt_bench": "c99cfbf535926f857ec026343db25a0edbfe1889ffde532ba4022a628a152700",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_stay_what_they_were(name: str) -> None:
    """They say which runs may be resumed and which answers compare, those of earlier versions too."""
    assert select(TASKS[name]).sha256 == DIGESTS[name]


def test_the_category_of_mt_bench_is_its_group_where_the_data_has_it(tmp_path: Path) -> None:
    rows = ['{"id": "a", "turns": ["x"], "category": "writing"}', '{"id": "b", "turns": ["y"]}']
    write_lines(tmp_path, *rows, name="mt_bench")
    write_lines(tmp_path, *rows, name="gsm8k")
    found = {
        name: {prompt.id: prompt.group for prompt in select(TASKS[name], tmp_path, 2).prompts}
        for name in ("mt_bench", "gsm8k")
    }
    assert found == {"mt_bench": {"a": "writing", "b": None}, "gsm8k": {"a": None, "b": None}}


@pytest.mark.parametrize(
    ("value", "group"),
    [
        ("en", "en"), (" two\n words ", "two words"), (3, "3"), (0, "0"), (1.5, "1.5"), (False, "false"),
        (None, NO_GROUP), ("", NO_GROUP), (" ", NO_GROUP), (["en"], NO_GROUP), ({"a": 1}, NO_GROUP),
        ("\ud83d", NO_GROUP),
    ],
)  # fmt: skip
def test_texts_numbers_and_truths_are_groups(value: object, group: str) -> None:
    assert group_of({"language": value}, "language") == group
    assert group_of({}, "language") == NO_GROUP
