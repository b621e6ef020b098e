"""speculators' DFlash step: DFlashDraftModel with its cross-entropy and fixed exponential decay."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.training.rivals.protocol import DriverJob, MakeStep, Step, serve


def prepare(job: DriverJob, attention: str) -> MakeStep:
    """With bf16 the weights are float32, under autocast, as in its trainer. Its fused losses need CUDA."""
    drafter = job["drafter"]
    config = import_module("transformers").Qwen3Config(**drafter)
    config._attn_implementation = attention
    dflash = import_module("speculators.models.dflash")
    losses = import_module("speculators.losses")
    taps = drafter["dflash_config"]["target_layer_ids"]
    model = dflash.DFlashDraftModel(
        dflash.DFlashSpeculatorConfig(
            transformer_layer_config=config,
            draft_vocab_size=config.vocab_size,
            block_size=drafter["block_size"],
            aux_hidden_state_layer_ids=[layer + 1 for layer in taps],
            mask_token_id=drafter["dflash_config"]["mask_token_id"],
        )
    ).to(job["device"])
    for frozen in (model.embed_tokens, model.lm_head, model.verifier_lm_head):  # nan until a target is loaded
        nn.init.normal_(frozen.weight, std=0.02)
    loss_config = losses.resolve_loss_config("ce", "fused" if job["device"] == "cuda" else "eager")
    bf16 = job["precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32

    def make_step(length: int, anchors: int, number: int) -> Step:
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(number)
        batch = {
            "input_ids": torch.randint(0, config.vocab_size, (1, length), generator=generator),
            "hidden_states": torch.randn(1, length, len(taps) * config.hidden_size, generator=generator).to(dtype),
            "verifier_last_hidden_states": torch.randn(1, length, config.hidden_size, generator=generator).to(dtype),
            "loss_mask": torch.ones(1, length),
            "document_ids": torch.zeros(1, length, dtype=torch.long),
        }
        batch = {name: tensor.to(job["device"]) for name, tensor in batch.items()}

        def step() -> Tensor:
            with torch.autocast(job["device"], torch.bfloat16, enabled=bf16):
                loss: Tensor = model(**batch, loss_config=loss_config, gamma=job["gamma"], max_anchors=anchors)[1]
            loss.backward()
            return loss

        return step

    return make_step


if __name__ == "__main__":
    serve(
        "speculators",
        ["simple_flex_attention", "sdpa", "eager"],
        prepare,
        "also computes the target's logits of every slot, whose argmax its labels are",
    )
