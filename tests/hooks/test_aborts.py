"""Aborting one request reaches no request whose id merely begins alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_auf.hooks.aborts import abort_one


@pytest.mark.parametrize(
    ("rid", "abort_all", "reaches"),
    [("a", False, False), ("a1", False, True), ("b", False, True), ("", False, False), ("", True, True)],
)
def test_an_id_that_begins_others_is_not_sent(rid: str, abort_all: bool, reaches: bool) -> None:
    manager, sent = SimpleNamespace(rid_to_state={"a": 1, "a1": 2, "b": 3}), []
    abort_one(lambda *arguments: sent.append(arguments), manager, rid, abort_all)
    assert sent == ([(manager, rid, abort_all)] if reaches else [])
