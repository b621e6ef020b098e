"""Tokens that come several a step finish a request as the same tokens do that come one by one."""

from __future__ import annotations

import functools
import re
import signal
import threading
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
from sglang_auf.hooks.stops import (
    SEARCH_S,
    continue_session,
    keep_computed_keys,
    leave_unsampled,
    limit_search,
    update_finish_state,
)
from tests.support.toy_tokenizer import toy_tokenizer

# SGLang's own, without the hook that an installed plugin may have put around it.
ORIGINAL = getattr(Req.update_finish_state, "__wrapped__", Req.update_finish_state)
CHECK = getattr(Req._check_str_based_finish, "__wrapped__", Req._check_str_based_finish)
CONCAT = getattr(Session._concat_token_arrays, "__wrapped__", Session._concat_token_arrays)
TOKENIZER: PreTrainedTokenizerFast = toy_tokenizer()
TOKENIZER.additional_stop_token_ids = None  # as SGLang's loader leaves it
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture(autouse=True, scope="module")
def auf() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stops, "serves_auf", lambda: True)
        patch.setattr(Req, "_check_str_based_finish", functools.partialmethod(_limited))
        yield


def _limited(made: Req, new_accepted_len: int = 1) -> bool:
    return limit_search(CHECK, made, new_accepted_len)


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


LETTERS = "a" * 60
ENDLESS = {
    r"(a+)+b": LETTERS,
    r"(a|a)*b": LETTERS,
    r"^(a|aa)+b$": LETTERS,
    r"(ab|ab|ac|a.)*d": "ab" * 60,
    r"(.*a){20}b": LETTERS,
    r"(a*)*\1b": LETTERS,
    r"(?=(a+)+b)": LETTERS,
    r"(?<!c)(?:a?){30}a{31}b": LETTERS,
    r"(?i)(A|aa)+?c": LETTERS,
    r"(?:a?){4000000000}b": LETTERS,
    r"[ab]*[ab]*[ab]*[ab]*[ab]*c": "ab" * 800,
}
"""Pattern -> text in which `re` does not find it within any time that a client would wait."""


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_search_without_an_end_ends_its_request_alone(pattern: str, size: int) -> None:
    made = in_steps(request(stop_regex=[pattern], max_new_tokens=4000), ids(ENDLESS[pattern]), [size])
    reason = made.finished_reason.to_json()
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    assert pattern in made.sampling_params.stop_regex_strs and "takes too long to search for" in reason["message"]
    assert stops._Search.running is None and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert outcome(in_steps(request(stop_regex=["c."]), ids("xxcd"), [size]))[0]["matched"] == "c.", "others go on"


def test_a_request_that_has_spent_its_time_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(re, "search", lambda *_: pytest.fail("searched"))
    made = request(stop_regex=["b"])
    made.auf_search_s = SEARCH_S + 1
    assert in_steps(made, ids("a"), [1]).finished_reason.to_json()["type"] == "abort"


def test_the_time_of_other_threads_does_not_count() -> None:
    """The timer counts the whole process."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(10000))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        search = stops._Search(0.3)
        with pytest.raises(stops.SearchTookTooLong), search:
            re.search(r"(a+)+b", LETTERS)
        assert search.taken >= 0.3
    finally:
        over.set()
        thread.join()


def test_outside_the_main_thread_a_regex_is_refused_and_a_string_is_not() -> None:
    made = [request(stop_regex=["b"]), request(stop=["b"])]
    thread = threading.Thread(target=lambda: [in_steps(one, ids("ab"), [1]) for one in made])
    thread.start()
    thread.join()
    assert [one.finished_reason.to_json()["type"] for one in made] == ["abort", "stop"]


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
