"""Environment variables: their defaults, and what sets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_auf import env
from sglang_auf.errors import ConfigError


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("0", False), ("False", False), ("on", True), ("", None), (None, None)]
)
def test_a_switch_is_on_off_or_its_default(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool | None, default: bool
) -> None:
    if value is None:
        monkeypatch.delenv("SGLANG_AUF_TEST", raising=False)
    else:
        monkeypatch.setenv("SGLANG_AUF_TEST", value)
    assert env.Switch("SGLANG_AUF_TEST", default, "").is_on() is (default if on is None else on)


@pytest.mark.parametrize("wrong", ["2", "-1", "maybe", " "])
def test_what_is_no_switch_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("SGLANG_AUF_TEST", wrong)
    with pytest.raises(ConfigError, match=f"SGLANG_AUF_TEST={wrong}"):
        env.Switch("SGLANG_AUF_TEST", True, "").is_on()


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_a_switch_at_its_default_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool
) -> None:
    if value is None:
        monkeypatch.delenv("SGLANG_AUF_TEST", raising=False)
    else:
        monkeypatch.setenv("SGLANG_AUF_TEST", value)
    assert env.Switch("SGLANG_AUF_TEST", True, "").is_asked_for() is asked


def test_nodes_are_a_positive_number_or_left_to_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.TREE_NODES, raising=False)
    assert env.tree_nodes() is None
    monkeypatch.setenv(env.TREE_NODES, "12")
    assert env.tree_nodes() == 12
    for wrong in ("0", "-3", "many", "1.5", ""):
        monkeypatch.setenv(env.TREE_NODES, wrong)
        with pytest.raises(ValueError, match=env.TREE_NODES):
            env.tree_nodes()


def test_steps_to_a_log_line_are_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.STEP_LOG, raising=False)
    assert env.step_log() == 0
    monkeypatch.setenv(env.STEP_LOG, "200")
    assert env.step_log() == 200
    monkeypatch.setenv(env.STEP_LOG, "often")
    with pytest.raises(ValueError, match=env.STEP_LOG):
        env.step_log()


def test_setting_a_switch_is_for_this_process_and_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_AUF_TEST", "1")  # restored after the test
    switch = env.Switch("SGLANG_AUF_TEST", True, "")
    switch.set(False)
    assert env.os.environ["SGLANG_AUF_TEST"] == "0" and not switch.is_on()


def test_home_is_the_users_choice_then_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(env.HOME, str(tmp_path / "own"))
    assert env.home() == tmp_path / "own"
    monkeypatch.delenv(env.HOME)
    assert env.home() == tmp_path / "xdg" / "sglang-auf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.home() == tmp_path / ".cache" / "sglang-auf"
