"""What a step costs; the turns themselves are tested with the tables that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.records import Record
from benchmarks.serving.interleaved import Turns, TurnsConfig, median_of_all, seconds_per_step
from benchmarks.serving.speed import SpeedConfig, SpeedReport
from benchmarks.serving.variants import VariantsConfig, VariantsReport
from sglang_auf.errors import DataError


def record(latency_s: float, tokens: int, histogram: list[int], prompt: str = "p") -> Record:
    return Record(
        task="t",
        prompt_id=prompt,
        turn=0,
        temperature=0,
        completion_tokens=tokens,
        verify_steps=sum(histogram),
        accepted_histogram=histogram,
        started_at=0,
        latency_s=latency_s,
    )


def test_a_step_costs_the_time_after_prefill() -> None:
    def keyed(*records: Record) -> dict[Any, Record]:
        return {one.key: one for one in records}

    prefill = keyed(record(0.5, 1, []), record(1.0, 1, [], "q"))
    plain = keyed(record(2.5, 11, []), record(4.0, 11, [], "q"))
    assert seconds_per_step(plain, prefill) == pytest.approx((2.0 + 3.0) / 20)
    speculating = keyed(record(2.5, 11, [1, 1, 2]), record(4.0, 11, [6, 0, 0], "q"))
    assert seconds_per_step(speculating, prefill) == pytest.approx((2.0 + 3.0) / 10)
    assert seconds_per_step(keyed(record(0.5, 1, [])), prefill) is None


def test_a_round_without_a_value_has_no_median() -> None:
    assert median_of_all([3.0, 1.0, 2.0]) == 2.0
    assert median_of_all([3.0, None, 2.0]) is None
    assert median_of_all([]) is None


def test_tau_is_that_of_all_rounds(tmp_path: Path) -> None:
    """A tree follows the load, so that rounds may differ."""
    turns = Turns(TurnsConfig(profile="toy", tasks=("sample_gsm8k",), out=tmp_path))
    first, second = record(1.0, 5, [2, 1, 0]), record(1.0, 5, [4, 0, 0])
    turns.answers["auf", 1] = [{first.key: first}, {second.key: second}]
    assert turns.tau("auf", 1) == pytest.approx((4 / 3 + 1) / 2)


def test_the_limit_counts_over_all_tasks(data_dir: Path, tmp_path: Path) -> None:
    """Six rows of each of two tasks are enough for ten prompts, and not for fourteen."""
    given = {"profile": "toy", "tasks": "gsm8k,mt_bench", "data_dir": data_dir, "out": tmp_path}
    turns = Turns(TurnsConfig.model_validate(given | {"limit": 10}))
    assert [prompt.task for prompt in turns._prompts[1]] == ["gsm8k", "mt_bench"] * 5
    with pytest.raises(DataError, match="12 prompts of gsm8k, mt_bench; expected: at least 14"):
        Turns(TurnsConfig.model_validate(given | {"limit": 14}))


def test_a_users_own_prompts_replace_the_default_tasks(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n?\n')
    turns = Turns(TurnsConfig(profile="toy", prompts=(file,), out=tmp_path))
    assert turns.tasks == ["mine.jsonl"]
    assert [prompt.turns for prompt in turns.selections[0].prompts] == [("a",)]
    assert turns.broken_rows == ["mine.jsonl:2: broken JSON"]
    both = Turns(TurnsConfig(profile="toy", prompts=(file,), tasks=("sample_gsm8k",), out=tmp_path))
    assert both.tasks == ["sample_gsm8k", "mine.jsonl"]


def test_a_broken_row_is_in_the_reports_and_fails_them(tmp_path: Path) -> None:
    reports: list[Any] = [
        VariantsReport(config=VariantsConfig(profile="toy", variant=["a=1"]), tasks=[], servers={}, rows=[]),
        SpeedReport(
            config=SpeedConfig(profile="toy"),
            tasks=[],
            servers={"auf": {name: None for name in ("drafter", "algorithm", "block_size")} | dict.fromkeys(
                ("target", "model", "device", "dtype", "sglang"), "x"
            )},
            levels=[],
            step_cost=None,
        ),
    ]  # fmt: skip
    for report in reports:
        assert report.passed
        broken = report.model_copy(update={"broken_rows": ["mine.jsonl:2: broken JSON"]})
        assert not broken.passed
        assert "- mine.jsonl:2: broken JSON" in broken.markdown()
