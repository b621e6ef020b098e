from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cli import main
from benchmarks.harness.records import read_records
from benchmarks.serving.identity import SHIPPED_DRAFTER, IdentityConfig, IdentityReport
from benchmarks.serving.random_drafter import write_random_drafter
from sglang_auf.checkpoints.weights import expected_weights
from tests.support.tiny_models import write_target

pytestmark = pytest.mark.usefixtures("fake_server_program")

CONSTRAINED = [
    ("plain", 16),
    ("plain", 1),
    ("auf-b8", 16),
    ("auf-b8", 4),
    ("auf-b8", 1),
    ("auf-b8-no-prefix-cache", 16),
    ("auf-b4", 16),
    ("random-drafter", 16),
]


def identity(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["identity", "--profile", "toy", "--tasks", "sample", "--alone", "7", "--out", "out", *flags])
    report: dict[str, Any] = json.loads(Path("out/identity.json").read_text())
    return code, {(row["variant"], row["concurrency"]): row for row in report.pop("rows")} | {"report": report}


def test_every_cell_is_compared_with_plain_decoding_in_company(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = identity()
    assert code == 0
    report = rows.pop("report")
    assert {"versions", "machine", "command"} <= set(report)
    assert list(rows) == [*CONSTRAINED, ("unconstrained", 16), ("unconstrained", 1)]
    for (variant, concurrency), row in rows.items():
        reference = (variant, concurrency) in {("plain", 16), ("unconstrained", 1)}
        alone = concurrency == 1 or variant == "unconstrained"
        assert row["identical"] == (None if reference else 7 if alone else 24)
        assert row["prompts"] == (7 if concurrency == 1 else 24)
        assert row["forks"] == []
        assert row["tokens_per_s"] > 0
        assert (row["tau"] is not None) == (variant not in {"plain", "unconstrained"})
    table = Path("out/identity.md").read_text()
    assert table in capsys.readouterr().out
    assert "| auf-b8 | 4 | 24 | 24 of 24 | 0 |" in table


def test_variants_differ_in_their_settings() -> None:
    identity("--limit", "1", "--set", "a=1")
    logs = {path.name: path.read_text() for path in Path("out").glob("*-server.log")}
    assert "a=1 block_size=8 server_args.disable_radix_cache=true" in logs["auf-b8-no-prefix-cache-server.log"]
    assert "a=1 block_size=4" in logs["auf-b4-server.log"]
    drafter = Path("out/random-drafter-weights").resolve()
    assert f"a=1 drafter={drafter}" in logs["random-drafter-server.log"]
    assert (drafter / "model.safetensors").exists()


def test_alone_means_some_of_every_task_and_first_turns_only() -> None:
    identity("--variants", "auf-b8")
    records = read_records(Path("out/auf-b8/c1/records.jsonl"))
    assert len({record.task for record in records}) == 6
    assert {record.turn for record in read_records(Path("out/plain/c16/records.jsonl"))} == {0}


def test_a_fork_of_a_constrained_cell_is_an_exit_code() -> None:
    code, rows = identity("--variants", "auf-b4", "--set", "fork=lighthouse")
    assert code == 1
    assert set(rows) == {("plain", 16), ("plain", 1), ("auf-b4", 16), "report"}
    assert rows["auf-b4", 16]["identical"] == 23
    (fork,) = rows["auf-b4", 16]["forks"]
    assert (fork["prompt_id"], fork["position"]) == ("alpaca/lighthouse", 3)
    assert fork["token"] == fork["reference"] + 1000
    assert "alpaca/lighthouse token 3" in Path("out/identity.md").read_text()


def test_another_finish_reason_is_a_fork() -> None:
    code, rows = identity("--variants", "auf-b4", "--set", "cut=lighthouse")
    assert code == 1
    assert rows["auf-b4", 16]["identical"] == 23
    (fork,) = rows["auf-b4", 16]["forks"]
    assert (fork["prompt_id"], fork["token"], fork["finish"]) == ("alpaca/lighthouse", None, ["length", "stop"])
    assert "alpaca/lighthouse: finished by 'length' and not 'stop'" in Path("out/identity.md").read_text()


def test_forks_without_row_invariance_are_a_finding() -> None:
    code, rows = identity("--variants", "unconstrained", "--alone", "24", "--set", "wobble=lighthouse")
    assert code == 0
    assert rows["plain", 1]["forks"] == []
    assert rows["unconstrained", 16]["identical"] == 23
    assert len(rows["unconstrained", 16]["forks"]) == 1


def test_finished_cells_are_kept_and_others_measured_again() -> None:
    identity("--variants", "auf-b8", "--limit", "1")
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*/records.jsonl")}
    assert len(stamps) == 5
    Path("out/auf-b8/c4/cell.json").unlink()  # as an interruption in the middle of it leaves it
    code, rows = identity("--variants", "auf-b8,auf-b4", "--limit", "1")
    assert code == 0
    assert rows["auf-b4", 16]["identical"] == rows["auf-b8", 4]["identical"] == 6
    changed = {str(path) for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"out/auf-b8/c4/records.jsonl"}
    identity("--variants", "auf-b8", "--limit", "1", "--max-tokens", "9")
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items())


def test_cells_of_a_profile_that_says_otherwise_are_measured_again(tmp_path: Path) -> None:
    mine, flags = tmp_path / "mine.yaml", ("--variants", "auf-b4", "--limit", "1", "--profile", "mine.yaml")
    mine.write_text("extends: base.yaml\n")
    (tmp_path / "base.yaml").write_text("port: 1\n")
    identity(*flags)
    files = [Path("out/auf-b4/c16/records.jsonl"), Path("out/plain/c16/records.jsonl")]
    stamps = [path.stat().st_mtime_ns for path in files]
    mine.write_text("# a remark says nothing\nextends: base.yaml\n")
    _, rows = identity(*flags)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    sha256 = rows["report"]["config"]["profile_sha256"]
    (tmp_path / "base.yaml").write_text("port: 2\n")
    _, rows = identity(*flags)
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in zip(files, stamps, strict=True))
    config = rows["report"]["config"]
    assert config["profile"] == "mine.yaml" and config["profile_sha256"] != sha256
    assert f"mine.yaml ({config['profile_sha256'][:8]}), temperature 0" in Path("out/identity.md").read_text()


def test_cells_of_other_versions_are_not_presented_as_of_now() -> None:
    identity("--variants", "auf-b4", "--limit", "1")
    assert "earlier calls" not in Path("out/identity.md").read_text()
    cell = Path("out/auf-b4/c16/cell.json")
    content = json.loads(cell.read_text())
    content["versions"] |= {"commit": "abc+changes", "torch": None}
    cell.write_text(json.dumps(content))
    identity("--variants", "auf-b4", "--limit", "1")
    kept = "Figures of earlier calls: 1 with torch unknown, commit abc+changes.\n"
    assert kept in Path("out/identity.md").read_text()


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identity", "--profile", "toy", "--tasks", "sample", "--variants", "auf-b9", "--out", "out"]) == 2
    assert "auf-b9" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_random_drafter_has_the_shape_and_nothing_else(tmp_path: Path) -> None:
    config = {
        **json.loads((SHIPPED_DRAFTER / "config.json").read_text()),
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
        "head_dim": 16,
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "auf_card.json").write_text("{}")
    drafter = write_random_drafter(source, tmp_path / "random")
    assert {path.name for path in drafter.iterdir()} == {"config.json", "model.safetensors"}
    weights = load_file(drafter / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected_weights(config)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["layers.0.self_attn.q_norm.weight"].eq(1).all()
    assert weights["fc.weight"].float().std() == pytest.approx(0.02, rel=0.1)


def test_a_row_that_a_server_cannot_be_asked_is_in_the_report_of_kept_cells_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_target(tmp_path / "target", vocabulary=264)
    monkeypatch.setattr("benchmarks.harness.sources.recordings.target_files", lambda server: target)
    rows = [{"prompt_ids": [5]}, {"prompt_ids": [6]}, {"prompt_ids": [1, 264]}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--profile", "toy", "--prompts", "mine.jsonl", "--alone", "3", "--variants", "plain", "--out", "out"]
    for _ in range(2):
        assert main(["identity", *flags]) == 1
        report = json.loads(Path("out/identity.json").read_text())
        assert report["broken_rows"] == ["mine.jsonl:3: token id 264, outside the vocabulary of 264"]


def test_a_broken_row_of_a_users_file_is_in_the_report_and_fails_it() -> None:
    report = IdentityReport(config=IdentityConfig(profile="toy", prompts=(Path("mine.jsonl"),)), rows=[])
    assert report.config.tasks == ()
    assert report.passed
    assert "new tokens, mine.jsonl" in report.markdown()
    broken = report.model_copy(update={"broken_rows": ["mine.jsonl:2: broken JSON"]})
    assert not broken.passed
    assert "- mine.jsonl:2: broken JSON" in broken.markdown()
