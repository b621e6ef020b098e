"""What SGLang is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from server.arguments import OWNED, build_server_args, check_server_args, sglang_arguments
from server.profile import Profile
from sglang_auf.errors import ConfigError

DRAFTER = Path("/models/drafter")


def profile(**changes: Any) -> Profile:
    fields = {"target": "owner/target", "drafter": "owner/drafter", "device": "cpu", "served_model_name": "small"}
    return Profile.model_validate(fields | changes)


def test_speculation_is_asked_for() -> None:
    arguments = sglang_arguments(profile(block_size=8, port=1234), "/models/target", DRAFTER, api_key="secret")
    assert arguments["speculative_algorithm"] == "AUF"
    assert arguments["speculative_draft_model_path"] == "/models/drafter"
    assert arguments["speculative_num_draft_tokens"] == 8
    assert arguments["model_path"] == "/models/target"
    assert (arguments["host"], arguments["port"]) == ("127.0.0.1", 1234)
    assert (arguments["device"], arguments["dtype"]) == ("cpu", "bfloat16")
    assert (arguments["served_model_name"], arguments["api_key"]) == ("small", "secret")


def test_block_size_is_left_to_the_drafter() -> None:
    assert "speculative_num_draft_tokens" not in sglang_arguments(profile(), "/models/target", DRAFTER)


def test_plain_differs_in_speculation_only() -> None:
    served = profile(
        block_size=8,
        thinking="off",
        server_args={"max_running_requests": 4, "speculative_domino_candidate_pool_size": 0},
    )
    drafted = sglang_arguments(served, "/models/target", DRAFTER)
    plain = sglang_arguments(served, "/models/target", None)
    assert plain.items() <= drafted.items()
    assert {key for key in drafted if key not in plain} == {
        "speculative_algorithm",
        "speculative_draft_model_path",
        "speculative_num_draft_tokens",
        "speculative_domino_candidate_pool_size",
    }


@pytest.mark.parametrize(
    ("thinking", "kwargs"), [("off", {"enable_thinking": False}), ("on", {"enable_thinking": True}), (None, None)]
)
def test_thinking_becomes_the_default_of_the_chat_template(
    thinking: str | None, kwargs: dict[str, bool] | None
) -> None:
    arguments = sglang_arguments(profile(thinking=thinking), "/models/target", DRAFTER)
    assert arguments.get("default_chat_template_kwargs") == kwargs


def test_every_argument_exists_in_sglang() -> None:
    arguments = sglang_arguments(profile(block_size=8, thinking="on"), "/models/target", DRAFTER, "secret")
    record = ServerArgs(**arguments)
    assert record.speculative_algorithm == "AUF"
    assert set(OWNED) <= set(ServerArgs.__struct_fields__)


def test_good_server_args_pass() -> None:
    check_server_args(
        {
            "max_running_requests": 4,
            "mem_fraction_static": 0.5,
            "enable_metrics": True,
            "attention_backend": "flashinfer",
            "context_length": None,
        }
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_runing_requests": 4}, "did you mean max_running_requests"),
        ({"max_running_requests": "four"}, "max_running_requests = 'four'"),
        ({"max_running_requests": True}, "max_running_requests = True"),
        ({"enable_metrics": "yes"}, "enable_metrics = 'yes'"),
        ({"schedule_policy": "random-walk"}, "schedule_policy = 'random-walk'"),
        ({"tokenizer_worker_num": 2}, "tokenizer_worker_num = 2"),
        ({"fastapi_root_path": "/metrics-of/us"}, "API key"),
        ({"skip_server_warmup": True}, "skip_server_warmup"),
        ({"grpc_port": 40000}, "grpc_port = 40000"),
        ({"use_ray": True}, "use_ray = True"),
        ({"nnodes": 2}, "nnodes = 2"),
    ],
)
def test_bad_server_args_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_server_args(given)
    assert said in caught.value.found


@pytest.mark.parametrize("key", sorted(OWNED))
def test_what_the_profile_says_cannot_be_said_twice(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_server_args({key: "x"})
    assert OWNED[key] in caught.value.expected


def test_refusal_by_sglang_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: ServerArgs) -> None:
        raise ValueError("page size 3 does not divide the pool")

    monkeypatch.setattr(ServerArgs, "resolve_once", refuse)
    with pytest.raises(ConfigError, match="page size 3"):
        build_server_args(sglang_arguments(profile(), "/models/target", None))
