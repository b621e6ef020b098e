"""What serve-shape is asked to do, and the arguments of its servers."""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.harness.config import CommandConfig, Counts
from benchmarks.shapes.qwen3_8b import DRAFTER
from benchmarks.shapes.write import DRAFTER_DIR, TARGET_DIR, WrittenShape
from sglang_auf.errors import ConfigError
from sglang_auf.files import CONFIG, read_json
from sglang_auf.provenance import sha256_of

PROFILE = "qwen3-8b"
CONTEXT = 2048
BLOCK = int(DRAFTER["block_size"])
LARGEST_BATCH = 32
"""Requests that servers are made for, even if fewer are asked: cells of another --batch are then kept."""
FIRST_STEPS = 2
"""Steps of the shorter of the two requests whose difference is measured (steps.py)."""


class ServeShapeConfig(CommandConfig):
    """Serve what write-shape wrote: identity with plain decoding, memory, and what a step costs; cells are kept."""

    models: Path = Field(description="directory that write-shape wrote")
    settings: tuple[str, ...] = Field((), alias="set", description="key=value for every server; may be repeated")
    concurrency: Counts | None = Field(None, description="requests in flight for identity (default: 1,4; CUDA: 16 too)")
    prompts: int = Field(16, ge=1, description="random prompts whose greedy answers are compared")
    max_tokens: int = Field(32, ge=2, description="new tokens of each of these answers")
    batch: Counts = Field((1, 2, 4, 8, 16, 32), description="batch sizes of the step table")
    emitted: int = Field(3, ge=1, description="tokens that every verify step is forced to emit in the step table")
    steps: int = Field(16, ge=1, description="steps in a measurement")
    rounds: int = Field(3, ge=1, description="measurements of each cell; medians are reported")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each random prompt")
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")
    start_timeout_s: float = Field(900.0, gt=0, description="seconds a server may take to be ready")
    out: Path = Field(Path("runs/serve-shape"), description="result directory; finished cells in it are kept")

    @cached_property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def levels(self) -> list[int]:
        """Concurrencies of the identity check, ascending."""
        return sorted(set(self.concurrency or ((1, 4, 16) if self.device == "cuda" else (1, 4))))

    @property
    def batches(self) -> list[int]:
        return sorted(set(self.batch))

    @cached_property
    def target(self) -> dict[str, Any]:
        """config.json of the target. Raises ConfigError where there is none."""
        return read_json(self.models / TARGET_DIR / CONFIG, ConfigError)

    @property
    def written(self) -> dict[str, Any]:
        """What tells these models from others that were at the same path: both configurations, and the weights' seed.

        seed: None where there is no file of write-shape beside the models.
        """
        models = {name: self.models / name / CONFIG for name in (TARGET_DIR, DRAFTER_DIR)}
        found: dict[str, Any] = {name: sha256_of([file])[CONFIG] for name, file in models.items()}
        said = self.models / f"{WrittenShape.STEM}.json"
        return found | {"seed": read_json(said, ConfigError)["config"]["seed"] if said.is_file() else None}

    @property
    def longest(self) -> int:
        """Tokens of the longest request of the step table."""
        return self.prompt_tokens + 1 + (FIRST_STEPS + self.steps) * self.emitted

    @property
    def server_settings(self) -> list[str]:
        """Settings of the profile for every server. Other than the profile's: the models, and what is limited here."""
        most = max(LARGEST_BATCH, *self.batches, *self.levels)
        found = [
            f"target={self.models / TARGET_DIR}",
            f"drafter={self.models / DRAFTER_DIR}",
            f"device={self.device}",
            f"server_args.context_length={CONTEXT}",
            f"server_args.max_running_requests={most}",
        ]
        if self.device == "cuda":  # no graphs are captured for batches that are never asked
            found.append(f"server_args.cuda_graph_max_bs_decode={most}")
        return [*found, *self.settings]

    def check(self) -> None:
        """Raises ConfigError for what would fail only after a server has loaded."""
        if not (self.models / DRAFTER_DIR / CONFIG).is_file():
            raise ConfigError(f"no drafter in {self.models}", "what write-shape wrote", "run write-shape --out first")
        if self.prompts < max(self.levels):
            raise ConfigError(
                f"{self.prompts} prompts and concurrency {max(self.levels)}",
                "at least as many prompts as are to be in flight",
                "raise --prompts, or lower --concurrency",
            )
        # Of a chat there are some tokens beside the prompt's; a block may reach behind the last token.
        if max(self.longest, self.prompt_tokens + self.max_tokens + 16) + BLOCK > CONTEXT:
            raise ConfigError(
                f"requests of {max(self.longest, self.prompt_tokens + self.max_tokens)} tokens",
                f"prompt and answer within {CONTEXT} tokens",
                "lower --prompt-tokens, --steps, --emitted or --max-tokens",
            )

    def random_prompt(self, *name: object) -> list[int]:
        """Ids of words of the tokenizer, the same for the same name."""
        generator = random.Random("/".join(map(str, name)))
        return [generator.randrange(self.target["bos_token_id"]) for _ in range(self.prompt_tokens)]
