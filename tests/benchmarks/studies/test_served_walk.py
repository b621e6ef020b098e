"""Served runs against walks of their drafter: runs are made by walking, so what was served is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from benchmarks.cli import main
from benchmarks.harness.config import RunConfig
from benchmarks.harness.manifest import RunManifest, TaskOrigin
from benchmarks.harness.records import Record
from benchmarks.harness.server_info import ServerFacts
from benchmarks.studies.walk import Walker
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.checkpoints.weights import weights_sha256
from tests.benchmarks.studies.test_walk import drafted
from tests.support.tiny_models import VOCABULARY, write_drafter, write_target
from tests.support.training_runs import write_models

Served = Callable[..., str]
BLOCK = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_models(tmp_path_factory.mktemp("served"))[0]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("drafter") / "drafter", BLOCK)


@pytest.fixture(scope="module")
def answers(drafter: Path, target: str) -> list[Record]:
    """Answers of which the drafter drafts about a half: its own tokens, and then some that are not."""
    made = []
    for number in range(12):
        prompt = [5 + (number * 7 + place) % 50 for place in range(4 + number)]
        tokens = [6 + number]
        for step in range(5):
            ours = drafted(drafter, target, prompt + tokens)[: (number + step) % BLOCK]
            tokens = [*tokens, *ours, 5 + (number * 11 + step * 5) % 55]
        made.append(
            Record(
                task="gsm8k" if number % 2 else "mbpp",
                prompt_id=f"p{number}",
                turn=0,
                temperature=0.0,
                prompt_ids=prompt,
                output_ids=tokens,
                prompt_tokens=len(prompt),
                completion_tokens=len(tokens),
                finish_reason="length",
                started_at=0.0,
                latency_s=1.0,
            )
        )
    return made


@pytest.fixture
def served(answers: list[Record], target: str, drafter: Path, tmp_path: Path) -> Served:
    """Writes a run whose server drafted as the walk of `drafter` does: served(server facts, change=of its records)."""

    def make(
        change: Callable[[list[Record]], list[Record]] = lambda records: records,
        trees: Sequence[int] = (),
        config: dict[str, Any] | None = None,
        block_size: int | None = None,
        listed: bool = True,
        of: Path = drafter,
        **facts: Any,
    ) -> str:
        *_, walked = Walker(target, answers, trees).walk(of, block_size=block_size, listed=listed)
        known = {"prompt_ids", "output_ids"}
        records = change(
            [
                record.model_copy(update={name: getattr(given, name) for name in known})
                for record, given in zip(walked, answers, strict=True)
            ]
        )
        server = {
            **{"target": target, "model": "toy", "drafter": str(drafter), "algorithm": "AUF", "block_size": BLOCK},
            **{"device": "cpu", "dtype": "bfloat16", "sglang": "0.5.23", "tree": False},
        }
        out = tmp_path / "run"
        out.mkdir()
        RunManifest(
            config=RunConfig.model_validate({"base_url": "http://127.0.0.1:1", "out": out} | (config or {})),
            server=ServerFacts.model_validate(server | facts),
            tasks={
                "all": TaskOrigin(version=1, origin="a test", prompts=len(records), requests=len(records), sha256="")
            },
            warnings=["the server warns: it rains"],
        ).write(out / "run.json")
        (out / "records.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in records))
        return str(out)

    return make


def walk(run: str, drafter: Path, target: str, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report; {} where none was written."""
    code = main(["walk", run, "--drafter", str(drafter), "--target", target, *more])
    report = Path(run) / "walk.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def test_a_run_that_drafted_as_the_walk_passes(
    served: Served, drafter: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = served()
    code, report = walk(run, drafter, target)
    assert (code, report["ratio"], report["no_verdict"], report["differing"]) == (0, 1.0, "", [])
    assert list(report["figures"]) == ["served", "walked"]
    assert report["figures"]["served"] == report["figures"]["walked"]
    assert report["figures"]["walked"]["micro"]["tau"] > 1.5, "else little would show"
    assert set(report["figures"]["walked"]["tasks"]) == {"gsm8k", "mbpp"}
    printed = capsys.readouterr().out
    assert "Walk passed. The server took 1.0000 of the verify steps" in printed
    assert "| verify steps | steps, served/walked |" in printed, "more steps are a lower tau"
    assert "Every answer took as many verify steps as its walk." in printed
    assert "warning: the server warns: it rains" in printed
    manifest = RunManifest.read(Path(run) / "run.json")
    manifest.warnings = [f"the server warns: {report['warnings'][0]}"]
    manifest.write(Path(run) / "run.json")
    assert walk(run, drafter, target)[1]["warnings"] == manifest.warnings, "nothing is said twice"


def test_other_taps_than_those_that_were_served_fail(
    served: Served, drafter: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, which were trained for layers 1 and 2, walked with 0 and 3."""
    wrong = Path(shutil.copytree(drafter, tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    config["dflash_config"]["target_layer_ids"] = [0, 3]
    (wrong / "config.json").write_text(json.dumps(config))
    code, report = walk(served(), wrong, target)
    assert code == 1
    assert report["ratio"] < 0.9
    assert report["differing"] and all(part["served"] <= part["walked"] for part in report["differing"])
    sizes = [part["walked"] - part["served"] for part in report["differing"]]
    assert sizes == sorted(sizes, reverse=True)
    printed = capsys.readouterr().out
    assert "Walk FAILED" in printed and "target_layer_ids" in printed
    assert f"| {report['differing'][0]['task']} {report['differing'][0]['prompt_id']} |" in printed


def test_other_weights_fail_and_are_named(served: Served, drafter: Path, target: str, tmp_path: Path) -> None:
    other = write_drafter(tmp_path / "other", BLOCK, seed=9)
    code, report = walk(served(weights=weights_sha256(drafter)), other, target)
    assert code == 1
    assert any(warning.startswith("other weights") for warning in report["warnings"])
    assert walk(str(tmp_path / "run"), drafter, target)[1]["warnings"] == [
        warning for warning in report["warnings"] if not warning.startswith("other weights")
    ]


@pytest.mark.parametrize(("share", "code"), [(0.01, 0), (0.05, 1), (-0.05, 1)])
def test_the_ratio_is_of_all_answers(share: float, code: int, served: Served, drafter: Path, target: str) -> None:
    """So many more or fewer steps in one answer, as rounding may make."""

    def change(records: list[Record]) -> list[Record]:
        steps = sum(record.verify_steps for record in records)
        first = max(records, key=lambda record: record.verify_steps)
        more = round(share * steps)
        histogram = list(first.accepted_histogram)
        for _ in range(abs(more)):  # what the tiny models accept depends on the machine's instructions
            histogram[0 if more > 0 else histogram.index(max(histogram))] += 1 if more > 0 else -1
        changed = first.model_copy(
            update={
                "accepted_histogram": histogram,
                "verify_steps": sum(histogram),
                "proposed": sum(histogram) * (BLOCK - 1),
            }
        )
        assert more and sum(histogram)
        return [changed if record is first else record for record in records]

    found, report = walk(served(change), drafter, target)
    assert found == code
    assert report["ratio"] == pytest.approx(1 + share, abs=0.01)
    assert len(report["differing"]) == 1


def test_a_server_with_trees_gets_figures_and_no_verdict(
    served: Served, drafter: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = walk(served(trees=(6,), tree=True, tree_nodes=6), drafter, target)
    assert (code, list(report["figures"])) == (0, ["served", "walked", "walked, tree of 6"])
    assert report["figures"]["served"] == report["figures"]["walked, tree of 6"]
    assert not 0.98 <= report["ratio"] <= 1.02, "else it would pass anyway"
    assert "No verdict: the server verifies trees" in capsys.readouterr().out


def test_trees_that_follow_the_load_are_walked_with_their_mean_size(served: Served, drafter: Path, target: str) -> None:
    _, report = walk(served(trees=(6,), tree=True, tree_nodes=None), drafter, target)
    assert list(report["figures"])[-1] == "walked, tree of 6"


def test_steps_that_drafted_less_have_no_verdict(served: Served, drafter: Path, target: str) -> None:
    def fewer(records: list[Record]) -> list[Record]:
        return [record.model_copy(update={"proposed": record.verify_steps * 3 - 1}) for record in records]

    code, report = walk(served(fewer), drafter, target)
    assert code == 0
    assert report["no_verdict"].startswith("not every verify step drafted 3 tokens")


def test_a_served_block_is_walked(served: Served, drafter: Path, target: str) -> None:
    code, report = walk(served(block_size=3), drafter, target)
    assert (code, report["ratio"]) == (0, 1.0)
    assert any("served and walked with block 3" in warning for warning in report["warnings"])


@pytest.mark.parametrize(("facts", "listed"), [({"draft_vocabulary": 20}, True), ({}, False)])
def test_a_draft_vocabulary_is_walked_as_it_was_served(
    facts: dict[str, Any], listed: bool, served: Served, drafter: Path, target: str, tmp_path: Path
) -> None:
    listing = Path(shutil.copytree(drafter, tmp_path / "listing"))
    write(DraftVocabulary(tokens=tuple(range(5, 45, 2))), listing)
    code, report = walk(served(of=listing, listed=listed, **facts), listing, target)
    assert (code, report["ratio"]) == (0, 1.0)
    assert any("was not used by the server" in warning for warning in report["warnings"]) != listed
    without = walk(str(tmp_path / "run"), drafter, target)
    assert without[0] == (1 if listed else 0)
    assert any("of None tokens, where the server drafted 20" in each for each in without[1]["warnings"]) == listed


def test_a_run_of_vllm_is_walked(served: Served, drafter: Path, target: str) -> None:
    facts = {"sglang": None, "vllm": "0.32.0", "algorithm": "speculative", "block_size": None, "tree": None}
    code, report = walk(served(**facts, drafter=None, device=None, dtype=None), drafter, target)
    assert (code, report["ratio"], report["server"]["block_size"]) == (0, 1.0, BLOCK)


def test_a_target_that_is_not_here_is_said(served: Served, drafter: Path, target: str) -> None:
    code, report = walk(served(target="/elsewhere/toy"), drafter, target)
    assert code == 0
    assert any("/elsewhere/toy, is not on this machine" in warning for warning in report["warnings"])


def test_a_target_of_the_hub_is_found_in_its_cache(
    served: Served,
    drafter: Path,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cached = tmp_path / "cache" / "models--owner--toy"
    shutil.copytree(target, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, report = walk(served(target="owner/toy"), drafter, target)
    assert code == 0
    assert not any("not on this machine" in warning for warning in report["warnings"])
    other = write_target(tmp_path / "other", rope_theta=5000.0)
    assert walk(str(tmp_path / "run"), drafter, str(other))[0] == 2
    assert "the target of the run, owner/toy" in capsys.readouterr().err


def test_failed_and_short_answers_are_counted(
    served: Served, drafter: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(records: list[Record]) -> list[Record]:
        short = {"completion_tokens": 1, "output_ids": [7], "accepted_histogram": [], "verify_steps": 0}
        return [
            records[0].model_copy(update={"error": "500", "output_ids": None}),
            records[1].model_copy(update=short),
            *records[2:],
        ]

    code, report = walk(served(change), drafter, target)
    assert (code, report["failed"], report["short"], report["ratio"]) == (0, 1, 1, 1.0)
    assert "1 requests that failed, 1 answers of one token" in capsys.readouterr().out


def without(**fields: Any) -> Callable[[list[Record]], list[Record]]:
    return lambda records: [record.model_copy(update=fields) for record in records]


@pytest.mark.parametrize(
    ("making", "found"),
    [
        ({"config": {"temperature": 1.0}}, "a run at temperature 1"),
        ({"config": {"plain": True}, "algorithm": None}, "a run of plain decoding"),
        ({"algorithm": "EAGLE"}, "speculative_algorithm EAGLE"),
        ({"change": without(output_ids=None)}, "greedy answers with their token ids"),
        ({"change": without(accepted_histogram=[], verify_steps=0, block_size=None)}, "no answer with a verify step"),
        ({"change": without(prompt_ids=[5, VOCABULARY])}, f"token {VOCABULARY} in the answer"),
        (
            {"change": lambda records: [records[0].model_copy(update={"block_size": 5}), *records[1:]]},
            "blocks of [4, 5]",
        ),
        ({"change": lambda records: [records[0], records[0]]}, "1 of 2 requests"),
    ],
)
def test_what_cannot_be_walked_is_refused(
    making: dict[str, Any], found: str, served: Served, drafter: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert walk(served(**making), drafter, target) == (2, {})
    assert found in capsys.readouterr().err


def test_another_target_is_refused(
    served: Served, drafter: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_target(tmp_path / "other", rope_theta=5000.0)
    assert walk(served(), drafter, str(other)) == (2, {})
    assert "the target of the run" in capsys.readouterr().err
    wide = write_target(tmp_path / "wide", head_dim=32)
    assert walk(str(tmp_path / "run"), drafter, str(wide)) == (2, {})


def test_the_report_may_go_elsewhere(served: Served, drafter: Path, target: str, tmp_path: Path) -> None:
    code, report = walk(served(), drafter, target, "--out", str(tmp_path / "report"))
    assert (code, report) == (0, {})
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"walk.json", "walk.md"}
