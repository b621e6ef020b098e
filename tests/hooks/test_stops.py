"""Tokens that come several a step finish a request as the same tokens do that come one by one."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.session.session_controller import Session
from transformers import PreTrainedTokenizerFast

from sglang_auf.hooks import stops
from sglang_auf.hooks.stops import continue_session, keep_computed_keys, leave_unsampled, update_finish_state
from tests.support.toy_tokenizer import toy_tokenizer

# SGLang's own, without the hook that an installed plugin may have put around it.
ORIGINAL = getattr(Req.update_finish_state, "__wrapped__", Req.update_finish_state)
CONCAT = getattr(Session._concat_token_arrays, "__wrapped__", Session._concat_token_arrays)
TOKENIZER: PreTrainedTokenizerFast = toy_tokenizer()
TOKENIZER.additional_stop_token_ids = None  # as SGLang's loader leaves it
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture(autouse=True, scope="module")
def auf() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stops, "serves_auf", lambda: True)
        yield


def request(**parameters: Any) -> Req:
    sampling = SamplingParams(**{"max_new_tokens": 64, **parameters})
    sampling.normalize(TOKENIZER)
    made = Req("r", "", array("q", [1]), sampling, eos_token_ids={END}, vocab_size=len(TOKENIZER))
    made.tokenizer = TOKENIZER
    return made


def outcome(made: Req) -> tuple[Any, list[int]]:
    reason = made.finished_reason.to_json() if made.finished_reason else None
    return reason, list(made.output_ids_through_stop)


def in_steps(made: Req, tokens: list[int], sizes: list[int]) -> Req:
    """The request after it got `tokens` in steps of these sizes (the last size again and again), with the hook."""
    rest, sizes = list(tokens), list(sizes)
    while rest and not made.finished():
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        step, rest = rest[:size], rest[size:]
        made.output_ids.extend(step)
        update_finish_state(ORIGINAL, made, len(step))
    return made


def one_by_one(made: Req, tokens: list[int]) -> Req:
    for token in tokens:
        made.output_ids.append(token)
        ORIGINAL(made, 1)
        if made.finished():
            break
    return made


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def test_the_end_token_wins_over_a_stop_string_behind_it() -> None:
    tokens = [*ids("Hello."), END, *ids("\nmore")]
    made = in_steps(request(stop=["\n"]), tokens, [8])
    assert outcome(made) == outcome(one_by_one(request(stop=["\n"]), tokens))
    assert made.finished_reason.to_json()["matched"] == END
    assert made.finished_len == 7
    assert list(made.output_ids) == tokens[:8], "tokens behind the stop stay, as SGLang leaves them"


@pytest.mark.parametrize(
    "parameters", [{"stop": ["cd", "ab"]}, {"stop_regex": ["c.", "a."]}, {"stop": ["cd"], "stop_regex": ["ab"]}]
)
def test_the_stop_that_is_reached_first_wins_whatever_the_order_of_the_list(parameters: dict[str, Any]) -> None:
    tokens = ids("xxabxcdx")
    made = in_steps(request(**parameters), tokens, [8])
    assert outcome(made) == outcome(one_by_one(request(**parameters), tokens))
    assert made.finished_len == 4


def test_other_algorithms_are_left_as_sglang_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "serves_auf", lambda: False)
    assert in_steps(request(stop=["cd", "ab"]), ids("xxabxcdx"), [8]).finished_len == 7, "the stop listed first"


def test_a_check_that_raises_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    made = request(stop=["b"])
    made.grammar = SimpleNamespace(is_terminated=lambda: False)
    made.output_ids.extend(ids("abc"))
    with pytest.raises(RuntimeError):
        update_finish_state(lambda *_: (_ for _ in ()).throw(RuntimeError()), made, 3)
    assert list(made.output_ids) == ids("abc") and made.grammar is not None


def test_a_grammar_that_has_ended_ends_the_answer_with_the_last_token_of_the_step() -> None:
    made = request(stop=["zz"])
    made.grammar = SimpleNamespace(is_terminated=lambda: True)
    assert in_steps(made, ids("abc"), [3]).finished_len is None or made.finished_len == 3
    assert len(made.output_ids_through_stop) == 3 and made.grammar is not None


def test_an_abort_takes_all_tokens_of_the_step() -> None:
    made = request(stop=["b"])
    made.to_finish = FINISH_ABORT("gone")
    assert outcome(in_steps(made, ids("abc"), [3]))[0]["type"] == "abort"
    assert len(made.output_ids_through_stop) == 3


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_steps_finish_as_single_tokens_do(data: st.DataObject) -> None:
    text = data.draw(st.text("ab.\n ", min_size=1, max_size=24))
    tokens = ids(text)
    for _ in range(data.draw(st.integers(0, 2))):
        tokens.insert(data.draw(st.integers(0, len(tokens))), END)
    pieces = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 4)).map(lambda cut: text[cut[0] : sum(cut)])
    parameters: dict[str, Any] = {
        "stop": data.draw(st.lists(pieces, max_size=3)),
        "stop_regex": data.draw(st.lists(st.sampled_from([r"a\.", r"\n+", r"b$", r"[ab]{3}", r"\s\s"]), max_size=2)),
        "stop_token_ids": data.draw(st.sampled_from([None, ids("b")])),
        "max_new_tokens": data.draw(st.integers(1, 24)),
        "ignore_eos": data.draw(st.booleans()),
    }
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    made = in_steps(request(**parameters), tokens, sizes)
    assert outcome(made) == outcome(one_by_one(request(**parameters), tokens))


def next_turn(last: Req, **session_params: Any) -> list[int]:
    """The prompt of a session's next turn, which says 7 and 8."""
    given = SimpleNamespace(drop_previous_output=False, offset=None, **session_params)
    ids, unpadded = continue_session(CONCAT, last, SimpleNamespace(input_ids=array("q", [7, 8])), given)
    assert list(ids) == list(unpadded)
    return list(ids)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_session_goes_on_where_the_answer_ended(size: int) -> None:
    last = in_steps(request(), [10, 11, END, 12, 13, 14], [size])
    assert next_turn(last) == [1, 10, 11, END, 7, 8]
    assert len(last.output_ids) >= 3  # the last request itself is not changed
    cut = in_steps(request(max_new_tokens=4), [10, 11, 12, 13, 14, 15], [size])
    assert next_turn(cut) == [1, 10, 11, 12, 13, 7, 8]


THINK_END = 99


@pytest.mark.parametrize("parameters", [{"max_new_tokens": 5}, {"stop_token_ids": [14]}, {"stop": ["e"]}])
@pytest.mark.parametrize("thought", [2, 4, 7, 64])
def test_reasoning_is_counted_up_to_the_end_of_the_answer(parameters: dict[str, Any], thought: int) -> None:
    """thought: so many tokens belong to it, the one that ends it included."""
    tokens = [*ids("abcdef"), 13, 14] if "stop" in parameters else [10, 11, 12, 13, 14, 15, 16, 17]
    tokens[thought - 1 : thought] = [THINK_END] * (thought <= len(tokens))

    def counted(made: Req, steps: list[list[int]], finish: Any) -> int:
        for step in steps:
            made.update_reasoning_tokens(step, [THINK_END])  # where SGLang does it: before it looks for the end
            made.output_ids.extend(step)
            finish(made, len(step))
            if made.finished():
                break
        assert made.finished()
        return int(made.reasoning_tokens)

    whole = counted(request(**parameters), [tokens], lambda *step: update_finish_state(ORIGINAL, *step))
    assert whole == counted(request(**parameters), [[token] for token in tokens], ORIGINAL)


@pytest.mark.parametrize(("answer", "committed"), [([10, 11, 12], 5), ([10], 3), ([], 3)])
def test_a_streaming_session_keeps_the_keys_that_are_computed(answer: list[int], committed: int) -> None:
    """A prompt of 3. The last token of a step has a slot before it has a key."""
    kv = SimpleNamespace(kv_committed_len=3 + len(answer))
    turn = SimpleNamespace(origin_input_ids=[1, 2, 3], output_ids=answer, session=SimpleNamespace(session_id="s"))
    streaming = SimpleNamespace(borrowed_slot=lambda turn: turn.session and SimpleNamespace(kv=kv))

    def original(_: Any, turn: Any) -> bool:
        turn.session = None  # as SGLang leaves a turn that was retracted before
        return True

    assert keep_computed_keys(original, streaming, turn)
    assert kv.kv_committed_len == committed
    kv.kv_committed_len, turn.session = 1, "s"
    keep_computed_keys(original, streaming, turn)
    assert kv.kv_committed_len == 1, "what SGLang could not keep stays lost"


@pytest.mark.parametrize("kept", [False, True])
def test_another_request_is_kept_as_sglang_keeps_it(kept: bool) -> None:
    streaming = SimpleNamespace(borrowed_slot=lambda _: None)
    assert keep_computed_keys(lambda *_: kept, streaming, request()) is kept


@pytest.mark.parametrize(("limit", "left"), [(0, []), (1, [-0.5])])
def test_a_request_for_no_token_has_no_log_probability_of_one(limit: int, left: list[float]) -> None:
    made = request(max_new_tokens=limit)
    made.logprob = SimpleNamespace(output_token_logprobs_val=[-0.5], output_token_logprobs_idx=[7])
    leave_unsampled(None, None, 0, made, 0, [7], 1, None)
    assert (made.logprob.output_token_logprobs_val, len(made.logprob.output_token_logprobs_idx)) == (left, len(left))
