from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.cli import main
from benchmarks.shapes.qwen3_8b import TARGET, TOY, configs
from benchmarks.shapes.write import LOGIT_STD, WriteShapeConfig, random_weight, target_weights, write_shape
from sglang_auf.checkpoints.card import check_drafter
from sglang_auf.errors import ConfigError
from sglang_auf.files import weight_files


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = weight_files(directory, ConfigError)
    return {name: weight for file in files for name, weight in load_file(file).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shape") / "models"
    assert main(["write-shape", "--widths", "toy", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("config", [TOY | {"num_hidden_layers": 6}, TARGET], ids=["toy", "full size"])
def test_the_weights_are_those_of_a_qwen3(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**config))
    assert target_weights(config) == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_what_is_written_is_complete_and_fits_together(written: Path) -> None:
    target, _ = configs(6, widths="toy")
    found = weights(written / "target")
    assert {name: tuple(weight.shape) for name, weight in found.items()} == target_weights(target)
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    checked = check_drafter(str(written / "drafter"), str(written / "target"))
    assert checked.card.block_size == 16
    assert AutoTokenizer.from_pretrained(written / "target")("5 7")["input_ids"] == [5, 7]
    report = json.loads((written / "shape.json").read_text())
    assert report["bytes"]["target"] == 2 * sum(map(math.prod, target_weights(target).values()))
    assert {entry.name for entry in written.iterdir()} == {"target", "drafter", "shape.json"}
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in written.rglob("*.safetensors"))


def test_a_seed_gives_the_same_weights_and_another_seed_others(written: Path, tmp_path: Path) -> None:
    write_shape(WriteShapeConfig(out=tmp_path / "same", widths="toy", layers=6, seed=0))
    write_shape(WriteShapeConfig(out=tmp_path / "other", widths="toy", layers=6, seed=7))
    for model in ("target", "drafter"):
        first, same, other = (weights(place / model) for place in (written, tmp_path / "same", tmp_path / "other"))
        assert all(torch.equal(weight, same[name]) for name, weight in first.items())
        assert not any(torch.equal(weight, other[name]) for name, weight in first.items() if weight.dim() > 1)


def test_products_keep_the_size_of_what_they_multiply() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (x @ random_weight("mlp.up_proj.weight", (1024, 512), 0).T).std().item() == pytest.approx(1, rel=0.05)
    assert (x @ random_weight("lm_head.weight", (1024, 512), 0).T).std().item() == pytest.approx(LOGIT_STD, rel=0.05)
    assert random_weight("model.embed_tokens.weight", (1024, 512), 0).std().item() == pytest.approx(1, rel=0.05)
    assert random_weight("norm.weight", (512,), 0).eq(1).all()


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ConfigError, match="exists"):
        write_shape(WriteShapeConfig(out=tmp_path, widths="toy", layers=6, seed=0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    with pytest.raises(ConfigError, match=r"1\.00 GB free.*expected: 6\.97 GB"):
        write_shape(WriteShapeConfig(out=tmp_path / "new" / "models", layers=6, widths="full", seed=0))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = safetensors.torch.save_file, []

    def fail_at_the_third(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", fail_at_the_third)
    with pytest.raises(ConfigError, match="No space left"):
        write_shape(WriteShapeConfig(out=tmp_path / "models", widths="toy", layers=6, seed=0))
    assert not list(tmp_path.iterdir())
