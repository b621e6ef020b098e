"""The architectures that can be tapped, against the model files of the installed SGLang."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_auf.checkpoints.tappable import (
    ADDED,
    ALL_BUT_THE_LAST,
    ALL_LAYERS,
    EXTERNAL_MODELS,
    NOT_AT_OUTPUTS,
    SCALED_EMBEDDINGS,
    tappable_layers,
)
from sglang_auf.errors import TargetError

SETTER = "set_dflash_layers_to_capture"
DRAFTERS = ("NextN", "MTP", "Eagle", "Eagle3", "AssistantForCausalLM", "BidirectionalModel")
"""How classes end that are no target: they draft for one, or embed texts."""

# MiniCPMV hands attributes on to a model that it makes by the version; versions 4.6 and 4.7 have the setter.
BY_ATTRIBUTE = {"MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration"}


class Class(NamedTuple):
    bases: list[str]
    methods: set[str]


def model_files() -> Iterator[Path]:
    package = importlib.util.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    yield from sorted((Path(package.submodule_search_locations[0]) / "srt" / "models").glob("*.py"))


def tapped_by_sglang() -> set[str]:
    """Entry classes of SGLang's model files that have the setter, or inherit it."""
    classes: dict[str, Class] = {}
    entries: list[str] = []
    for file in model_files():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                known = classes.setdefault(node.name, Class([], set()))
                known.bases.extend(bases)
                known.methods.update(methods)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EntryClass":
                entries += [each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)]

    def has_setter(name: str) -> bool:
        known = classes.get(name)
        return known is not None and (SETTER in known.methods or any(map(has_setter, known.bases)))

    assert set(entries) >= BY_ATTRIBUTE
    return {name for name in entries if has_setter(name) and not name.endswith(DRAFTERS)} | BY_ATTRIBUTE


def test_the_names_are_those_of_the_installed_sglang() -> None:
    assert tapped_by_sglang() == (ALL_LAYERS | ALL_BUT_THE_LAST) - ADDED


def test_a_name_has_one_meaning() -> None:
    assert not ALL_LAYERS & ALL_BUT_THE_LAST
    assert ALL_LAYERS >= NOT_AT_OUTPUTS | SCALED_EMBEDDINGS
    assert ALL_BUT_THE_LAST >= ADDED


@pytest.mark.parametrize(
    ("architecture", "tappable"),
    [
        ("LlamaForCausalLM", 29),
        ("Qwen2ForCausalLM", 29),
        ("Qwen3ForCausalLM", 29),
        ("Qwen3_5ForConditionalGeneration", 29),
        ("GptOssForCausalLM", 30),
        ("Gemma4ForConditionalGeneration", 30),
        (None, 29),
    ],
)
def test_the_last_layer_can_be_tapped_where_sglang_does(architecture: str | None, tappable: int) -> None:
    assert tappable_layers(architecture, 30) == tappable


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "Gemma3ForCausalLM", "LlavaLlamaForCausalLM"])
def test_a_class_that_sglang_cannot_tap_is_refused(architecture: str) -> None:
    with pytest.raises(TargetError, match=f"{architecture}.*SGLang 0.5.23 can tap"):
        tappable_layers(architecture, 30)


def test_nothing_is_known_of_classes_of_the_user_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXTERNAL_MODELS, "my_models")
    assert tappable_layers("MineForCausalLM", 30) == 30
    assert tappable_layers("LlamaForCausalLM", 30) == 29
