"""The demo's training prompts are distinct, repeatable, and none of the measured ones."""

from __future__ import annotations

from benchmarks.harness.tasks import resolve, select
from benchmarks.harness.template_prompts import demo_prompts


def test_prompts_are_distinct_and_repeatable() -> None:
    rows = demo_prompts(160)
    assert len({row["id"] for row in rows}) == len({str(row["turns"]) for row in rows}) == 160
    assert rows == demo_prompts(160)
    assert rows[:40] == demo_prompts(40)


def test_no_measured_prompt_is_trained_on() -> None:
    prompts = [prompt for task in resolve(("sample",)) for prompt in select(task, None, None).prompts]
    measured = {turn for prompt in prompts for turn in prompt.turns}
    trained = {turn for row in demo_prompts(160) for turn in row["turns"]}  # type: ignore[attr-defined]
    assert measured and not measured & trained
