"""Exported drafters: what a checkpoint of a training run becomes, and which runs are refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sglang_auf import cli
from sglang_auf.checkpoints.card import CARD_NAME, MeasuredTau, check_drafter, load_card
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.checkpoints.writing import RECIPE
from sglang_auf.errors import AufError, CardError, TargetError
from sglang_auf.files import PROVENANCE, WEIGHTS
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.provenance import git_revision, sha256_of
from sglang_auf.training.checkpointer import Checkpoints, RunState
from sglang_auf.training.export import export_checkpoint, export_drafter
from sglang_auf.training.run_directory import RUN
from tests.support.tiny_models import target_config, write_target

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_target(tmp_path_factory.mktemp("targets") / "tiny")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def drafter_of(head: str = "dflash") -> DrafterConfig:
    sizes = {"gru_hidden_dim": 16, "emb_dim": 8} if head == "domino" else {}
    return DrafterConfig.for_target(
        target_config(), num_layers=1, target_layer_ids=(1, 2), block_size=4, mask_token_id=3, head=head, **sizes
    )


def state_of(config: DrafterConfig, seed: int = 0) -> Tensors:
    """float32, as the trainer keeps them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_weights(config.to_checkpoint())
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(out: Path, target: Path, state: Tensors | None = None, head: str = "dflash", **changes: Any) -> Path:
    config = drafter_of(head)
    settings: dict[str, Any] = {
        "target_dir": target,
        "objective": "auf",
        "thinking": "off",
        "max_length": 512,
        "recipe": {"seed": 7, "data": {"sources": ["a.jsonl"]}},
        **changes,
    }
    return export_drafter(state_of(config) if state is None else state, config, out, **settings)


def test_domino_is_written_as_sglang_names_it(tmp_path: Path, target: Path) -> None:
    config = json.loads((write(tmp_path / "drafter", target, head="domino") / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["emb_dim"] == config["dflash_config"]["emb_dim"] == 8
    domino = {"projector_type": "domino", "pure_draft_prefix_len": 1, "shift_label": True, "gru_hidden_dim": 16}
    assert domino.items() <= config["dflash_config"].items()


def test_the_card_says_what_the_drafter_was_trained_for(tmp_path: Path, target: Path) -> None:
    tau = MeasuredTau(value=2.25, kind="held-out", on="60 answers")
    card = load_card(write(tmp_path / "drafter", target, tau=tau, target_name="owner/tiny"))
    facts = TargetFacts.of(target)
    assert card.model_dump() == {
        "format": 1,
        "target_name": "owner/tiny",
        "target_revision": None,
        "target_config_hash": facts.config_hash,
        "target_layer_ids": (1, 2),
        "mask_token_id": 3,
        "block_size": 4,
        "head": "dflash",
        "thinking": "off",
        "chat_template_hash": facts.chat_template_hash,
        "max_length": 512,
        "objective": "auf",
        "recipe": RECIPE,
        "tau": tau.model_dump(),
        "adapted": None,
        "derived": False,
    }
    assert load_card(write(tmp_path / "other", target)).target_name == "tiny"


def test_recipe_and_provenance_lie_beside_it(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/sglang-auf", "export", "run", "out"])
    out = write(tmp_path / "drafter", target, provenance={"data_sha256": "ab" * 32})
    assert yaml.safe_load((out / RECIPE).read_text()) == {"seed": 7, "data": {"sources": ["a.jsonl"]}}
    origin = json.loads((out / PROVENANCE).read_text())
    assert origin["command"] == ["sglang-auf", "export", "run", "out"]
    assert origin["training"] == {"data_sha256": "ab" * 32}
    assert origin["versions"]["torch"] == torch.__version__.split("+")[0]
    assert origin["files"] == sha256_of(out / name for name in (CARD_NAME, "config.json", RECIPE, WEIGHTS))


def test_the_git_revision_is_our_checkout_or_none(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    revision = git_revision(Path(__file__).parents[2])
    assert revision is None or len(revision.removesuffix("+changes")) == 40


def test_a_fresh_drafter_can_be_exported(tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = Drafter(drafter_of("domino")).state_dict()
    with caplog.at_level(logging.WARNING):
        out = write(tmp_path / "drafter", target, state, head="domino")
    assert check_drafter(str(out), str(target)).card.head == "domino"
    assert [record.getMessage() for record in caplog.records] == [
        f"{out}: embed_proj.2.weight is all zeros: untrained"  # a new correction changes nothing
    ]


# A training run


def recipe_for(target: str) -> dict[str, Any]:
    return {
        "target": target,
        "data": {"sources": ["rows.jsonl"], "max_length": 256, "held_out": 12, "thinking": "off"},
        "drafter": {"num_layers": 1, "target_layer_ids": [1, 2], "block_size": 4, "mask_token_id": 3},
        "objective": {"name": "auf+decay"},
        "optimiser": {"lr": 0.001},
        "schedule": {"epochs": 1},
        "batch": {"batch_tokens": 512, "anchors_per_row": 4},
    }


def run_of(directory: Path, target: Path, best: int | None, named: str | None = None) -> Path:
    """Two checkpoints whose weights are those of seeds 10 and 20; the first has an evaluation."""
    directory.mkdir()
    (directory / RUN).write_text(json.dumps({"data": {"sha256": "cd" * 32}, "starts": []}))
    checkpoints = Checkpoints(directory, keep_last=2)
    for step in (10, 20):
        state = RunState(
            step=step,
            recipe=recipe_for(named or str(target)),
            data_sha256="cd" * 32,
            target_config_hash=TargetFacts.of(target).config_hash,
            ranks=1,
            tokens=1000,
            seconds=2.0,
            evaluation={"tau": 1.75, "tau_micro": 1.8} if step == 10 else None,
            best_step=best,
        )
        config = drafter_of().to_checkpoint()
        checkpoints.write(config, state_of(drafter_of(), seed=step), {"any/step": torch.ones(1)}, state)
    if best is not None:
        checkpoints.link_best(best)
    return directory


@pytest.mark.parametrize(("best", "expected"), [(10, 10), (None, 20)])
def test_a_run_gives_its_best_checkpoint_or_its_latest(
    tmp_path: Path, target: Path, best: int | None, expected: int
) -> None:
    out = export_checkpoint(run_of(tmp_path / "run", target, best), tmp_path / "drafter")
    weights = state_of(drafter_of(), seed=expected)
    assert all(torch.equal(stored, weights[name].bfloat16()) for name, stored in load_file(out / WEIGHTS).items())
    card = load_card(out)
    assert (card.objective, card.thinking, card.max_length) == ("auf+decay", "off", 256)
    assert (card.tau is None) == (expected == 20)
    if card.tau is not None:
        assert (card.tau.value, card.tau.kind) == (1.75, "held-out")
        assert "12 conversations" in card.tau.on and "step 10" in card.tau.on
    training = json.loads((out / PROVENANCE).read_text())["training"]
    assert (training["step"], training["data_sha256"]) == (expected, "cd" * 32)
    assert training["run"] == {"data": {"sha256": "cd" * 32}, "starts": []}
    assert yaml.safe_load((out / RECIPE).read_text())["optimiser"] == {"lr": 0.001}


@pytest.mark.parametrize(
    ("best", "steps", "said"),
    [
        (10, 40, "not finished, step 20 of 40 is saved; exported is the one with held-out tau 1.7500, of step 10"),
        (None, 40, "exported is the latest checkpoint, which was not evaluated, of step 20"),
        (10, 20, ""),
    ],
)
def test_of_a_run_that_is_not_finished_the_export_says_what_it_is(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture, best: int | None, steps: int, said: str
) -> None:
    run = run_of(tmp_path / "run", target, best)
    (run / RUN).write_text(json.dumps({"steps": steps, "starts": []}))
    export_checkpoint(run, tmp_path / "drafter")
    assert said in caplog.text
    assert ("not finished" in caplog.text) == bool(said)


def test_a_directory_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"found: no directory .*nope; expected: the directory of a training run"):
        export_checkpoint(tmp_path / "nope", tmp_path / "drafter")


def test_the_card_says_the_curriculum(tmp_path: Path, target: Path) -> None:
    run = run_of(tmp_path / "run", target, None)
    file = run / "checkpoints" / "step-00000020" / "state.json"
    state = json.loads(file.read_text())
    state["recipe"]["objective"]["earlier"] = [{"name": "full", "until": 0.125}, {"name": "vat", "until": 0.5}]
    file.write_text(json.dumps(state))
    out = export_checkpoint(run, tmp_path / "drafter")
    assert load_card(out).objective == "full until 0.125, then vat until 0.5, then auf+decay"


@pytest.mark.parametrize(("start", "warned"), [(1.8, True), (1.75, True), (1.7, False), (None, False)])
def test_a_checkpoint_that_is_no_better_than_its_start_is_warned_of(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture, start: float | None, warned: bool
) -> None:
    run = run_of(tmp_path / "run", target, best=10)
    file = run / "best" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"start_tau": start}))
    export_checkpoint(run, tmp_path / "drafter")
    told = f"held-out tau 1.7500, no better than {start or 0:.4f} of the drafter that training began from"
    assert (told in caplog.text) == warned
    assert ("no better than" in caplog.text) == warned


def test_one_checkpoint_can_be_named(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", target, best=10)
    out = tmp_path / "drafter"
    assert cli.main(["export", str(run / "checkpoints" / "step-00000020"), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert torch.equal(load_file(out / WEIGHTS)["norm.weight"], state_of(drafter_of(), 20)["norm.weight"].bfloat16())
    assert cli.main(["export", str(run), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(out), "--force", "--target", str(target)]) == 0


def test_the_card_names_a_prepared_target_by_its_hub_id(tmp_path: Path, target: Path) -> None:
    run = run_of(tmp_path / "run", target, None, named="smollm2-135m")
    out = export_checkpoint(run, tmp_path / "drafter", target=str(target))
    assert load_card(out).target_name == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_card_says_what_the_target_was_when_it_was_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = tmp_path / "models--owner--tiny" / "snapshots"
    before, now = (write_target(snapshots / revision) for revision in ("aaaa", "bbbb"))
    (before / "chat_template.jinja").write_text(TEMPLATE)
    (now / "chat_template.jinja").write_text(TEMPLATE + "{{ '.' }}")
    run = run_of(tmp_path / "run", before, None)
    file = run / "checkpoints" / "step-00000020" / "state.json"
    state, facts = json.loads(file.read_text()), TargetFacts.of(before)
    trained = {"target_revision": "aaaa", "chat_template_hash": facts.chat_template_hash, "target_weights": "ef" * 32}
    file.write_text(json.dumps(state | trained))
    with caplog.at_level(logging.WARNING):
        card = load_card(export_checkpoint(run, tmp_path / "drafter", target=str(now)))
    assert (card.target_revision, card.chat_template_hash) == ("aaaa", facts.chat_template_hash)
    assert "trained for revision aaaa, the target is at bbbb" in caplog.text
    assert "chat template is not the one the drafter was trained with" in caplog.text

    file.write_text(json.dumps({name: value for name, value in state.items() if name not in trained}))
    card = load_card(export_checkpoint(run, tmp_path / "of an earlier version", target=str(now)))
    assert (card.target_revision, card.chat_template_hash) == ("bbbb", TargetFacts.of(now).chat_template_hash)


def test_a_run_for_another_target_is_refused(tmp_path: Path, target: Path) -> None:
    run = run_of(tmp_path / "run", target, best=10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**target_config(), "num_hidden_layers": 6}))
    with pytest.raises(CardError, match="trained for another target"):
        export_checkpoint(run, tmp_path / "drafter", target=str(tmp_path / "other"))
    with pytest.raises(TargetError, match="nowhere"):
        export_checkpoint(run, tmp_path / "drafter", target=str(tmp_path / "nowhere"))


def test_a_directory_without_a_whole_checkpoint_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CardError, match="no checkpoint"):
        export_checkpoint(tmp_path / "empty", tmp_path / "drafter")
    weights = run_of(tmp_path / "run", target, best=10) / "best" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AufError, match="damaged"):
        export_checkpoint(tmp_path / "run", tmp_path / "drafter")
