"""The drafter card: reading, deriving, and the check of a drafter against a target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints.card import (
    CARD_NAME,
    CheckedDrafter,
    DrafterCard,
    check_card,
    check_drafter,
    check_replaces,
    load_card,
)
from sglang_auf.checkpoints.drafter_settings import ARCHITECTURE
from sglang_auf.checkpoints.target_facts import TargetFacts, chat_template_hash
from sglang_auf.errors import CardError, TargetError

SHIPPED = Path(__file__).parents[2] / "drafters" / "smollm2-135m"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-05,
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "smollm2")


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    """A copy of the shipped drafter to change. Its weights are a link: replace the file, and never write into it."""
    copy = tmp_path / "drafter"
    copy.mkdir()
    for name in ("config.json", CARD_NAME):
        shutil.copy(SHIPPED / name, copy)
    (copy / "model.safetensors").symlink_to(SHIPPED / "model.safetensors")
    return copy


def write_target(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMOLLM2, **changes}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def edit(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; a change to `...` removes the key."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def check(drafter: Path, target: Path, **options: Any) -> CheckedDrafter:
    return check_drafter(str(drafter), str(target), **options)


def refusal(drafter: Path, target: Path) -> CardError:
    with pytest.raises(CardError) as caught:
        check(drafter, target)
    assert caught.value.found and caught.value.expected
    return caught.value


def warnings_about(checked: CheckedDrafter, word: str) -> list[str]:
    return [warning for warning in checked.warnings if word in warning]


def test_a_drafter_behind_a_link_stays_the_one_that_was_checked(drafter: Path, target: Path, tmp_path: Path) -> None:
    link = tmp_path / "served"
    link.symlink_to(drafter)
    checked = check(link, target)
    link.unlink()
    link.symlink_to(tmp_path / "newer")
    assert checked.path == drafter.resolve()


def test_the_shipped_drafter_fits_its_target(target: Path) -> None:
    checked = check(SHIPPED, target)
    assert checked.path == SHIPPED
    assert (checked.card.block_size, checked.card.mask_token_id, checked.card.target_layer_ids) == (8, 3, (7, 20, 28))
    assert (checked.card.head, checked.card.objective, checked.card.derived) == ("dflash", "auf", False)
    assert checked.card.tau is not None and checked.card.tau.kind == "held-out"
    # Two warnings remain: the length of its training texts, and this target's made-up template.
    length, template = sorted(checked.warnings, key=lambda warning: "template" in warning)
    assert "trained on up to 1024 tokens" in length
    assert "template" in template


def test_a_card_survives_being_written_and_read(drafter: Path) -> None:
    card = load_card(drafter)
    (drafter / CARD_NAME).write_text(card.model_dump_json())
    assert load_card(drafter) == card


def test_without_a_card_one_is_derived_and_says_what_it_does_not_know(drafter: Path, target: Path) -> None:
    (drafter / CARD_NAME).unlink()
    checked = check(drafter, target)
    assert checked.card.derived
    assert (checked.card.block_size, checked.card.mask_token_id, checked.card.target_layer_ids) == (8, 3, (7, 20, 28))
    open_questions = {"target_name", "target_config_hash", "thinking", "chat_template_hash", "max_length", "objective"}
    assert open_questions <= set(checked.card.unknown)
    (warning,) = warnings_about(checked, f"no {CARD_NAME}")
    assert all(name in warning for name in open_questions)


def test_a_derived_card_reads_config_json_as_sglang_does(drafter: Path, target: Path) -> None:
    (drafter / CARD_NAME).unlink()
    edit(drafter / "config.json", block_size=..., dflash_config={"projector_type": None}, target_layer_ids=[2, 3, 4])
    card = load_card(drafter)
    assert (card.block_size, card.target_layer_ids, card.mask_token_id, card.head) == (16, (2, 3, 4), None, "dflash")
    checked = check(drafter, target)
    assert warnings_about(checked, "no block_size: SGLang takes 16")
    assert warnings_about(checked, "SGLang looks up <|MASK|>")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        # The sizes of a speculators drafter are nested, so any of them would be missed first.
        ({"architectures": [ARCHITECTURE], "speculators_model_type": "dflash", "block_size": 8}, "a dflash drafter of"),
        ({"architectures": ["DominoDraftModel"], "dflash_config": {"projector_type": "domino"}}, "SpecForge"),
    ],
)
def test_a_drafter_of_another_trainer_is_refused_with_the_command_that_converts_it(
    drafter: Path, target: Path, config: dict[str, Any], kind: str
) -> None:
    (drafter / CARD_NAME).unlink()
    (drafter / "config.json").write_text(json.dumps(config))
    refused = refusal(drafter, target)
    assert kind in refused.found
    assert f"sglang-auf convert {drafter} OUT --target {target}" in refused.remedy


def test_no_command_is_named_for_what_cannot_be_converted(drafter: Path, target: Path) -> None:
    (drafter / "config.json").write_text(json.dumps({"speculators_model_type": "eagle3", "speculators_config": {}}))
    refused = refusal(drafter, target)
    assert "eagle3 drafter of speculators" in refused.found
    assert "sglang-auf convert" not in refused.remedy


def test_a_domino_head_is_derived(drafter: Path) -> None:
    (drafter / CARD_NAME).unlink()
    edit(drafter / "config.json", dflash_config={"projector_type": "domino", "target_layer_ids": [1]})
    assert load_card(drafter).head == "domino"


@pytest.mark.parametrize(
    "changes, mentioned",
    [
        ({"block_size": 16}, "block_size is 16 in auf_card.json and 8 in config.json"),
        ({"mask_token_id": 4}, "mask_token_id is 4"),
        ({"target_layer_ids": [1, 14, 26]}, "target_layer_ids is (1, 14, 26)"),
        ({"head": "domino"}, "head is domino"),
    ],
)
def test_a_card_that_contradicts_config_json_is_refused(
    drafter: Path, target: Path, changes: dict[str, Any], mentioned: str
) -> None:
    edit(drafter / CARD_NAME, **changes)
    assert mentioned in refusal(drafter, target).found


@pytest.mark.parametrize(
    "changes, mentioned",
    [
        ({"blocksize": 8}, "unknown key blocksize (did you mean block_size?)"),
        ({"format": 2}, "format: Input should be 1"),
        ({"thinking": "maybe"}, "thinking"),
        ({"tau": {"value": 0.5, "kind": "micro", "on": "x"}}, "tau.value"),
        ({"target_config_hash": ...}, "target_config_hash: Field required"),
        ({"block_size": "8"}, "block_size"),
    ],
)
def test_a_card_with_wrong_fields_is_refused(
    drafter: Path, target: Path, changes: dict[str, Any], mentioned: str
) -> None:
    edit(drafter / CARD_NAME, **changes)
    assert mentioned in refusal(drafter, target).found


def test_a_card_that_is_not_json_is_refused(drafter: Path, target: Path) -> None:
    (drafter / CARD_NAME).write_text("{")
    assert "auf_card.json is not JSON" in refusal(drafter, target).found


@pytest.mark.parametrize(
    "changes, mentioned",
    [
        ({"hidden_size": 640}, "the drafter has hidden_size 576, where the target's is 640"),
        ({"vocab_size": 32000}, "the drafter has vocab_size 49152, where the target's is 32000"),
        ({"vocab_size": 2}, "mask_token_id 3 is outside the target's vocabulary of 2"),
        ({"num_hidden_layers": 32}, "the drafter has num_target_layers 30, where the target's is 32"),
        ({"num_hidden_layers": 28}, "tapped layers [28]"),
        ({"num_hidden_layers": 29}, "tapped layers [28], where SGLang taps 0..27"),
        ({"num_key_value_heads": 9}, "target_config_hash"),
        ({"model_type": "mistral"}, "target_config_hash"),
    ],
)
def test_a_foreign_target_is_refused(drafter: Path, tmp_path: Path, changes: dict[str, Any], mentioned: str) -> None:
    error = refusal(drafter, write_target(tmp_path / "foreign", **changes))
    assert mentioned in error.found and "HuggingFaceTB/SmolLM2-135M-Instruct" in error.remedy


def test_all_faults_are_told_at_once(drafter: Path, tmp_path: Path) -> None:
    found = refusal(drafter, write_target(tmp_path / "foreign", hidden_size=640, vocab_size=32000)).found
    assert "hidden_size" in found and "vocab_size" in found


def test_the_last_layer_can_be_tapped_where_sglang_does(drafter: Path, tmp_path: Path) -> None:
    (drafter / CARD_NAME).unlink()
    edit(drafter / "config.json", dflash_config={"mask_token_id": 3, "target_layer_ids": [1, 14, 29]})
    other = write_target(tmp_path / "other", architectures=["GptOssForCausalLM"])
    assert check(drafter, other).card.target_layer_ids == (1, 14, 29)
    assert "tapped layers [29]" in refusal(drafter, write_target(tmp_path / "llama")).found


def test_a_target_that_sglang_cannot_tap_is_refused(drafter: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Gemma3ForCausalLM"):
        check(drafter, write_target(tmp_path / "other", architectures=["Gemma3ForCausalLM"]))


@pytest.mark.parametrize("mask", [-1, "3", True, 3.5])
def test_a_mask_token_id_that_is_no_id_is_refused(drafter: Path, target: Path, mask: object) -> None:
    (drafter / CARD_NAME).unlink()
    edit(drafter / "config.json", dflash_config={"mask_token_id": mask, "target_layer_ids": [7, 20, 28]})
    assert "mask_token_id" in refusal(drafter, target).found


def test_missing_directories_are_refused(drafter: Path, target: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none", target).found
    with pytest.raises(TargetError, match="no directory"):
        check(drafter, tmp_path / "none")


def test_an_empty_directory_is_refused_with_what_it_holds(target: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert "notes.txt" in refusal(tmp_path / "empty", target).found


def test_a_target_given_as_drafter_is_refused(target: Path) -> None:
    error = refusal(target, target)
    assert "LlamaForCausalLM" in error.found and "DFlashDraftModel" in error.expected


def test_truncated_weights_are_refused(drafter: Path, target: Path) -> None:
    (drafter / "model.safetensors").unlink()
    (drafter / "model.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes()[:-100])
    assert "truncated" in refusal(drafter, target).found


def test_weights_of_another_drafter_are_refused(drafter: Path, target: Path) -> None:
    edit(drafter / "config.json", num_hidden_layers=3)
    assert "11 missing: layers.2." in refusal(drafter, target).found


def test_pickled_weights_are_refused(drafter: Path, target: Path) -> None:
    (drafter / "model.safetensors").rename(drafter / "pytorch_model.bin")
    error = refusal(drafter, target)
    assert "pytorch_model.bin" in error.found and "safetensors" in error.remedy


def test_a_mask_embedding_that_would_change_the_target_is_refused(drafter: Path, target: Path) -> None:
    (drafter / "mask_embedding.pt").touch()
    assert "mask_embedding.pt" in refusal(drafter, target).found


def test_code_named_in_auto_map_is_harmless(drafter: Path, target: Path) -> None:
    edit(drafter / "config.json", auto_map={"AutoModel": "dflash.DFlashDraftModel"})
    (drafter / "dflash.py").write_text("raise SystemExit('executed')")
    assert check(drafter, target).card.block_size == 8


def test_a_hub_id_without_a_hub_is_refused(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CardError, match="the hub gave no z-lab/Qwen3-8B-DFlash-b16"):
        check_drafter("z-lab/Qwen3-8B-DFlash-b16", str(target))


def complete(target: Path, **changes: Any) -> tuple[DrafterCard, dict[str, Any], TargetFacts]:
    """A card with nothing unknown, its drafter's config, and the target it was trained for."""
    facts = TargetFacts.of(target)
    known = {"chat_template_hash": chat_template_hash(TEMPLATE), "max_length": 8192, "thinking": "off"}
    card = load_card(SHIPPED).model_copy(update={**known, **changes})
    return card, json.loads((SHIPPED / "config.json").read_text()), facts


def test_a_complete_card_that_fits_gives_no_warning(target: Path) -> None:
    card, config, facts = complete(target)
    assert check_card(card, config, facts, block_size=8, context_length=8192, thinking="off") == []


@pytest.mark.parametrize(
    "changes, options, expected",
    [
        ({"chat_template_hash": "0" * 64}, {}, "chat template is not the one"),
        ({"chat_template_hash": None}, {}, "does not say: chat_template_hash"),
        ({"thinking": None}, {}, "does not say: thinking"),
        ({}, {"thinking": "on"}, "trained with thinking off, and is served with thinking on"),
        ({}, {"block_size": 4}, "blocks of 8, and is served with 4"),
        ({"max_length": 1024}, {}, "up to 1024 tokens, and is served up to 8192"),
        ({}, {"context_length": 16384}, "up to 8192 tokens, and is served up to 16384"),
        ({"objective": "decay"}, {}, "not trained with AUF but with decay"),
        ({"objective": None}, {}, "does not say: objective"),
    ],
)
def test_what_may_lower_tau_is_a_warning(
    target: Path, changes: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    warnings = check_card(*complete(target, **changes), **options)
    assert len(warnings) == 1 and expected in warnings[0]


def test_a_setting_that_sglang_does_not_read_is_a_warning(target: Path) -> None:
    card, config, facts = complete(target)
    config["dflash_config"]["something_new"] = 2
    [warning] = check_card(card, config, facts)
    assert "does not read something_new" in warning


def test_taps_that_nobody_said_are_a_warning(drafter: Path, target: Path) -> None:
    config = json.loads((drafter / "config.json").read_text())
    del config["dflash_config"]["target_layer_ids"]
    (drafter / "config.json").write_text(json.dumps(config))
    (drafter / CARD_NAME).unlink()
    warnings = check_card(load_card(drafter), config, TargetFacts.of(target))
    assert any("no target_layer_ids: SGLang taps [1, 27]" in warning for warning in warnings)


@pytest.mark.parametrize(("scale", "architecture"), [(1.0, "LlamaForCausalLM"), (24.0, "Gemma4ForCausalLM")])
def test_a_scale_of_the_embeddings_must_be_the_one_of_serving(tmp_path: Path, scale: float, architecture: str) -> None:
    card, config, facts = complete(write_target(tmp_path / "target", architectures=[architecture]))
    config["dflash_config"]["input_embedding_scale"] = scale
    check_card(card, config, facts)
    config["dflash_config"]["input_embedding_scale"] = 25.0 - scale
    with pytest.raises(CardError, match=rf"input_embedding_scale {25.0 - scale}.* by {scale:g}"):
        check_card(card, config, facts)


def test_another_name_or_revision_of_the_target_is_a_warning(tmp_path: Path) -> None:
    cached = write_target(tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "new")
    warnings = check_card(*complete(cached, target_revision="old"))
    assert len(warnings) == 2
    assert "trained for HuggingFaceTB/SmolLM2-135M-Instruct, the target is HuggingFaceTB/SmolLM2-135M" in warnings[0]
    assert "revision old, the target is at new" in warnings[1]


def test_the_check_imports_neither_torch_nor_sglang(target: Path) -> None:
    """It runs before anything loads, in processes that must stay light."""
    script = (
        "import sys; from sglang_auf.checkpoints.card import check_drafter; check_drafter(*sys.argv[1:]);"
        "print(*({'torch', 'sglang', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(SHIPPED), str(target)],
        cwd=SHIPPED.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_a_draft_vocabulary_is_checked_with_the_card(drafter: Path, target: Path) -> None:
    for tokens, fault in (([0, 49151], None), ([0, 49152], "token 49152"), ([3, 1], "tokens")):
        (drafter / "draft_vocabulary.json").write_text(json.dumps({"tokens": tokens}))
        if fault is None:
            listed = check_drafter(str(drafter), str(target)).vocabulary
            assert listed is not None
            assert list(listed.tokens) == tokens
        else:
            with pytest.raises(CardError, match=fault):
                check_drafter(str(drafter), str(target))


def test_a_drafter_of_the_same_shape_may_take_the_place_of_another(drafter: Path, target: Path) -> None:
    running = check_drafter(str(drafter), str(target)).config
    check_replaces({**running, "transformers_version": "5", "dtype": "float32"}, running)
    for changes, says in (
        ({"rope_theta": 1.0}, "rope_theta 1.0 where the running drafter has 100000.0"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 where the running drafter has 2"),
        ({"layer_types": ...}, "layer_types None where"),
        ({"sliding_window": 5}, "sliding_window 5 where the running drafter has None"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1]}}, "dflash_config"),
    ):
        other = {key: value for key, value in {**running, **changes}.items() if value is not ...}
        with pytest.raises(CardError, match=says):
            check_replaces(other, running)
