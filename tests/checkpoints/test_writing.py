"""Drafters on disk: what is written, what is refused, and that nothing half-written is ever left."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_auf.checkpoints import writing
from sglang_auf.checkpoints.card import CARD_NAME, DrafterCard, check_drafter
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import expected_weights
from sglang_auf.checkpoints.writing import write_drafter
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import CONFIG, PROVENANCE, WEIGHTS
from sglang_auf.provenance import sha256_of
from tests.support.tiny_models import drafter_config, target_config, write_target

DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 16,
    "emb_dim": 8,
}
HEADS = {"dflash": {}, "domino": DOMINO}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("targets") / "tiny")


def weights_of(head: str = "dflash", seed: int = 0) -> Tensors:
    """float32, as the trainer keeps them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_weights(drafter_config(4, **HEADS[head]))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(
    out: Path, target: Path | None, weights: Tensors | None = None, head: str = "dflash", force: bool = False
) -> list[str]:
    """Write a drafter with a card that leaves nothing open."""
    facts = None if target is None else TargetFacts.of(target)
    card = DrafterCard(
        target_name="tiny",
        target_config_hash=facts.config_hash if facts else "0" * 64,
        target_layer_ids=(1, 2),
        mask_token_id=3,
        block_size=4,
        head=head,
        thinking="off",
        max_length=512,
        objective="auf",
    )
    return write_drafter(
        out,
        drafter_config(4, **HEADS[head]),
        weights_of(head) if weights is None else weights,
        card,
        {"training": {"step": 7}},
        {"recipe.yaml": "seed: 7\n"},
        None if target is None else str(target),
        force,
    )


@pytest.mark.parametrize("head", HEADS)
def test_what_is_written_fits_the_target_and_holds_the_weights(tmp_path: Path, target: Path, head: str) -> None:
    out = tmp_path / "new" / "drafter"
    warnings = write(out, target, head=head)
    assert warnings == list(check_drafter(str(out), str(target)).warnings)
    assert len(warnings) == 1 and "chat_template_hash" in warnings[0], "the tiny target has no chat template"
    stored = load_file(out / WEIGHTS)
    assert stored.keys() == weights_of(head).keys()
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in weights_of(head).items())
    with safe_open(out / WEIGHTS, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


def test_files_that_read_back_differently_are_refused(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, file, metadata)

    monkeypatch.setattr(writing, "save_file", careless)
    with pytest.raises(CardError, match=r"differs from what was written \(norm.weight\)"):
        write(tmp_path / "drafter", target)
    assert list(tmp_path.iterdir()) == []


def test_config_texts_and_origin_lie_beside_the_weights(tmp_path: Path, target: Path) -> None:
    write(tmp_path / "drafter", target)
    assert json.loads((tmp_path / "drafter" / CONFIG).read_text()) == drafter_config(4)
    assert (tmp_path / "drafter" / "recipe.yaml").read_text() == "seed: 7\n"
    origin = json.loads((tmp_path / "drafter" / PROVENANCE).read_text())
    assert origin["training"] == {"step": 7}
    files = (tmp_path / "drafter" / name for name in (CARD_NAME, CONFIG, "recipe.yaml", WEIGHTS))
    assert origin["files"] == sha256_of(files)


def test_weights_of_zeros_are_a_warning(tmp_path: Path, target: Path) -> None:
    weights = weights_of()
    weights["fc.weight"].zero_()
    assert "fc.weight is all zeros: untrained" in write(tmp_path / "drafter", target, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_numbers_that_are_not_finite_in_bfloat16_are_refused(tmp_path: Path, target: Path, value: float) -> None:
    weights = weights_of()
    weights["layers.0.mlp.up_proj.weight"][2, 3] = value
    with pytest.raises(CardError, match=r"layers.0.mlp.up_proj.weight with 1 of 8192 not finite"):
        write(tmp_path / "drafter", target, weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("fc.weight", None, "no fc.weight"),
        ("lm_head.weight", torch.ones(64, 64), "lm_head.weight, which SGLang does not read"),
        ("norm.weight", torch.ones(65), r"norm.weight of shape \[65\] instead of \[64\]"),
        ("norm.weight", torch.ones(64, dtype=torch.int32), "norm.weight of type torch.int32"),
    ],
)
def test_weights_of_another_drafter_are_refused(
    tmp_path: Path, target: Path, name: str, value: torch.Tensor | None, complaint: str
) -> None:
    changed = {**weights_of(), name: value}
    weights = {key: tensor for key, tensor in changed.items() if tensor is not None}
    with pytest.raises(CardError, match=complaint):
        write(tmp_path / "drafter", target, weights)
    assert list(tmp_path.iterdir()) == []


def test_a_target_of_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text(json.dumps({**target_config(), "vocab_size": 128}))
    with pytest.raises(CardError, match="vocab_size 64, where the target's is 128"):
        write(tmp_path / "drafter", tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_an_export_is_replaced_only_when_asked(tmp_path: Path, target: Path) -> None:
    out = tmp_path / "drafter"
    write(out, target)
    newer = weights_of(seed=1)
    with pytest.raises(ConfigError, match="--force"):
        write(out, target, newer)
    assert torch.equal(load_file(out / WEIGHTS)["fc.weight"], weights_of()["fc.weight"].bfloat16())
    write(out, target, newer, force=True)
    assert torch.equal(load_file(out / WEIGHTS)["fc.weight"], newer["fc.weight"].bfloat16())
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_export_is_never_replaced(tmp_path: Path, target: Path) -> None:
    for name, make in (("file", Path.touch), ("empty", Path.mkdir)):
        make(tmp_path / name)
        with pytest.raises(ConfigError, match="is no export"):
            write(tmp_path / name, target, force=True)
    out = tmp_path / "drafter"
    write(out, target)
    (out / "README.md").write_text("by hand")
    with pytest.raises(ConfigError, match=r"holds README.md beside an export"):
        write(out, target, force=True)
    assert (out / "README.md").read_text() == "by hand"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow past 4 kB: the closest to a full disk that needs no privileges."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_earlier_export(tmp_path: Path, target: Path) -> None:
    out = tmp_path / "drafter"
    write(out, target)
    before = sha256_of(sorted(out.iterdir()))
    with full_disk(), pytest.raises(ConfigError, match=r"writing .*drafter failed"):
        write(out, target, weights_of(seed=1), force=True)
    assert sha256_of(sorted(out.iterdir())) == before
    assert list(tmp_path.iterdir()) == [out]
