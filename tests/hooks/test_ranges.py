"""Numbers out of range are refused before the scheduler sees them; what SGLang can compute passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_auf.hooks.ranges import (
    FLOATS,
    INTEGERS,
    MOST_ANSWERS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    check_answers,
    check_copies,
    check_detokenized,
    check_numbers,
)

VOCABULARY = 64
CONTEXT = 8
MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY, context_len=CONTEXT))
ALLOWED: list[dict[str, Any]] = [
    {},
    {"stop_token_ids": [0, VOCABULARY - 1, None], "n": MOST_CHOICES, "top_k": -1, "sampling_seed": -(2**63)},
    {"logit_bias": {"0": -100, str(VOCABULARY - 1): 100.0}, "temperature": 0, "max_new_tokens": None},
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("stop_token_ids", {"stop_token_ids": [VOCABULARY]}),
    ("stop_token_ids", {"stop_token_ids": 5}),
    ("logit_bias", {"logit_bias": {str(VOCABULARY): 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"1": 100.1}}),
    ("logit_bias", {"logit_bias": {"1": float("nan")}}),
    ("logit_bias", {"logit_bias": {"1": "1"}}),
    ("logit_bias", {"logit_bias": {"1": 10**400}}),
    ("logit_bias", {"logit_bias": [1]}),
    *((name, {name: high + 1}) for name, (_, high) in INTEGERS.items()),
    *((name, {name: low - 1}) for name, (low, _) in INTEGERS.items()),
    *((name, {name: 1.5}) for name in INTEGERS),
    *((name, {name: value}) for name in FLOATS for value in (float("nan"), float("inf"), 10**400, "1", True)),
]


def check(ids: list[int] | None = None, settings: dict[str, Any] | None = None, **fields: Any) -> None:
    request = GenerateReqInput(input_ids=ids, sampling_params=settings or {}, **fields)
    check_numbers(MANAGER, request, [1] if ids is None and "input_embeds" not in fields else ids)


@pytest.mark.parametrize("settings", ALLOWED)
def test_what_can_be_computed_passes(settings: dict[str, Any]) -> None:
    check([0, VOCABULARY - 1], settings, top_logprobs_num=VOCABULARY, logprob_start_len=2, token_ids_logprob=[0])


def test_numbers_of_numpy_are_numbers() -> None:
    """Callers of SGLang's Engine pass them."""
    ids: list[Any] = [np.int64(0), np.int32(VOCABULARY - 1)]
    check(ids, {"temperature": np.float32(0.5), "max_new_tokens": np.int64(4)})
    with pytest.raises(ValueError, match="input_ids"):
        check([*ids, np.int64(VOCABULARY)])


@pytest.mark.parametrize(("name", "settings"), REFUSED)
def test_a_setting_out_of_range_is_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        check([1], settings)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("input_ids", {"ids": [1, VOCABULARY]}),
        ("input_ids", {"ids": [-1]}),
        ("prompt is empty", {"ids": []}),
        ("top_logprobs_num", {"top_logprobs_num": VOCABULARY + 1}),
        ("top_logprobs_num", {"top_logprobs_num": -1}),
        ("logprob_start_len", {"ids": [1, 2], "logprob_start_len": 3}),
        ("logprob_start_len", {"logprob_start_len": -2}),
        ("token_ids_logprob", {"token_ids_logprob": [VOCABULARY]}),
        ("token_ids_logprob", {"token_ids_logprob": [0] * (MOST_LOGPROBS + 1)}),
        ("input_embeds", {"input_embeds": [[0.0] * 4]}),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        check(**fields)


@given(st.dictionaries(st.sampled_from([*INTEGERS, *FLOATS]), st.floats() | st.integers() | st.text() | st.none()))
def test_any_values_are_refused_or_fit(settings: dict[str, Any]) -> None:
    try:
        check([1], settings)
    except ValueError:
        return
    for name, (low, high) in INTEGERS.items():
        assert settings.get(name) is None or (isinstance(settings[name], int) and low <= settings[name] <= high)


def test_a_number_is_named_as_the_client_may_know_it() -> None:
    with pytest.raises(
        ValueError,
        match=r"max_new_tokens \(max_tokens or max_completion_tokens on OpenAI's routes\) must be an integer in",
    ):
        check([1], {"max_new_tokens": -1})


@pytest.mark.parametrize("settings", [{"n": 10**9}, [{"n": 1}, {"n": 0}], {"n": "2"}])
def test_a_request_is_not_copied_too_often(settings: Any) -> None:
    with pytest.raises(ValueError, match="n must be an integer in"):
        check_copies(SimpleNamespace(sampling_params=settings))


@pytest.mark.parametrize("settings", [None, {}, {"n": 2}, [{}, {"n": 3}]])
def test_other_requests_are_copied(settings: Any) -> None:
    check_copies(SimpleNamespace(sampling_params=settings))


@pytest.mark.parametrize(
    "asked",
    [
        {"text": ["Hi"] * MOST_ANSWERS},
        {"text": ["Hi"] * (MOST_ANSWERS // 4), "sampling_params": {"n": 4}},
        {"input_ids": [[5]] * (MOST_ANSWERS // 4), "sampling_params": [{"n": 4}] * (MOST_ANSWERS // 4)},
        {"text": "Hi" * MOST_ANSWERS, "sampling_params": {"n": 128}},
        {"input_ids": [5] * (MOST_ANSWERS + 1)},
        {"text": [], "sampling_params": []},
        {"text": "Hi", "sampling_params": {"n": "many"}},
    ],
)
def test_an_http_request_has_so_many_answers(asked: dict[str, Any]) -> None:
    check_answers(None, GenerateReqInput(**asked), http="a request")


@pytest.mark.parametrize(
    "asked",
    [
        {"text": ["Hi"] * (MOST_ANSWERS + 1)},
        {"input_ids": [[5]] * (MOST_ANSWERS // 4 + 1), "sampling_params": {"n": 4}},
        {"text": ["Hi"] * (MOST_ANSWERS // 4 + 1), "sampling_params": [{"n": 4}] * (MOST_ANSWERS // 4 + 1)},
    ],
)
def test_one_with_more_is_refused_and_sglangs_engine_takes_it(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{MOST_ANSWERS} answers \(prompts times n\), got"):
        check_answers(None, GenerateReqInput(**asked), http="a request")
    check_answers(None, GenerateReqInput(**asked))


def test_ids_behind_the_context_are_not_looked_at() -> None:
    """SGLang refuses such a prompt, or cuts it there."""
    check([1] * CONTEXT + [VOCABULARY])
    with pytest.raises(ValueError, match="input_ids"):
        check([1] * (CONTEXT - 1) + [VOCABULARY])


def test_an_embedding_request_has_ids_alone() -> None:
    check_numbers(MANAGER, SimpleNamespace(sampling_params=None), [1])
    with pytest.raises(ValueError, match="input_ids"):
        check_numbers(MANAGER, SimpleNamespace(sampling_params=None), [VOCABULARY])


def test_the_cap_of_top_logprobs_is_below_a_large_vocabulary() -> None:
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=10**6, context_len=CONTEXT))
    check_numbers(manager, GenerateReqInput(sampling_params={}, top_logprobs_num=MOST_LOGPROBS), [1])
    with pytest.raises(ValueError, match="top_logprobs_num"):
        check_numbers(manager, GenerateReqInput(sampling_params={}, top_logprobs_num=MOST_LOGPROBS + 1), [1])


def test_a_label_that_the_metrics_do_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    observability = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=["tenant"])
    monkeypatch.setattr("sglang.srt.runtime_context.get_observability", lambda: observability)
    check([1], custom_labels={"tenant": "a"})
    with pytest.raises(ValueError, match=r"\['tenant'\], got \['colour'\]"):
        check([1], custom_labels={"tenant": "a", "colour": "red"})


@pytest.mark.parametrize("given", ["b", ["a+", "b"]])
def test_a_stop_regex_is_refused_where_several_processes_would_have_to_agree(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = SimpleNamespace(tp_size=2)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: ranks)
    check([1], {"stop_regex": None, "stop": ["b"]})
    with pytest.raises(ValueError, match="stop_regex is not supported with --tp-size above 1"):
        check([1], {"stop_regex": given})
    ranks.tp_size = 1
    check([1], {"stop_regex": given})


@pytest.mark.parametrize(("tokens", "fits"), [([], True), ([0, 63], True), ([[1], [2, 64]], False), ([-1], False)])
def test_ids_to_detokenize_are_in_the_vocabulary(tokens: Any, fits: bool) -> None:
    serving, request = SimpleNamespace(tokenizer_manager=MANAGER), SimpleNamespace(tokens=tokens)
    if fits:
        check_detokenized(serving, request, request, None)
        return
    with pytest.raises(ValueError, match="tokens must have token ids"):
        check_detokenized(serving, request, request, None)
