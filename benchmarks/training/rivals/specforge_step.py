"""SpecForge's DFlash step: OnlineDFlashModel, which computes its objective in checkpointed chunks of 128 blocks."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.training.rivals.protocol import DriverJob, MakeStep, Step, serve


def prepare(job: DriverJob, attention: str) -> MakeStep:
    """With bf16 the weights are bf16 too, as in its trainer (model.torch_dtype)."""
    config = import_module("transformers").Qwen3Config(**job["drafter"])
    config._attn_implementation = attention
    family = import_module("specforge.algorithms.common.dflash_family_model")
    drafter = import_module("specforge.modeling.draft.dflash").DFlashDraftModel(config)
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    embedding = nn.Embedding(config.vocab_size, config.hidden_size)
    for frozen in (head, embedding):
        frozen.requires_grad_(False)
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    model = family.OnlineDFlashModel(
        drafter,
        head,
        embedding,
        mask_token_id=config.dflash_config["mask_token_id"],
        block_size=config.block_size,
        attention_backend=attention,
        loss_decay_gamma=job["gamma"],
    ).to(job["device"], dtype)
    taps = len(config.dflash_config["target_layer_ids"])

    def make_step(length: int, anchors: int, number: int) -> Step:
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, config.vocab_size, (1, length), generator=generator).to(job["device"])
        features = torch.randn(1, length, taps * config.hidden_size, generator=generator).to(job["device"], dtype)
        answer = torch.ones(1, length, device=job["device"])
        model.num_anchors = anchors

        def step() -> Tensor:
            loss: Tensor = model(text, features, answer)[0]
            loss.backward()
            return loss

        return step

    return make_step


if __name__ == "__main__":
    serve(
        "specforge",
        ["flex_attention", "sdpa", "eager"],
        prepare,
        "with bf16, its weights are bf16 (the float32 ones are its optimiser's)",
    )
