"""A study on the tiny target, with the real trainer and real servers: killed, resumed, reported, reported again."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.cli import main
from benchmarks.studies import run as study_module
from benchmarks.studies.findings import read_results
from benchmarks.studies.records import read_kept
from tests.support.tiny_models import VOCABULARY, write_target

pytestmark = pytest.mark.e2e

TEMPLATE = "w5 {% for message in messages %}{{ message.content }} w6 {% endfor %}"
DICE = random.Random(4)


def words(count: int) -> str:
    return " ".join(f"w{DICE.randrange(8, VOCABULARY)}" for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, recipe.yaml, study.yaml, and data/ with prompts to answer and to measure."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("study")
    target = write_target(place / "target")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(target)

    data = place / "data"
    data.mkdir()
    train = [{"id": f"t{i}", "messages": [{"role": "user", "content": words(6)}]} for i in range(24)]
    tasks = {
        "gsm8k": [{"id": f"g{i}", "turns": [words(5)]} for i in range(3)],
        "mt_bench": [{"id": f"m{i}", "turns": [words(4), words(4)]} for i in range(2)],
    }
    letters = [{"id": f"l{i}", "turns": [words(7)]} for i in range(3)]
    for name, rows in {"train": train, "letters": letters, **tasks}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    recipe = {
        "target": str(target),
        "data": {"max_length": 96, "held_out": 4},
        "drafter": {"num_layers": 1, "target_layer_ids": [1, 3], "block_size": 4, "mask_token_id": 3},
        "objective": {"name": "auf"},
        "optimiser": {"lr": 0.01},
        "schedule": {"epochs": 1},
        "batch": {"batch_tokens": 512, "anchors_per_row": 8},
        "log_every": 1,
        "evaluate_every": 12,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "title": "Tiny study",
        "profile": "smollm2-135m",
        "server_set": [f"target={target}", "server_args.max_total_tokens=4096", "server_args.context_length=256"],
        "target": str(target),
        "recipe": str(place / "recipe.yaml"),
        "cache_features": True,
        "seeds": [1, 2],
        "answers": {"own": {"prompts": ["train.jsonl"], "max_tokens": 24}},
        "arms": {"decay": {"set": ["objective.name=decay"]}, "auf": {}},
        "budgets": {12: ["log_every=1"]},
        "measured": {
            **{"tasks": ["gsm8k", "mt_bench"], "sets": ["letters.jsonl"], "trees": [4]},
            **{"limit": 2, "max_tokens": 24},
        },
        "served": {"arms": ["auf"], "seeds": [2], "temperatures": [0.0]},
        "claims": [{"id": "a", "text": "AUF is better", "arm": "auf", "against": "decay"}],
    }
    (place / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return place


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The study, interrupted once in the middle of its arms."""
    out = folder / "out"
    command = ["study", str(folder / "study.yaml"), "--data-dir", str(folder / "data"), "--out", str(out)]
    walk, calls = study_module._train, 0

    def interrupted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        walk(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "_train", interrupted)
        assert main(command) == 130
    done = [path.stat().st_mtime_ns for path in sorted(out.glob("arms/12/*/drafter/model.safetensors"))]
    assert len(done) == 2
    assert main(command) == 0
    again = sorted(out.glob("arms/12/*/drafter/model.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stat().st_mtime_ns for path in again][:2] == sorted(done)
    assert len(again) == 4
    return out


def test_a_served_drafter_has_the_counts_of_its_walk(finished: Path) -> None:
    """The same answers and drafter give the same steps, except where features are rounded differently.

    Histograms may differ: a server also counts drafts that it accepted and then cut off at the end.
    """
    results = read_results(finished / "records")[12]
    served = {record.key: record for record in results.served["auf", 2, 0.0]}
    walked = {record.key: record for record in results.walked["tau"]["auf", 2]}
    assert served.keys() == walked.keys()
    assert len(served) == 8
    same = sum(served[key].verify_steps == walked[key].verify_steps for key in served)
    assert same >= 7
    for key, record in served.items():
        assert record.completion_tokens == walked[key].completion_tokens


def test_trees_are_walked_over_tasks_and_sets(finished: Path) -> None:
    results = read_results(finished / "records")[12]
    for run, chain in results.walked["tau"].items():
        of_trees = results.walked["tau_tree_4"][run]
        assert [record.key for record in of_trees] == [record.key for record in chain]
        assert {record.acceptance.nodes_per_step for record in of_trees} == {4}
        assert len(results.answers(run, of="letters.jsonl")) == 2
        assert len(results.answers(run)) == 6
    text = (finished / "study.md").read_text()
    assert "## Verdicts by budget" in text and "## Claims on letters.jsonl, 12 steps" in text


def test_arms_with_one_seed_start_alike(finished: Path) -> None:
    """Weights, batches and anchors are equal, so before the first update the same number of slots is right."""
    results = read_results(finished / "records")[12]

    def first(arm: str, seed: int) -> dict[str, Any]:
        return next(row for row in results.training[arm, seed]["metrics"] if row["kind"] == "train")

    for seed in (1, 2):
        decay, auf = first("decay", seed), first("auf", seed)
        assert decay["step"] == auf["step"] == 1
        assert decay["common_accuracy"] == auf["common_accuracy"]
        assert decay["loss"] != auf["loss"]
    assert first("auf", 1)["loss"] != first("auf", 2)["loss"]


def test_records_hold_no_text_and_no_paths(finished: Path, folder: Path) -> None:
    for path in (finished / "records").rglob("*.jsonl.gz"):
        for record in read_kept(path):
            assert record.output_ids is None and record.prompt_ids is None and not record.output_text
    for path in (path for path in (finished / "records").rglob("*") if path.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        own = path.name == "study.yaml"  # says what its author wrote
        assert own or str(folder.parent).encode() not in content, path.name


def test_the_report_is_made_of_the_records_alone(finished: Path, folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    shutil.copytree(finished / "records", elsewhere / "records")
    assert main(["study", str(folder / "study.yaml"), "--out", str(elsewhere), "--report-only"]) == 0
    assert (elsewhere / "study.md").read_text() == (finished / "study.md").read_text()
    assert (elsewhere / "study.html").stat().st_size > 10_000


def test_another_study_does_not_continue_this_one(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = folder / "changed.yaml"
    changed.write_text((folder / "study.yaml").read_text().replace("Tiny study", "Another study"))
    assert main(["study", str(changed), "--data-dir", str(folder / "data"), "--out", str(finished)]) == 2
    assert "another study" in capsys.readouterr().err
    assert main(["study", str(changed), "--out", str(finished), "--report-only"]) == 2


def test_a_report_of_a_study_that_is_not_done_says_so(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    part = folder / "part"
    shutil.copytree(finished / "records", part / "records")
    (part / "records/12/walked-auf-2-tree-4.jsonl.gz").unlink()
    command = ["study", str(folder / "study.yaml"), "--out", str(part), "--report-only"]
    assert main(command) == 0
    assert "seed 2 with 12 steps is not done yet" in caplog.text
    assert "| steps and seeds | 12 steps, seeds 1 |" in (part / "study.md").read_text()
    for file in (part / "records").glob("*/walked-*.gz"):
        file.unlink()
    assert main(command) == 2
    assert "not done yet" in capsys.readouterr().err


def test_a_report_leaves_out_what_was_not_served(
    finished: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    walked = folder / "walked"
    shutil.copytree(finished / "records", walked / "records", ignore=shutil.ignore_patterns("served-*"))
    command = ["study", str(folder / "study.yaml"), "--out", str(walked), "--report-only"]
    assert main([*command, "--walk-only"]) == 0
    assert "not served yet" not in caplog.text
    assert main(command) == 0
    assert "not served yet" in caplog.text
    assert "## Served" in (finished / "study.md").read_text()
    assert "## Served" not in (walked / "study.md").read_text()
