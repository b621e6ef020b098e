"""Runs of a real server, judged by that server's own prefill: a greedy one, and one at temperature 1."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.stats.sampled import LEVEL
from sglang_auf.env import TREE_NODES
from tests.support.tiny_models import VOCABULARY, write_target

pytestmark = pytest.mark.e2e

CONTEXT = 128
TEMPLATE = "w5 {% for message in messages %}{{ message.content }} w6 {% endfor %}"
DICE = random.Random(4)


BROKEN = """
import torch
import sglang_auf.speculative.sampling as sampling
draw = sampling.sample
def sometimes_greedy(probabilities, *more):
    greedy = torch.rand(len(probabilities)) < 0.2
    return torch.where(greedy, probabilities.argmax(dim=-1), draw(probabilities, *more))
sampling.sample = sometimes_greedy
"""


def words(count: int) -> str:
    return " ".join(f"w{DICE.randrange(8, VOCABULARY)}" for _ in range(count))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = write_target(tmp_path_factory.mktemp("judged") / "target")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(place)
    return place


def served(target: Path, drafter: Path) -> list[str]:
    arguments = ["server", "--profile", "smollm2-135m"]
    for setting in (
        f"target={target}",
        f"drafter={drafter}",
        f"server_args.context_length={CONTEXT}",
        "server_args.max_total_tokens=4096",
        "server_args.chunked_prefill_size=32",
    ):
        arguments += ["--set", setting]
    return arguments


def test_a_run_is_exact_and_a_changed_id_is_a_fault_at_its_place(
    target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path, start_server: Any
) -> None:
    """Prompts of both turns that are cached, answers that cross a prefill chunk, and one to the end of the context."""
    prompts = tmp_path / "mine.jsonl"
    rows = [{"id": f"p{number}", "turns": [words(5), words(4)]} for number in range(3)]
    rows.append({"id": "long", "turns": [words(76)]})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    with start_server(served(target, tiny_drafter(4)), tmp_path / "log") as (url, _):
        asked = ["--prompts", str(prompts), "--max-tokens", "48", "--concurrency", "2", "--out", str(out)]
        assert main(["run", "--base-url", url, *asked]) == 0
        judged = ["lossless", str(out), "--base-url", url, "--concurrency", "3"]
        assert main(judged) == 0
        report = json.loads((out / "teacher_forced.json").read_text())
        records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
        # A prompt has six places less than the context.
        beyond = [max(0, len(r["prompt_ids"]) + len(r["output_ids"]) - (CONTEXT - 7)) for r in records]
        assert report["equality"] and report["judge"]["algorithm"] == "AUF"
        assert (report["answers"], report["near_tie"], report["fault"]) == (7, 0, 0)
        assert report["exact"] == sum(len(record["output_ids"]) for record in records) - sum(beyond)
        assert sum(part["tokens"] for part in report["unjudged"]) == sum(beyond) > 0
        assert report["exact"] > 200, "else little was judged"

        place = 17
        changed = next(record for record in records if len(record["output_ids"]) > 2 * place)
        changed["output_ids"][place] = 4 + (changed["output_ids"][place] + 7) % (VOCABULARY - 5)
        (out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert main([*judged, "--worst", "1000"]) == 1
    report = json.loads((out / "teacher_forced.json").read_text())
    found = [token for token in report["worst"] if token["prompt_id"] == changed["prompt_id"]]
    assert len(found) == len(report["worst"]), "the other answers are as exact as before"
    first = min(found, key=lambda token: token["position"])
    assert (first["position"], first["emitted"], first["verdict"]) == (place, changed["output_ids"][place], "fault")


@pytest.mark.parametrize("broken", [False, True])
def test_draws_of_a_speculating_server_are_judged(
    broken: bool, target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path, start_server: Any
) -> None:
    """A sitecustomize module has the broken server take the best token for a fifth of its draws."""
    if broken:
        (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    prompts, out = tmp_path / "mine.jsonl", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "turns": [words(5)]}) + "\n" for n in range(60)))
    # At this load a drafter of random weights would not be asked for drafts.
    environment = {"PYTHONPATH": path, TREE_NODES: "6"}
    with start_server(served(target, tiny_drafter(4)), tmp_path / "log", **environment) as (url, _):
        asked = ["--prompts", str(prompts), "--max-tokens", "80", "--concurrency", "8", "--out", str(out)]
        assert main(["run", "--base-url", url, *asked, "--temperature", "1", "--record-steps"]) == 0
        assert main(["lossless", str(out), "--base-url", url, "--concurrency", "3"]) == broken
    report = json.loads((out / "sampled.json").read_text())
    first, later = report["statistics"][-2:]
    assert later["tokens"] > 50, "few drafts were accepted"
    assert first["tokens"] + later["tokens"] + report["answers"] == report["tokens"]
    assert any(one["p"] is not None and one["p"] < LEVEL for one in report["statistics"]) == broken
