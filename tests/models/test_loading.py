"""Loading a drafter: equal weights, and refusal of drafters that SGLang would compute in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_auf.errors import CardError
from sglang_auf.models.loading import load_drafter
from tests.support.tiny_models import write_drafter

DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 8,
    "emb_dim": 4,
}


@pytest.mark.parametrize("head", [{}, DOMINO], ids=["dflash", "domino"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_back(tmp_path: Path, head: dict[str, Any], dtype: torch.dtype) -> None:
    path = write_drafter(tmp_path / "drafter", **head)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(stored, path / "model.safetensors")
    drafter = load_drafter(path)
    assert drafter.config.block_size == 4
    loaded = drafter.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(loaded[name].dtype == torch.float32 for name in loaded)
    assert all(torch.equal(loaded[name], stored[name].float()) for name in loaded)


def test_shards_prefixes_and_borrowed_tables(tmp_path: Path) -> None:
    """As other trainers write: a prefix, the target's embedding, two files and an index; a stray file is not read."""
    path = write_drafter(tmp_path / "drafter")
    plain = load_file(path / "model.safetensors")
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(plain.items()):
        shards["ab"[number % 2] + ".safetensors"][f"model.{name}"] = tensor
    shards["a.safetensors"]["model.embed_tokens.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({name: tensor + 1 for name, tensor in plain.items()}, path / "model.safetensors")
    loaded = load_drafter(path).state_dict()
    assert all(torch.equal(loaded[name], plain[name].float()) for name in plain)


def test_missing_weight(tmp_path: Path) -> None:
    path = write_drafter(tmp_path / "drafter")
    weights = load_file(path / "model.safetensors")
    del weights["fc.weight"]
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CardError, match=r"missing: fc\.weight"):
        load_drafter(path)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    path = write_drafter(tmp_path / "drafter")
    weights = load_file(path / "model.safetensors")
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CardError, match=r"not finite in fc\.weight"):
        load_drafter(path)


def test_config_without_a_size(tmp_path: Path) -> None:
    path = write_drafter(tmp_path / "drafter")
    config = json.loads((path / "config.json").read_text())
    del config["rms_norm_eps"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CardError, match="rms_norm_eps"):
        load_drafter(path)
