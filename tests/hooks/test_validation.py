"""Requests that cannot be honoured are refused with a reason; all others pass."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_auf.hooks import validation
from sglang_auf.hooks.validation import openai_complaint, refusal, speculates, validate_dflash_request

PENALTIES = {"frequency_penalty": 0.3, "presence_penalty": -0.5, "repetition_penalty": 1.1, "min_new_tokens": 4}
NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}


@pytest.mark.parametrize(("name", "value"), PENALTIES.items())
def test_a_penalty_is_refused_by_name_and_value_where_batches_are_mixed(name: str, value: float) -> None:
    """There the next token is drawn with SGLang's own state of a request's penalties, which saw none of its tokens."""
    assert refusal(SamplingParams(**{name: value})) is None
    reason = refusal(SamplingParams(**{name: value}), mixed_chunk=True)
    assert reason is not None
    assert f"{name}={value}" in reason
    assert "--enable-mixed-chunk" in reason


@pytest.mark.parametrize(("name", "value"), NEUTRAL.items())
@pytest.mark.parametrize("none", [False, True])
def test_a_neutral_penalty_is_accepted(name: str, value: float, none: bool) -> None:
    given = {name: None if none else value}
    assert refusal(SamplingParams(**given), mixed_chunk=True) is None
    assert refusal(SimpleNamespace(custom_params=None, **{**NEUTRAL, **given}), mixed_chunk=True) is None


def test_ordinary_sampling_is_accepted() -> None:
    parameters = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, sampling_seed=3, logit_bias={"5": 1.5}, stop=["."], n=2
    )
    assert refusal(parameters) is None


def test_a_sampling_mask_is_refused() -> None:
    reason = refusal(SamplingParams(), return_sampling_mask=True)
    assert reason is not None
    assert "return_sampling_mask" in reason


def test_scores_inside_a_prompt_are_refused() -> None:
    """SGLang would answer with other positions' scores, and without a word."""
    reason = refusal(SamplingParams(max_new_tokens=0), token_indices_to_pool=[3, 5])
    assert reason is not None
    assert "token_indices_to_pool" in reason and "score_extraction_token_id" in reason


def test_min_p_is_refused_where_sglangs_seeded_sampler_draws() -> None:
    """Its assertion would end the engine."""
    reason = refusal(SamplingParams(min_p=0.1), deterministic=True)
    assert reason is not None
    assert "min_p=0.1" in reason
    assert refusal(SamplingParams(temperature=0.7, top_p=0.9, sampling_seed=3), deterministic=True) is None
    assert refusal(SamplingParams(min_p=0.1)) is None


@pytest.mark.parametrize(
    ("custom", "speculating"),
    [
        (None, True),
        ({}, True),
        ({"thinking_budget": 5}, True),
        ({"speculative": True}, True),
        ({"speculative": False, "thinking_budget": 5}, False),
    ],
)
def test_a_request_may_ask_for_no_drafts(custom: Any, speculating: bool) -> None:
    assert speculates(custom) is speculating
    assert refusal(SamplingParams(custom_params=custom)) is None


@pytest.mark.parametrize("value", [None, 0, 1, "false", [False]])
def test_what_is_neither_true_nor_false_is_refused(value: Any) -> None:
    """A client that writes "false" or 0 wants something, and would get the opposite."""
    reason = refusal(SamplingParams(custom_params={"speculative": value}))
    assert reason is not None
    assert f"custom_params.speculative={value!r}" in reason


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's settings, as the scheduler's process has them; off."""
    set_flags = SimpleNamespace(enable_deterministic_inference=False, enable_mixed_chunk=False)
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: SimpleNamespace(deterministic=set_flags))
    monkeypatch.setattr("sglang.srt.runtime_context.get_schedule", lambda: set_flags)
    return set_flags


def request(**parameters: Any) -> SimpleNamespace:
    settings = SamplingParams(**parameters)
    asked = {"return_sampling_mask": False, "return_hidden_states": False, "token_indices_to_pool": None}
    return SimpleNamespace(sampling_params=settings, **asked)


def test_the_hook_keeps_sglangs_own_refusal_and_adds_ours(flags: SimpleNamespace) -> None:
    assert validate_dflash_request("no hidden states", request(min_new_tokens=3), True) == "no hidden states"
    assert validate_dflash_request(None, request(min_new_tokens=3), True) is None
    flags.enable_mixed_chunk = True
    assert "min_new_tokens=3" in str(validate_dflash_request(None, request(min_new_tokens=3), True))
    assert validate_dflash_request(None, request(), True) is None
    for name in ("return_sampling_mask", "return_hidden_states", "token_indices_to_pool"):
        asking = request()
        setattr(asking, name, True)
        assert name in str(validate_dflash_request(None, asking, False))
        assert not asking.return_sampling_mask  # SGLang runs the request all the same
    assert validate_dflash_request(None, request(min_p=0.1), True) is None
    flags.enable_deterministic_inference = True
    refused = request(min_p=0.1)
    assert "min_p" in str(validate_dflash_request(None, refused, True))
    assert refused.sampling_params.min_p == 0  # with it SGLang's sampler would end the engine all the same


# --- what OpenAI's API calls an error ---

NAMES = ("auf", "/models/auf")


def chat(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"model": "auf", "messages": [{}], "max_tokens": None} | fields)


@pytest.mark.parametrize("name", [*NAMES, "default", None])
def test_the_served_model_is_answered_by_each_of_its_names(name: str) -> None:
    assert openai_complaint(chat(model=name), *NAMES) is None


def test_another_model_is_not_found() -> None:
    complaint = openai_complaint(chat(model="gpt-4"), *NAMES)
    assert complaint is not None
    assert complaint[:2] == (404, "NotFoundError")
    assert complaint[2] == "model 'gpt-4' does not exist; this server has 'auf'", "without a path of the server"
    assert "auf" in complaint[2]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_without_room_for_a_token_is_a_bad_request(name: str) -> None:
    complaint = openai_complaint(chat(**{name: 0}), *NAMES)
    assert complaint is not None
    assert complaint[0] == 400
    assert name in complaint[2]
    assert openai_complaint(chat(**{name: 1}), *NAMES) is None


def test_a_completion_of_no_tokens_is_openais_way_to_score_a_prompt() -> None:
    assert openai_complaint(SimpleNamespace(model="auf", prompt="x", max_tokens=0), *NAMES) is None


@pytest.mark.parametrize(
    ("ours", "model", "answer"), [(True, "gpt-4", 404), (True, "auf", "served"), (False, "gpt-4", "served")]
)
def test_the_route_answers_what_is_wrong_on_an_auf_server_only(
    ours: bool, model: str, answer: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "serves_auf", lambda: ours)
    serving = SimpleNamespace(
        tokenizer_manager=SimpleNamespace(served_model_name="auf", model_path="/models/auf"),
        create_error_response=lambda *, message, err_type, status_code: status_code,
    )

    async def original(serving: Any, request: Any, raw_request: Any) -> str:
        return "served"

    assert asyncio.run(validation.handle_openai_request(original, serving, chat(model=model), None)) == answer
