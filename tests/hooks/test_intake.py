"""What a request breaks before the scheduler has it is refused; what is right passes unchanged."""

from __future__ import annotations

import asyncio
import re
import threading
from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.observability.req_time_stats import monotonic_time
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_auf.hooks.intake import LONG, admit, beside, check_origin, check_types, refuse_faults, tokenize


def tokenized(**changes: Any) -> TokenizedGenerateReqInput:
    good = TokenizedGenerateReqInput(
        rid="a",
        input_text="Hi",
        input_ids=array("q", [1, 2]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(max_new_tokens=4, logit_bias={"1": 0.5}, custom_params={"a": object()}),
        return_logprob=True,
        logprob_start_len=-1,
        top_logprobs_num=2,
        token_ids_logprob=[1],
        stream=False,
        time_stats=object(),
    )
    return msgspec.structs.replace(good, **changes)


def test_the_schedulers_types_pass_and_nothing_changes() -> None:
    request = tokenized(extra_key="tenant", priority=3)
    before = msgspec.structs.asdict(request)
    check_types(request)
    assert msgspec.structs.asdict(request) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_id": []},
        {"lora_id": 3},
        {"extra_key": ["a"]},
        {"bootstrap_room": "a"},
        {"top_logprobs_num": [1]},
        {"token_ids_logprob": [[1]]},
        {"return_routed_experts": "yes"},
        {"positional_embed_overrides": ""},
        {"sampling_params": msgspec.structs.replace(SamplingParams(), max_new_tokens="4")},
    ],
    ids=str,
)
def test_another_type_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        check_types(tokenized(**changes))


def test_numbers_of_numpy_are_numbers() -> None:
    """Callers of SGLang's Engine pass them."""
    settings = SamplingParams(max_new_tokens=np.int64(4), temperature=np.float32(0.5))
    check_types(tokenized(top_logprobs_num=np.int64(2), sampling_params=settings))


def test_an_integer_that_fits_no_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="wrong type"):
        check_types(tokenized(priority=2**64))


@pytest.mark.parametrize("route", ["/health", "/health_generate", "/under/root/health"])
def test_health_checks_have_ids_of_their_own(route: str) -> None:
    check_origin(GenerateReqInput(rid="HEALTH_CHECK_1"), SimpleNamespace(url=SimpleNamespace(path=route)))


@pytest.mark.parametrize("rid", ["HEALTH_CHECK", "HEALTH_CHECK_1", ["a", "HEALTH_CHECK_1"]])
@pytest.mark.parametrize("http", [None, SimpleNamespace(url=SimpleNamespace(path="/generate"))])
def test_no_client_has_them(rid: str | list[str], http: Any) -> None:
    with pytest.raises(ValueError, match="rid must not begin with HEALTH_CHECK"):
        check_origin(GenerateReqInput(rid=rid), http)


@pytest.mark.parametrize("rid", [None, "a", "A_HEALTH_CHECK", ["a", "b"]])
def test_other_ids_are_the_clients(rid: Any) -> None:
    check_origin(GenerateReqInput(rid=rid))


@pytest.mark.parametrize("rid", ["", ["a", ""]])
def test_an_id_with_which_every_other_begins_is_refused(rid: Any) -> None:
    with pytest.raises(ValueError, match="rid must not be empty"):
        check_origin(GenerateReqInput(rid=rid))


def test_a_request_comes_now() -> None:
    check_origin(GenerateReqInput(received_time=monotonic_time() - 60))
    with pytest.raises(ValueError, match="wrong form"):
        admit(lambda *_: None, None, GenerateReqInput(received_time="now"))
    for wrong in (1e300, -1e300, float("inf"), float("nan"), monotonic_time() + 86400):
        with pytest.raises(ValueError, match="received_time must be within an hour"):
            check_origin(GenerateReqInput(received_time=wrong))


@pytest.mark.parametrize(
    "error", [TypeError("x"), AttributeError("x"), IndexError("x"), KeyError("x"), OverflowError(), re.error("x")]
)
def test_what_a_step_raises_is_the_clients_fault(error: Exception) -> None:
    def step(argument: int) -> None:
        raise error

    async def waiting(argument: int) -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(ValueError, match=type(error).__name__):
        refuse_faults(step, 1)
    with pytest.raises(ValueError, match=type(error).__name__):
        asyncio.run(refuse_faults(waiting, 1))


def test_what_a_step_gives_is_passed_on() -> None:
    async def waiting(argument: int) -> int:
        return argument

    async def refusing() -> None:
        raise MemoryError

    assert refuse_faults(lambda argument: argument, 3) == 3
    assert asyncio.run(refuse_faults(waiting, 4)) == 4
    with pytest.raises(MemoryError):  # no fault of the request's form
        asyncio.run(refuse_faults(refusing))


def test_a_list_that_is_too_short_breaks_a_batch() -> None:
    """The original raises what is no ValueError; with the hook it is one."""
    request = GenerateReqInput(text=["Hi", "you"], audio_data=[])
    with pytest.raises(ValueError, match="cannot be prepared"):
        refuse_faults(GenerateReqInput.__getitem__, request, 1)


async def thread_of(_: Any, texts: Any, is_cross_encoder: bool = False) -> int:
    assert is_cross_encoder
    return threading.get_ident()


@pytest.mark.parametrize(
    ("texts", "threads", "waits"),
    [
        ("a" * LONG, False, True),
        (["a" * (LONG - 1), "a"], False, True),
        ("a" * (LONG + 1), False, False),
        (["a" * LONG, "a"], False, False),
        ([None], False, True),
        ("a" * (LONG + 1), True, True),
    ],
)
def test_a_long_text_is_not_tokenised_in_the_event_loop(texts: Any, threads: bool, waits: bool) -> None:
    """threads: the manager has a tokenizer with a thread of its own, which belongs to the event loop."""
    manager = SimpleNamespace(async_dynamic_batch_tokenizer=object() if threads else None)
    found = asyncio.run(tokenize(thread_of, manager, texts, is_cross_encoder=True))
    assert (found == threading.get_ident()) is waits


def test_what_fails_beside_the_event_loop_fails_as_in_it() -> None:
    async def fails() -> None:
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        asyncio.run(beside(fails))
