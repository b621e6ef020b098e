"""Aborting one request reaches no request whose id merely begins alike, and answers end where their room does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_auf.hooks import aborts
from sglang_auf.hooks.aborts import abort_one, end_with_the_pool, room_behind_a_context


@pytest.mark.parametrize(
    ("rid", "abort_all", "reaches"),
    [("a", False, False), ("a1", False, True), ("b", False, True), ("", False, False), ("", True, True)],
)
def test_an_id_that_begins_others_is_not_sent(rid: str, abort_all: bool, reaches: bool) -> None:
    manager, sent = SimpleNamespace(rid_to_state={"a": 1, "a1": 2, "b": 3}), []
    abort_one(lambda *arguments: sent.append(arguments), manager, rid, abort_all)
    assert sent == ([(manager, rid, abort_all)] if reaches else [])


@pytest.fixture
def speculating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with AUF whose steps take 32 slots."""
    monkeypatch.setattr(aborts, "serves_auf", lambda: True)
    monkeypatch.setattr(aborts, "_room_of_a_step", lambda: 32)


def test_the_slot_table_has_columns_for_a_step_at_the_end_of_a_context(
    speculating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [room_behind_a_context(columns) for columns in (20, 40)] == [32, 40]
    monkeypatch.setattr(aborts, "serves_auf", lambda: False)
    assert room_behind_a_context(20) == 20


def limit(pool: int, prompt: int, most: int | None) -> int | None:
    """Tokens of an answer to a prompt of `prompt` tokens that SGLang lets have `most`."""

    def original(*arguments: object, **more: object) -> int | None:
        assert (arguments, more) == (("allocator", prompt, 5000), {"token_capacity": pool, "chunk_size": 7})
        return most

    return end_with_the_pool(original, "allocator", prompt, 5000, token_capacity=pool, chunk_size=7)


def test_an_answer_ends_where_the_pool_has_no_room_for_a_step(
    speculating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit(1000, 100, 867) == 867
    assert limit(1000, 100, 898) == 868
    assert limit(1000, 980, 18) == 1, "its first token needs no step"
    assert limit(1000, 100, 0) == 0
    assert limit(1000, 1001, None) is None, "the prompt does not fit"
    monkeypatch.setattr(aborts, "serves_auf", lambda: False)
    assert limit(1000, 100, 898) == 898
