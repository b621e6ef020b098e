"""Files from outside, broken in every way: each parser answers with a value or with one of our errors, nothing else.

How many inputs each test makes: AUF_FUZZ (default 200, `make fuzz` takes 25,000). Inputs are JSON and YAML of any
shape, and good files with a piece changed, which get further in.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.studies.config import load_study
from server.profile import load_profile
from sglang_auf.checkpoints.card import check_drafter, load_card
from sglang_auf.errors import AufError
from sglang_auf.training.recipe import RECIPES, load_recipe, parse_recipe
from sglang_auf.training.text.chats import chat_of
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.messages import ROLES, texts
from sglang_auf.training.text.rows import BadRow, read_rows
from tests.support import toy_tokenizer as toy
from tests.support.tiny_models import write_drafter, write_target

ROOT = Path(__file__).parents[2]
FUZZED = settings(
    max_examples=int(os.environ.get("AUF_FUZZ", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, -0.0, float("nan"), float("inf"), "", "x" * 300, "\ud800"])
    | st.floats()
    | st.text(max_size=20)
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
)


def changed(draw: st.DrawFn, good: Any) -> Any:
    """A good document with one to three places replaced, removed or added."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        spot = document
        while isinstance(spot, dict | list) and spot:
            key = draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
            deeper = spot[key]
            if isinstance(deeper, dict | list) and deeper and draw(st.booleans()):
                spot = deeper
                continue
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                spot[key] = draw(ANYTHING)
            elif action == "remove":
                del spot[key]
            elif isinstance(spot, dict):
                spot[draw(st.text(max_size=8))] = draw(ANYTHING)
            else:
                spot.append(draw(ANYTHING))
            break
    return document


def documents(good: Any) -> st.SearchStrategy[Any]:
    return st.composite(changed)(good) | ANYTHING


def written(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def answers(parser: Callable[[], Any]) -> None:
    """Run it: anything but a value or one of our errors, which says what was found and expected, fails the test."""
    try:
        parser()
    except AufError as error:
        assert error.found
        assert error.expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    write_target(place / "target")
    write_drafter(place / "drafter", 4)
    return place


CARD = json.loads((ROOT / "drafters" / "smollm2-135m" / "auf_card.json").read_text())
CONFIG = json.loads((ROOT / "drafters" / "smollm2-135m" / "config.json").read_text())
RECIPE = load_recipe(str(RECIPES / "smollm2-135m-auf.yaml")).model_dump(mode="json")
PROFILE = yaml.safe_load((ROOT / "server" / "profiles" / "smollm2-135m.yaml").read_text())
STUDY = yaml.safe_load((ROOT / "benchmarks" / "studies" / "smoke.yaml").read_text())
TOKENIZERS = [toy.toy_tokenizer(template) for template in (toy.CHATML, toy.TOOLS)]
ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"id": 3, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"turns": ["one", "two"]},
    {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}],
        "completion": [
            {
                "role": "assistant",
                "content": "a",
                "weight": 1,
                "reasoning_content": "r",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            }
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {"instruction": "q", "input": "i", "output": "a", "system": "s"},
]


@FUZZED
@given(card=documents(CARD), config=documents(CONFIG))
def test_card(card: Any, config: Any, folder: Path) -> None:
    drafter = folder / "card"
    drafter.mkdir(exist_ok=True)
    (drafter / "auf_card.json").write_bytes(written(card))
    (drafter / "config.json").write_bytes(written(config))
    answers(lambda: load_card(drafter))


@FUZZED
@given(config=documents(json.loads("{}") | CONFIG))
def test_drafter_against_a_target(config: Any, folder: Path) -> None:
    (folder / "drafter" / "config.json").write_bytes(written(config))
    answers(lambda: check_drafter(str(folder / "drafter"), str(folder / "target")))


@FUZZED
@given(content=st.binary(max_size=200))
def test_card_of_any_bytes(content: bytes, folder: Path) -> None:
    drafter = folder / "bytes"
    drafter.mkdir(exist_ok=True)
    (drafter / "config.json").write_bytes(content)
    answers(lambda: load_card(drafter))


@FUZZED
@given(content=documents(RECIPE))
def test_recipe(content: Any) -> None:
    answers(lambda: parse_recipe(content, "fuzzed"))


@FUZZED
@given(
    text=st.text(max_size=300) | documents(RECIPE).map(lambda value: json.dumps(value)), override=st.text(max_size=30)
)
def test_recipe_file_and_override(text: str, override: str, folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    answers(lambda: load_recipe(str(file)))
    answers(lambda: load_recipe("smollm2-135m-auf", [override]))


@FUZZED
@given(content=documents(PROFILE), override=st.text(max_size=30))
def test_profile(content: Any, override: str, folder: Path) -> None:
    (folder / "fuzzed.yaml").write_bytes(written(content))
    answers(lambda: load_profile("fuzzed", [], directory=folder))
    answers(lambda: load_profile("smollm2-135m", [override]))


@FUZZED
@given(content=documents(STUDY))
def test_study(content: Any, folder: Path) -> None:
    file = folder / "study.yaml"
    file.write_bytes(written(content))
    answers(lambda: load_study(file))


@FUZZED
@given(rows=st.lists(st.one_of(map(documents, ROWS)), max_size=4), junk=st.binary(max_size=60))
def test_rows(rows: list[Any], junk: bytes, folder: Path) -> None:
    """Every line comes out: as a chat of texts that any tokenizer takes, or as a row with its fault."""
    file = folder / "rows.jsonl"
    lines = [*map(written, rows), junk.replace(b"\n", b" ")]
    file.write_bytes(b"\n".join(lines))
    read = list(read_rows(file, hashlib.sha256()))
    assert len(read) == sum(bool(line.strip()) for line in lines)
    for row in read:
        if row.fault is None:
            try:
                chat = chat_of(row.fields)
            except BadRow as fault:
                assert str(fault)
                continue
            assert chat.messages
            for message in chat.messages:
                assert message["role"] in ROLES.values()
                assert "".join(texts(message)).encode() is not None
            assert all(text.encode() is not None for text in chat.strings())
    for tokenizer in TOKENIZERS:
        answers(functools.partial(load_conversations, file, tokenizer, max_length=999, min_answer_tokens=1))
