from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes.config import PROFILE, ServeShapeConfig
from server.arguments import check_server_args
from server.profile import load_profile


def config(**given: Any) -> ServeShapeConfig:
    return ServeShapeConfig.model_validate({"models": Path("/m"), **given})


@pytest.mark.parametrize("cuda", [False, True])
def test_the_servers_arguments_are_known_to_sglang_and_the_profile(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    asked = config(set=["server_args.attention_backend=triton" if cuda else "server_args.log_level=info"])
    profile = load_profile(PROFILE, asked.server_settings)
    check_server_args(profile.server_args)
    assert (profile.target, profile.drafter) == ("/m/target", "/m/drafter")
    assert profile.device == ("cuda" if cuda else "cpu")
    assert profile.drafter_notice is None
    assert asked.levels == ([1, 4, 16] if cuda else [1, 4])
    assert profile.server_args["max_running_requests"] == 32
    assert profile.server_args.get("cuda_graph_max_bs_decode") == (32 if cuda else None)


def test_another_batch_size_does_not_change_the_servers() -> None:
    """Their cells are kept."""
    assert config(batch="1,4").server_settings == config(batch="1,4,32").server_settings
    assert "server_args.max_running_requests=64" in config(batch="64").server_settings


def test_what_is_given_wins_over_what_is_set_here() -> None:
    asked = config(set=["server_args.context_length=512"])
    assert load_profile(PROFILE, asked.server_settings).server_args["context_length"] == 512
