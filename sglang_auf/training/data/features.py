"""Features: the target's hidden states, from which a drafter knows the text so far.

The frozen target computes them here, batch by batch, or they are read from a cache (feature_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from sglang_auf.checkpoints.prepare import resolve_target
from sglang_auf.checkpoints.tappable import NOT_AT_OUTPUTS
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import ConfigError, TargetError
from sglang_auf.files import find_model
from sglang_auf.models.products import bf16_products
from sglang_auf.training.data.batching import to_device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

LOGIT_ROWS = 256
"""Positions whose logits are in memory at one time."""

CPU_TOKENS = 1280
"""Padded tokens of one forward on a CPU: with fewer the weights are read too often, with more the caches overflow."""

FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model")
"""What is fetched of a target on the hub: configuration, tokenizer, weights."""


def find_target(name: str, revision: str | None = None) -> Path:
    """The directory of a target given as a path, a hub id or the name of a prepared one. Raises TargetError."""
    return find_model(resolve_target(name), FILES, TargetError, revision)


class FeatureSource(Protocol):
    """Where the trainer gets features from. device: of the features that it returns."""

    device: torch.device

    def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Features [R, S, T * H] of R conversations in the target's dtype; zero at and after a row's length.

        ids: of the conversations. input_ids [R, S]: right padded. lengths [R]. On a GPU nothing waits where these two
        are on the CPU.
        """
        ...


class FrozenTarget:
    """The embedding, the head and the first layers of a target, none of them trained.

    embedding [V, H]: what the target's embedding gives for each token, scaled where it scales. head [V, H]: the same
    tensor where the target ties them and does not scale. config: the language model's, as transformers reads it.
    facts: by which caches and cards identify it.
    """

    def __init__(
        self, directory: str | Path, *, layers: int | None = None, dtype: str = "bfloat16", device: str = "cpu"
    ) -> None:
        """layers: how many of them to keep, from the first (None: all; 0 where features come from a cache).

        Raises TargetError when `directory` holds no complete causal language model, ConfigError for another dtype.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
        self.directory = Path(directory)
        self.facts = TargetFacts.of(self.directory)
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        model = _load(self.directory, self.dtype)
        self._decoder = model.get_decoder()
        self._decoder.layers = self._decoder.layers[:layers]
        self._decoder.to(self.device)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings().weight
        rows = embedding_rows(embedding)
        self.embedding: Tensor = rows.detach().to(self.device)
        self.head: Tensor = self.embedding if head is rows else head.detach().to(self.device)
        self.config: dict[str, Any] = model.config.get_text_config().to_dict()

    @property
    def hidden_size(self) -> int:
        return self.facts.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size


class OnlineFeatures(FrozenTarget):
    """Features computed by the target itself: the outputs of the tapped layers, side by side in layer order.

    SGLang captures the same before the next layer; for layer k it is hidden_states[k + 1] of transformers.
    A row's features do not depend on other rows or on padding, except for rounding: products in bfloat16 may round
    differently in a batch of another shape. The same batch gives the same bits on one machine and number of threads.
    """

    def __init__(
        self,
        directory: str | Path,
        layer_ids: Sequence[int],
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        argmax: bool = False,
    ) -> None:
        """layer_ids: 0-based, ascending. argmax: also keep the layers after the last tap, which with_argmax needs.

        Raises as check_taps and FrozenTarget.
        """
        self.layer_ids = tuple(layer_ids)
        check_taps(self.layer_ids, TargetFacts.of(Path(directory)))
        super().__init__(directory, layers=None if argmax else self.layer_ids[-1] + 1, dtype=dtype, device=device)
        self._has_all_layers = argmax

    @property
    def width(self) -> int:
        """T * H."""
        return len(self.layer_ids) * self.hidden_size

    def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
        """As FeatureSource; ids are not used."""
        features = self._blank(input_ids)
        for row, (tapped, _) in enumerate(self._rows(input_ids, lengths)):
            features[row, : len(tapped)] = tapped
        return features

    def with_argmax(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and [R, S] int64: at position t the token that the target would put at t + 1.

        It is 0 at and after a row's length. Of equal logits, in the target's dtype, the first counts.
        """
        assert self._has_all_layers, "with_argmax needs OnlineFeatures(..., argmax=True)"
        features = self._blank(input_ids)
        argmax = torch.zeros(input_ids.shape, dtype=torch.long, device=self.device)
        for row, (tapped, last) in enumerate(self._rows(input_ids, lengths)):
            features[row, : len(tapped)] = tapped
            with bf16_products(self.device):
                argmax[row, : len(last)] = torch.cat(
                    [F.linear(states, self.head).argmax(-1) for states in last.split(LOGIT_ROWS)]
                )
        return features, argmax

    def _blank(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, self.width, dtype=self.dtype, device=self.device)

    def _rows(self, input_ids: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each row (tapped [length, T * H], states after the final norm [length, H])."""
        if input_ids.device != self.device:
            input_ids = to_device(input_ids, self.device)
        together = len(input_ids)
        if self.device.type == "cpu":
            together = max(1, CPU_TOKENS // input_ids.shape[1])
        for part, of in zip(input_ids.split(together), lengths.split(together), strict=True):
            tapped, last = self._forward(part[:, : int(of.max())])
            for row, length in enumerate(of.tolist()):
                yield tapped[row, :length], last[row, :length]

    def _forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[R, S] -> [R, S, T * H] and [R, S, H].

        No padding mask is needed: padding is on the right, and causal attention never looks ahead.
        """
        tapped: list[Tensor] = []
        hooks = [
            self._decoder.layers[layer].register_forward_hook(lambda _module, _inputs, states: tapped.append(states))
            for layer in self.layer_ids
        ]
        try:
            with torch.no_grad(), bf16_products(self.device):
                last: Tensor = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(tapped, dim=-1), last


def check_taps(layer_ids: Sequence[int], target: TargetFacts, remedy: str = "") -> None:
    """Raises ConfigError for layers that SGLang does not tap at their outputs, TargetError where it can tap none.

    remedy: what else may be said where the layers came from.
    """
    tappable = target.tappable_layers
    if target.architecture in NOT_AT_OUTPUTS:
        raise ConfigError(
            f"a drafter for {target.name}, of the architecture {target.architecture}",
            "a target whose layers SGLang taps at their outputs, as this trainer does",
        )
    ascending = list(layer_ids) == sorted(set(layer_ids))
    if layer_ids and ascending and layer_ids[0] >= 0 and layer_ids[-1] < tappable:
        return
    raise ConfigError(
        f"target layers {list(layer_ids)}",
        f"one or more of 0..{tappable - 1}, ascending: SGLang taps these of {target.name}'s {target.num_layers} layers",
        remedy,
    )


def embedding_rows(embedding: Any) -> Tensor:
    """[V, H]: the rows that transformers' embedding module gives, in its dtype; its weight itself where it scales none.

    Gemma 4 multiplies by sqrt(H), rounded to the dtype. SGLang embeds a block with the target's module, which does the
    same, but rounds the product alone.
    """
    weight: Tensor = embedding.weight
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        return weight * scale.to(weight)
    return weight if scale == 1.0 else weight * scale


def _load(directory: Path, dtype: torch.dtype) -> Any:
    """The model in `directory`. Raises TargetError, also where it lacks a weight."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="sdpa", dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TargetError(
            f"transformers cannot load {directory} ({type(error).__name__}: {reason})",
            "a causal language model with its weights",
            "fetch the target again, or give another",
        ) from error
    if missing := sorted(report["missing_keys"]):  # which transformers would fill with random numbers
        raise TargetError(
            f"{directory} has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}",
            "a checkpoint with every weight of the target",
            "fetch the target again",
        )
    return model.eval().requires_grad_(False)
