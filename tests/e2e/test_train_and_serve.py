"""A drafter trained here on a few answers, exported, and served by the real engine: it drafts what it learnt.

Features, positions, labels, masks, export and serving must all agree: with one off-by-one error the served tau stays
near 1, whatever the training loss is.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import run_engine
from tests.support.tiny_models import VOCABULARY, write_target

pytestmark = pytest.mark.e2e

BLOCK = 4
TOKENS = 49
"""One from the prefill, and twelve full blocks for a drafter that is always right."""
LEARNT = TOKENS + BLOCK
"""The last verify step may look past the end of what is asked for."""
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
MASK = 3
HELD_OUT = 2


class Agreeing:
    """A transformers model that chooses the engine's token wherever the engine has chosen one.

    In bf16 a target of random weights has a near tie every few dozen tokens, and transformers rounds products otherwise
    than SGLang. Features, drafter and the mechanics of blocks are the torch models'.
    """

    def __init__(self, model: Any, sequence: list[int]) -> None:
        self._model, self._sequence = model, sequence
        self.config, self.device = model.config, model.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: Any, past_key_values: Any, **arguments: Any) -> Any:
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        output = self._model(ids, past_key_values=past_key_values, **arguments)
        for slot, token in enumerate(self._sequence[start + 1 : start + 1 + ids.shape[1]]):
            output.logits[0, slot, token] = float("inf")
        return output


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target, with a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    directory = write_target(tmp_path_factory.mktemp("overfit") / "target")
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rows(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twelve prompts and what the engine answers without speculation, as rows of training data."""
    generator = random.Random(3)
    count = 10 + HELD_OUT
    prompts = [[generator.randrange(4, VOCABULARY) for _ in range(generator.randint(5, 30))] for _ in range(count)]
    engine = {"model_path": str(target), "context_length": 256}
    job = {"inputs": prompts, "sampling": GREEDY | {"max_new_tokens": LEARNT}, "concurrency": 4}
    (replies,) = run_engine(tmp_path_factory.mktemp("plain"), engine, [job])
    return [
        {"id": str(number), "prompt_ids": prompt, "response_ids": reply["ids"]}
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


@pytest.fixture(scope="module")
def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ten rows that a training learns. The other two it holds out, and they say nothing here."""
    from sglang_auf.training.text.reader import Conversation
    from sglang_auf.training.text.split import split_held_out

    conversations = [
        Conversation(
            row["id"],
            row["prompt_ids"] + row["response_ids"],
            [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"]),
        )
        for row in rows
    ]
    learnt = {conversation.id for conversation in split_held_out(conversations, count=HELD_OUT)[0]}
    return [row for row in rows if row["id"] in learnt]


def trained(target: Path, rows: list[dict[str, Any]], directory: Path, **drafter: Any) -> Path:
    """A drafter overfitted on the rows, as it would be exported for a user."""
    from sglang_auf.training.export import export_checkpoint
    from sglang_auf.training.recipe import parse_recipe
    from sglang_auf.training.trainer import train

    data = directory / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = "b-auf" if drafter.get("head") == "domino" else "auf"
    recipe = parse_recipe(
        {
            "target": str(target),
            "data": {"sources": [str(data)], "max_length": 128, "held_out": HELD_OUT},
            "drafter": {
                "num_layers": 1,
                "target_layer_ids": [1, 2],
                "block_size": BLOCK,
                "mask_token_id": MASK,
                **drafter,
            },
            "objective": {"name": objective, "lambda_ratio": 0.5},
            "optimiser": {"name": "muon", "lr": 0.003, "muon_lr": 0.02},
            "schedule": {"max_steps": 250},
            "batch": {"batch_tokens": 2048, "anchors_per_row": 64},
            "evaluate_every": 125,
            "save_every": 250,
            "log_every": 50,
        },
        "of this test",
    )
    train(recipe, directory / "run")
    return export_checkpoint(directory / "run", directory / "drafter")


@pytest.mark.parametrize(
    "shape", [{}, {"head": "domino", "gru_hidden_dim": 32, "emb_dim": 16}], ids=["dflash", "domino"]
)
def test_overfitted_drafter_is_served_as_the_torch_models_decode(
    target: Path, rows: list[dict[str, Any]], answers: list[dict[str, Any]], tmp_path: Path, shape: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    from sglang_auf.models.loading import load_drafter
    from tests.reference.rollout import rollout

    drafter = trained(target, rows, tmp_path, **shape)
    engine = {
        "model_path": str(target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(drafter),
        "speculative_domino_candidate_pool_size": 0,
    }
    prompts = [row["prompt_ids"] for row in answers]
    # The complete chain in every step, which the reference verifies too.
    chain = {"SGLANG_AUF_TREE": "0"} if "head" not in shape else {"SGLANG_AUF_TREE_NODES": str(BLOCK - 1)}
    (served,) = run_engine(tmp_path, engine, [{"inputs": prompts, "sampling": GREEDY, "concurrency": 4}], **chain)
    assert [reply["ids"] for reply in served] == [row["response_ids"][:TOKENS] for row in answers]

    histograms = [reply["meta"]["spec_correct_drafts_histogram"] for reply in served]
    steps = sum(sum(histogram) for histogram in histograms)
    assert len(answers) * (TOKENS - 1) / steps >= 0.9 * BLOCK

    import torch

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    weights = load_drafter(drafter).bfloat16().eval()
    reference = [
        rollout(
            Agreeing(model, row["prompt_ids"] + row["response_ids"]),  # type: ignore[arg-type]
            weights,
            row["prompt_ids"],
            max_new_tokens=TOKENS,
            stop_ids=(),
        )
        for row in answers
    ]
    assert histograms == [decoded.histogram for decoded in reference]
