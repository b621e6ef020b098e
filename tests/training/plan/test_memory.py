"""The counted memory against the tensors of a real step, and what the recipes of Qwen3-8B come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_auf.errors import ConfigError
from sglang_auf.models import dflash
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.data.features import FrozenTarget
from sglang_auf.training.data.loader import BatchMaker, Plan
from sglang_auf.training.evaluation.held_out import HeldOutAnswers
from sglang_auf.training.initial_weights import shape_of
from sglang_auf.training.optimiser import make_optimisers
from sglang_auf.training.plan.memory import Sizes, _activations, plan, target_numbers
from sglang_auf.training.recipe import load_recipe
from sglang_auf.training.text.reader import Conversation
from tests.support import qwen3_8b
from tests.support.tiny_models import write_gemma4
from tests.support.training_runs import tiny_recipe, write_models


class Norm(torch.autograd.Function):  # type: ignore[misc]
    """Keeps what CUDA's kernel keeps: input, weight, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., 0].clone())
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class Attend(torch.autograd.Function):  # type: ignore[misc]
    """Keeps what flex attention keeps: q, all keys and values, its output, and a float32 for each row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.clone()
        ctx.save_for_backward(q, k, v, out, q[..., 0].float().clone())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and attention keep what their kernels on CUDA keep. The numbers are not the same."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, *geometry: Any) -> Tensor:
        keys, values = (torch.cat([a, b.flatten(1, 2)], dim=1) for a, b in ((context_k, k), (context_v, v)))
        return Attend.apply(q, keys, values)

    monkeypatch.setattr(dflash, "attend", attend)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))


@contextmanager
def kept(without: Callable[[Tensor], bool]) -> Iterator[dict[int, int]]:
    """Bytes of each piece of memory that a backward pass would need, but for tensors that `without` names."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not without(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_those_of_a_real_pass(like_a_gpu: None, layers: int, recompute: bool, precision: str) -> None:
    config = DrafterConfig.for_target(
        SHAPE, num_layers=layers, target_layer_ids=[1, 2, 4], block_size=5, mask_token_id=3
    )
    sizes = Sizes(rows=2, length=37, blocks=2 * 9, width=5, item=2 if precision == "bf16" else 4)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    drafter = Drafter(config)
    drafter.recompute = recompute
    features = torch.randn(2, 37, 144).to(dtype)
    embeddings = torch.randn(2, 9, 5, 48).to(dtype)
    weights = {tuple(sorted(parameter.shape)) for parameter in drafter.parameters()}
    anchors = torch.arange(1, 19).view(2, 9)

    def given(tensor: Tensor) -> bool:
        return tuple(sorted(tensor.shape)) in weights or tensor.untyped_storage().nbytes() == features.nbytes

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), kept(given) as found:
        drafter(features, embeddings, anchors)
    planned = _activations(config, sizes, recompute=recompute)
    del planned["drafter: gradients inside a layer"]
    if recompute:
        del planned["drafter: activations of one layer"]
    indices = 8 * (2 * sizes.tokens + sizes.context)  # positions, which are not counted
    assert 0 <= sum(found.values()) - sum(planned.values()) <= indices


def test_the_rest_is_what_a_run_holds(tmp_path: Path) -> None:
    recipe = tiny_recipe(*write_models(tmp_path), batch={"batch_rows": 2}, precision="bf16")
    target = Path(recipe.target)
    config = shape_of(recipe.drafter, target)
    drafter = Drafter(config)
    [adamw] = make_optimisers(drafter, recipe.optimiser)
    for parameter in drafter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    held = {
        "target: embedding and head": [],
        "drafter: weights, float32": list(drafter.parameters()),
        "drafter: gradients, float32": [parameter.grad for parameter in drafter.parameters()],
        "drafter: state of adamw, float32": [
            value for state in adamw.state.values() for key, value in state.items() if key != "step"
        ],
    }
    made = BatchMaker(recipe, target, torch.device("cpu"))
    held["target: embedding and head"] = [made.target.embedding, made.target.head]
    embedding = made.target._decoder.get_input_embeddings().weight
    layers = [each for each in made.target._decoder.parameters() if each is not embedding]
    held["target: layers up to the last tap"] = layers
    evaluated = HeldOutAnswers([Conversation(str(row), [5] * 40, [True] * 40) for row in range(4)], made, recipe)
    list(evaluated._batches())
    held["features of held-out rows, at most"] = [batch.features for batch in evaluated._kept]
    found = plan(recipe, config, target)
    assert found.always == {name: sum(each.nbytes for each in tensors) for name, tensors in held.items()}
    batch = made.batch([Conversation(str(row), [5] * 40, [True] * 40) for row in range(2)])
    assert found.backward["features"] == batch.features.nbytes

    for ranks in (2, 4):  # of 4 micro-batches: FSDP adds up whole gradients until a rank's last one
        shards = plan(recipe, config, target, ranks=ranks, sharded=True)
        for name, size in found.always.items():
            whole = not name.startswith("drafter") or ("gradients" in name and ranks == 2)
            assert shards.always[name] == (size if whole else size // ranks)
    cached = plan(recipe.model_copy(update={"features": "a-cache"}), config, target)
    assert "target: layers up to the last tap" not in cached.always
    with pytest.raises(ConfigError, match="micro_batches 4 on 3 ranks"):
        plan(recipe, config, target, ranks=3)


def test_many_short_rows_are_the_largest_micro_batch(tmp_path: Path) -> None:
    recipe = tiny_recipe(*write_models(tmp_path), batch={"micro_batches": 1})
    made = BatchMaker(recipe, Path(recipe.target), torch.device("cpu"))
    sizes = Sizes.of(recipe)
    chats = [Conversation(str(row), [5] * sizes.length, [True] * sizes.length) for row in range(200)]
    largest = max(Plan(chats, recipe).at(0)[1], key=len)
    batch, anchors, valid = made.with_anchors([chats[row] for row in largest], 0)
    assert (sizes.blocks, sizes.context) == (int(valid.sum()), batch.input_ids.numel())
    assert anchors.shape == (30, 3)  # 30 rows of 4 tokens, where 3 rows of 40 tokens have 9 blocks
    long = tiny_recipe(recipe.target, "", batch={"batch_rows": 3})
    assert (Sizes.of(long).rows, Sizes.of(long).length) == (3, 40)


def test_a_step_of_domino_holds_the_features_of_all_its_micro_batches(tmp_path: Path) -> None:
    domino = {"drafter": {"head": "domino", "gru_hidden_dim": 8, "emb_dim": 4}, "objective": {"name": "b-auf"}}
    recipe = tiny_recipe(*write_models(tmp_path), **domino)
    target = Path(recipe.target)
    config = shape_of(recipe.drafter, target)
    found = {ranks: plan(recipe, config, target, ranks=ranks) for ranks in (1, 2, 4)}
    one = found[4].backward["features"]
    assert [found[ranks].backward["features"] for ranks in (1, 2)] == [4 * one, 2 * one]
    assert [found[ranks].features["features"] for ranks in (1, 2)] == [4 * one, 2 * one]
    cached = plan(recipe.model_copy(update={"features": "a-cache"}), config, target)
    assert cached.backward["features"] == 5 * one


def test_a_scaled_embedding_is_held_beside_the_weight(tmp_path: Path) -> None:
    target = write_gemma4(tmp_path / "gemma4")
    recipe = tiny_recipe(*write_models(tmp_path))
    held = FrozenTarget(target, layers=recipe.drafter.target_layer_ids[-1] + 1)
    decoder = sum(parameter.numel() for parameter in held._decoder.parameters())
    layers, tables = target_numbers(target, recipe)
    assert tables == held.embedding.numel() + held.head.numel()
    assert layers == decoder - held.head.numel()


def test_labels_of_the_target_need_all_its_layers(tmp_path: Path) -> None:
    recipe = tiny_recipe(*write_models(tmp_path))
    target = Path(recipe.target)
    numbers = [
        target_numbers(target, recipe.model_copy(update={"objective": recipe.objective.model_copy(update=change)}))
        for change in ({}, {"labels": "target"})
    ]
    assert numbers[0][0] < numbers[1][0] and numbers[0][1] == numbers[1][1]


@pytest.mark.parametrize(
    ("name", "changes", "peak"),
    [
        ("qwen3-8b-dflash-auf", [], 52.8),
        ("qwen3-8b-dflash-auf", ["batch.recompute=false"], 76.7),
        ("qwen3-8b-domino-b-auf", [], 52.5),
    ],
)
def test_the_recipes_of_qwen3_8b_fit_an_h100(tmp_path: Path, name: str, changes: list[str], peak: float) -> None:
    recipe, target = load_recipe(name, changes), qwen3_8b.write_target(tmp_path)
    found = plan(recipe, shape_of(recipe.drafter, target), target)
    assert found.peak / 1e9 == pytest.approx(peak, abs=0.05)
