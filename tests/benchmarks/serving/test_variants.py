from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main

pytestmark = pytest.mark.usefixtures("fake_server_program")


def variants(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["variants", "--profile", "toy", "--max-tokens", "32", "--out", "out", *flags])
    report: dict[str, Any] = json.loads(Path("out/variants.json").read_text())
    return code, report


@pytest.mark.usefixtures("no_child_left")
def test_the_profile_its_variants_and_plain_are_asked_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--variant", "block_size=2", "--variant", "block_size=3 server_args.log_level=debug"]
    code, report = variants("--rounds", "3", "--concurrency", "1,4", *flags)
    assert code == 0
    assert [(row["concurrency"], row["name"]) for row in report["rows"]] == [
        (level, name) for level in (1, 4) for name in ("plain", "profile", "variant-1", "variant-2")
    ]
    plain, profile, short, longer = report["rows"][:4]
    assert (plain["block_size"], plain["tau"], plain["over_plain"]) == (None, None, 1.0)
    assert (profile["over_profile"], short["settings"], short["block_size"]) == (1.0, ["block_size=2"], 2)
    assert profile["tau"] > longer["tau"] > short["tau"] > 1
    for row in report["rows"]:
        of_plain = next(r for r in report["rows"] if (r["name"], r["concurrency"]) == ("plain", row["concurrency"]))
        ratios = sorted(ours / theirs for ours, theirs in zip(row["rounds"], of_plain["rounds"], strict=True))
        assert row["over_plain"] == pytest.approx(ratios[1])
        assert row["plain_tokens"]["same_tokens"] == 3 * row["prompts"]
        assert (row["step_s"] is not None) == (row["concurrency"] == 1)
    assert "block_size=3 server_args.log_level=debug" in Path("out/variant-2-server.log").read_text()
    table = Path("out/variants.md").read_text()
    assert table in capsys.readouterr().out
    assert "| block_size=2 | 2 | 1 |" in table


def test_another_answer_than_plain_decodings_shows() -> None:
    flags = ["--rounds", "1", "--concurrency", "24", "--limit", "24"]
    code, report = variants(*flags, "--variant", "fork=lighthouse")
    assert code == 1
    assert [row["plain_tokens"]["same_tokens"] for row in report["rows"]] == [24, 24, 23]
    code, report = variants(*flags, "--variant", "cut=lighthouse")
    assert code == 1
    assert [row["plain_tokens"]["same_tokens"] for row in report["rows"]] == [24, 24, 23]


@pytest.mark.parametrize("variant", ["block_size", "", "block_size='6"])
def test_a_variant_that_is_no_setting_is_refused(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "--profile", "toy", "--variant", variant]) == 2
    assert "--variant" in capsys.readouterr().err


def test_the_quicker_plain_decoding_is_what_a_server_is_compared_with() -> None:
    """A server without row-invariant products promises no answer, so its own are not held against the run."""
    flags = ["--rounds", "2", "--limit", "24", "--unconstrained", "--set", "wobble=lighthouse"]
    flags += ["--variant", "block_size=2"]
    code, report = variants(*flags)
    assert code == 0
    assert [row["name"] for row in report["rows"]] == ["plain", "profile", "unconstrained", "variant-1"]
    plain, profile, unconstrained, _ = report["rows"]
    assert unconstrained["tau"] is None
    same = [row["plain_tokens"]["same_tokens"] for row in report["rows"]]
    assert same[2] < same[0] == same[1] == same[3] == 48
    fastest = map(max, plain["rounds"], unconstrained["rounds"])
    ratios = [ours / theirs for ours, theirs in zip(profile["rounds"], fastest, strict=True)]
    assert profile["over_fastest"] == pytest.approx(sum(ratios) / 2)
    assert "of the quicker plain" in Path("out/variants.md").read_text()
