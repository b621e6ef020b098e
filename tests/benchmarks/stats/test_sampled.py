"""A run at temperature 1, judged by the odds that a prefill gives its tokens. The target's odds are known exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.cli import main
from benchmarks.harness.records import Record
from benchmarks.stats.prefill import TokenLogprob
from benchmarks.stats.sampled import ANYWHERE, IN_STEPS, LEVEL, RANKS, Draws, Outcome, Sums, step_depths
from tests.benchmarks.conftest import write_rows
from tests.support import known_law
from tests.support.known_law import KnownLaw, Sampler

Start = Callable[..., Any]
Ask = Callable[..., str]

STATISTICS = (*ANYWHERE, *IN_STEPS)
NAMES = [statistic.name for statistic in STATISTICS]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Records a run of 40 prompts with up to 80 tokens each."""
    prompts, out = tmp_path / "mine.jsonl", tmp_path / "run"
    write_rows(prompts, [{"id": f"p{number}", "turns": [f"say {number}"]} for number in range(40)])

    def record(server: Any, *more: str) -> str:
        flags = ["--prompts", str(prompts), "--max-tokens", "80", "--temperature", "1", "--out", str(out)]
        assert main(["run", "--base-url", server.url, *flags, *(more or ["--no-stream"])]) == 0
        return str(out)

    return record


def judge(run: str, url: str, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report; {} where none was written."""
    code = main(["lossless", run, "--base-url", url, *more])
    report = Path(run) / "sampled.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def read(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "records.jsonl").read_text().splitlines()]


def draw_run(sampler: Sampler, seed: int, tokens: int, longest: int = 40) -> list[Outcome]:
    """The statistics of answers with `tokens` tokens or a few more, without a server."""
    law, draws, count = KnownLaw(sampler), Draws(in_steps=True), 0
    while count < tokens:
        answer, steps = law.answer([seed, count], seed=seed * 1_000_000 + count, limit=longest)
        told = [
            TokenLogprob(of_place[0][1], of_place[0][0], tuple(of_place[1:]))
            for of_place in law.told([seed, count], answer, RANKS)
        ]
        draws.add(told, step_depths(recorded(steps), len(answer)))
        count += len(answer)
    return draws.outcomes()


def recorded(steps: list[int] | None) -> Record:
    return Record(
        task="t", prompt_id="p", turn=0, temperature=1.0, started_at=0.0, latency_s=0.0, accepted_by_step=steps
    )


def faults(tested: list[Outcome]) -> set[str]:
    return {one.name for one in tested if one.p is not None and one.p < LEVEL}


def test_a_lossless_run_passes_and_says_what_it_would_have_shown(
    fake: Start, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(law=KnownLaw())
    run = ask(server, "--record-steps")
    code, report = judge(run, server.url, "--concurrency", "4")
    records = read(run)
    tokens = sum(len(record["output_ids"]) for record in records)
    assert code == 0
    assert (report["answers"], report["tokens"], report["failed"], report["unjudged"]) == (40, tokens, 0, [])
    assert [one["name"] for one in report["statistics"]] == NAMES
    first, later = report["statistics"][-2:]
    assert first["tokens"] + later["tokens"] + 40 == tokens, "the first token of an answer belongs to no step"
    assert first["tokens"] == sum(len(record["accepted_by_step"]) for record in records)
    assert all(0 < one["shows"] <= 0.1 for one in report["statistics"][:2])
    asked = {tuple(body["input_ids"]) for body in server.engine.generated}
    assert asked == {(*record["prompt_ids"], *record["output_ids"]) for record in records}
    assert {body["top_logprobs_num"] for body in server.engine.generated} == {RANKS}
    printed = capsys.readouterr().out
    assert f"{tokens} tokens of 40 answers at temperature 1: consistent with draws from the target (passed)" in printed
    assert "which speculates itself (AUF)" in printed
    assert "a lossless run fails once in 1,000" in printed


def test_a_faulty_run_fails_and_names_what_is_off(fake: Start, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    server = fake(law=KnownLaw(known_law.trusts_the_draft))
    code, report = judge(ask(server, "--record-steps"), server.url)
    assert code == 1
    assert any(one["p"] < LEVEL for one in report["statistics"] if one["p"] is not None)
    assert "NOT draws from the target: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sampler", "tokens", "found", "size"),
    [
        (known_law.now_and_then_greedy(0.03), 9000, "most likely token", 0.03),
        (known_law.at_temperature(0.95), 6000, "temperature", 1 / 0.95 - 1),
        (known_law.at_temperature(1.05), 6000, "temperature", 1 / 1.05 - 1),
        (known_law.with_top_k(RANKS), 3000, f"behind rank {RANKS}", -1.0),
        (known_law.forgets_the_residual, 4000, "most likely token", None),
        (known_law.wrong_after_drafts(0.7), 6000, "after accepted drafts", None),
    ],
)
def test_a_faulty_sampler_is_found_in_a_few_thousand_tokens(
    sampler: Sampler, tokens: int, found: str, size: float | None
) -> None:
    """And the size of its fault is estimated, within four times its standard error."""
    tested = draw_run(sampler, 1, tokens)
    assert found in faults(tested)
    (one,) = (one for one in tested if one.name == found)
    assert one.size is not None and one.z is not None
    if size is not None:
        assert abs(one.size - size) < 4 * abs(one.size / one.z) + 0.1 * abs(size)


def test_what_is_wrong_after_drafts_alone_is_found_there_alone() -> None:
    tested = {one.name: one for one in draw_run(known_law.wrong_after_drafts(0.7), 1, 6000)}
    first = tested["first of a step"]
    assert first.p is not None and first.p > 0.01
    assert first.tokens > tested["after accepted drafts"].tokens, "its power is the larger one"


def test_lossless_runs_fail_at_the_nominal_rate() -> None:
    """500 runs of 1,000 tokens in answers that END or their length ends. Each z is standard normal but for skewness.

    The rate is below the level, because the correction for six statistics takes them as unrelated.
    """
    runs, failing = lossless_sums(runs=500, tokens=1000), {0.05: 0, LEVEL: 0}
    for of_run in zip(*runs.values(), strict=True):
        for level in failing:
            p = [sums.outcome(name, len(NAMES), level).p for name, sums in zip(runs, of_run, strict=True)]
            failing[level] += any(one is not None and one < level for one in p)
    assert 8 < failing[0.05] < 36
    assert failing[LEVEL] < 5
    for name, of_runs in runs.items():
        z = np.array([sums.difference / sums.variance**0.5 for sums in of_runs])
        assert abs(z.mean()) < 0.16 and abs(z.std() - 1) < 0.12, name


def lossless_sums(runs: int, tokens: int, longest: int = 40) -> dict[str, list[Sums]]:
    """Statistic -> its sums in each run, drawn by all runs at once. A draft is accepted where it equals the draw."""
    law, dice, all_runs = KnownLaw(), np.random.default_rng(5), np.arange(runs)
    ranked = np.argsort(-law.probabilities, axis=1)
    rank_of = np.minimum(np.argsort(ranked, axis=1), RANKS)
    chances = np.take_along_axis(law.probabilities, ranked[:, :RANKS], axis=1)
    chances = np.column_stack([chances, 1 - chances.sum(axis=1)])
    offs = [each.score(chances) - (chances * each.score(chances)).sum(axis=1, keepdims=True) for each in STATISTICS]
    moments = [[(chances * off**power).sum(axis=1) for power in (2, 3)] for off in offs]
    means = [(chances * each.score(chances)).sum(axis=1) for each in STATISTICS]
    mass = law.probabilities.cumsum(axis=1)
    sums = np.zeros((len(STATISTICS), 5, runs))
    before, age, depth = dice.integers(known_law.VOCABULARY, size=runs), np.zeros(runs, int), np.zeros(runs, int)
    for _ in range(tokens):
        drawn = np.minimum((mass[before] <= dice.random((runs, 1))).sum(axis=1), known_law.VOCABULARY - 1)
        for place, each in enumerate(STATISTICS):
            least, most = each.depths or (0, tokens)
            variance, third = (moment[before] for moment in moments[place])
            unit = means[place][before] if each.relative else variance
            of_token = (np.ones(runs), offs[place][before, rank_of[before, drawn]], variance, third, unit)
            sums[place] += np.stack(of_token) * ((least <= depth) & (depth <= most))
        accepted = (drawn == law.drafts[before]) & (depth > 0) & (depth < law.block)
        depth, age = np.where(accepted, depth + 1, 1), age + 1
        ended = (drawn == known_law.END) | (age == longest)
        before = np.where(ended, dice.integers(known_law.VOCABULARY, size=runs), drawn)
        depth, age = np.where(ended, 0, depth), np.where(ended, 0, age)
    return {
        each.name: [Sums(int(sums[place, 0, run]), *sums[place, 1:, run].tolist()) for run in all_runs]
        for place, each in enumerate(STATISTICS)
    }


def test_answers_of_a_speculating_sampler_are_no_exception() -> None:
    """z of ten runs whose drafts are accepted or rejected one by one: their squares add up to a chi-square."""
    runs = [draw_run(known_law.lossless, seed, 1500) for seed in range(2, 12)]
    for place, name in enumerate(NAMES[:4]):
        squares = sum((of_run[place].z or 0) ** 2 for of_run in runs)
        assert 1e-3 < stats.chi2.sf(squares, len(runs)) < 1 - 1e-3, name


@pytest.mark.parametrize("hits", [25, 30, 40, 50, 58, 70])
def test_p_is_the_binomials_where_all_places_are_alike(hits: int) -> None:
    """400 places whose best token has probability 0.1. Of the count itself half the chance, because it is discrete."""
    others = tuple((float(np.log(0.045)), token) for token in range(1, RANKS))
    top = ((float(np.log(0.1)), 0), *others)
    told = [TokenLogprob(0 if place < hits else 1, 0.0, top) for place in range(400)]
    draws = Draws(in_steps=False)
    draws.add(told, None)
    p = draws.outcomes()[0].p
    law = stats.binom(400, 0.1)
    exact = 2 * min(law.cdf(hits), law.sf(hits - 1)) - law.pmf(hits)
    assert p == pytest.approx(min(1, 4 * exact), rel=0.25)


def test_rounding_of_the_judge_moves_little() -> None:
    """The shift of z by independent errors of 0.05 in all logits, without the noise of draws, is as the module says."""
    law, dice = KnownLaw(), np.random.default_rng(3)
    shifts: dict[str, list[tuple[float, float]]] = {statistic.name: [] for statistic in ANYWHERE}
    for _ in range(40):
        logits = law.logits + 0.05 * dice.normal(size=law.logits.shape)
        judged = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        ranks = np.argsort(-judged, axis=1)[:, :RANKS]
        told, true = (np.take_along_axis(each, ranks, axis=1) for each in (judged, law.probabilities))
        told, true = (np.column_stack([each, 1 - each.sum(axis=1)]) for each in (told, true))
        for statistic in ANYWHERE:
            score = statistic.score(told)
            off = score - (told * score).sum(axis=1, keepdims=True)
            shifts[statistic.name].append((float((true * off).sum(1).mean()), float((told * off**2).sum(1).mean())))
    for name, pairs in shifts.items():
        mean, variance = np.mean(pairs, axis=0)
        assert abs(mean) / variance**0.5 * 20_000**0.5 < 0.2, name


def test_without_recorded_steps_four_statistics_are_tested(fake: Start, ask: Ask) -> None:
    server = fake(law=KnownLaw())
    code, report = judge(ask(server), server.url)
    assert code == 0
    assert [one["name"] for one in report["statistics"]] == NAMES[:4]


def test_few_tokens_say_nothing(fake: Start, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    server = fake(law=KnownLaw())
    code, report = judge(ask(server, "--no-stream", "--limit", "1"), server.url)
    assert code == 1
    assert report["statistics"][0]["p"] is None
    printed = capsys.readouterr().out
    assert "not used" in printed
    (needed,) = re.findall(r"too few to show a fault of 10%, about (\d+) would do \(failed\)", printed)
    enough = draw_run(known_law.lossless, 1, int(1.3 * int(needed)))
    assert all(one.enough for one in enough[:2]), "what the first answer says of later ones is about right"


def test_a_failed_request_does_not_pass(fake: Start, ask: Ask) -> None:
    """Answers may fail because of what was drawn: long ones run out of time."""
    server = fake(law=KnownLaw())
    run = ask(server)
    rows = read(run)
    rows[7] |= {"error": "500", "output_ids": None, "prompt_ids": None}
    write_rows(Path(run) / "records.jsonl", rows)
    code, report = judge(run, server.url)
    assert (code, report["failed"], report["answers"]) == (1, 1, 39)


@pytest.mark.parametrize("flag", ["--worst", "--logit-scale"])
def test_flags_of_a_greedy_run_are_refused(
    flag: str, fake: Start, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(law=KnownLaw())
    assert judge(ask(server), server.url, flag, "3") == (2, {})
    assert f"{flag} with a sampled run" in capsys.readouterr().err


def test_the_depths_of_a_cut_answer() -> None:
    """Steps that accepted 2, 0 and 1 drafts; a stop cut the last one after its draft."""
    depths = step_depths(recorded([2, 0, 1]), 6)
    assert depths is not None
    assert depths.tolist() == [0, 1, 2, 3, 1, 1]
    assert step_depths(recorded(None), 6) is None
