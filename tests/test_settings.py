"""Settings: YAML files, overrides and the sentences about what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.settings import (
    Settings,
    Thinking,
    apply_override,
    checked,
    enable_thinking,
    find_settings,
    merged,
    read_settings,
    read_yaml,
    settings_names,
)


class Part(Settings):
    rate: float = Field(default=1.0, gt=0)
    thinking: Thinking = None


class Whole(Settings):
    part: Part = Part()
    parts: dict[str, Part] = Field(default_factory=dict)
    several: tuple[Part, ...] = ()


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(Whole, content, "here", "keys of Whole")
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"part": {"rat": 1}},
        {"parts": {"one": {"rat": 1}}},
        {"several": [{"rate": 1}, {"rat": 1}]},
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one_of_its_section(content: dict[str, Any]) -> None:
    assert "rat (did you mean rate?)" in refusal(content)


def test_a_wrong_value_is_shown_with_its_place() -> None:
    found = refusal({"part": {"rate": -1}, "parts": 3})
    assert "part.rate" in found and "got -1" in found and "parts" in found, "every complaint, not only the first"


def test_a_long_value_is_shown_in_part() -> None:
    assert len(refusal({"part": list(range(10_000))})) < 200


def test_json_is_checked_like_a_mapping() -> None:
    assert checked(Whole, b'{"part": {"rate": 2}}', "here", "").part.rate == 2
    with pytest.raises(DataError, match=r"here: .*Invalid JSON"):
        checked(Whole, b"{", "here", "JSON", error=DataError)


@pytest.mark.parametrize(("text", "mode"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("null", None)])
def test_thinking_reads_the_bare_words_of_yaml(tmp_path: Path, text: str, mode: str | None) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"part:\n  thinking: {text}\n")
    assert checked(Whole, read_yaml(file), "x", "").part.thinking == mode


@pytest.mark.parametrize(("mode", "value"), [("on", True), ("off", False), (None, None), ("server", None)])
def test_the_templates_variable(mode: str | None, value: bool | None) -> None:
    assert enable_thinking(mode) is value


@pytest.mark.parametrize(("text", "what"), [("- 1", "no mapping"), ("a: [", "not YAML"), ("\xff", "not YAML")])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=what):
        read_yaml(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_mappings_are_merged_and_all_else_is_replaced() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(base, {"a": {"y": [3]}, "b": {"z": 1}}) == {"a": {"x": 1, "y": [3]}, "b": {"z": 1}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}, "the base stays as it was"


def test_an_override_is_yaml_at_a_place() -> None:
    content: dict[str, Any] = {"a": {"x": 1}}
    assert apply_override("a.y=[1, 2]", content) == "a.y"
    assert apply_override(" b = null", content) == "b"
    assert content == {"a": {"x": 1, "y": [1, 2]}, "b": None}


@pytest.mark.parametrize("override", ["a", "=1", ".x=1", "a.=1", "a.x.y=1", "a=[1", "a=", "a= "])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_override(override, {"a": {"x": 1}})


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A directory of this project with the files one.yaml and two.yaml."""
    directory = tmp_path / "ours"
    directory.mkdir()
    (directory / "one.yaml").write_text("a: 1\n")
    (directory / "two.yaml").write_text("extends: one\nb: 2\n")
    return directory


def test_a_name_is_that_of_a_file_of_ours_and_a_path_any_file(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("c: 3\n")
    assert settings_names(ours) == ["one", "two"]
    assert find_settings("one", ours) == ours / "one.yaml"
    assert find_settings(str(tmp_path / "mine.yaml"), ours) == tmp_path / "mine.yaml"
    assert find_settings("mine.yaml", ours, beside=tmp_path) == tmp_path / "mine.yaml"
    assert find_settings("one", ours, beside=tmp_path) == ours / "one.yaml"
    for wrong in ("mine.yaml", "../ours/one", str(ours / "one"), str(ours), "", "a\0b"):
        assert find_settings(wrong, ours) is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_settings("~/mine.yaml", ours) == tmp_path / "mine.yaml"


def test_what_a_file_extends_comes_before_it(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "top.yaml").write_text("extends: deep/middle.yaml\nb: 4\n")
    (tmp_path / "deep" / "middle.yaml").write_text("extends: two\nc: 3\n")
    assert read_settings(str(tmp_path / "top.yaml"), ours, "recipe") == [
        (ours / "one.yaml", {"a": 1}),
        (ours / "two.yaml", {"b": 2}),
        (tmp_path / "deep" / "middle.yaml", {"c": 3}),
        (tmp_path / "top.yaml", {"b": 4}),
    ]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("thre", "recipe 'thre'"),
        ("twoo", "did you mean two?"),
        ("a.yaml", "recipes that extend each other: a.yaml -> b.yaml -> a.yaml"),
        ("c.yaml", "c.yaml extends ../c.yaml, which is no file beside it"),
    ],
)
def test_files_that_lead_nowhere_are_refused(
    name: str, complaint: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, base in (("a", "b.yaml"), ("b", "a.yaml"), ("c", "../c.yaml")):
        (tmp_path / f"{file}.yaml").write_text(f"extends: {base}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_settings(name, ours, "recipe")
    assert complaint in caught.value.found
    assert "one, two" in caught.value.expected or "a chain" in caught.value.expected
