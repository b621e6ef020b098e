"""Environment variables: their defaults, and what sets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_auf import env


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", None), ("yes", None), (None, None)])
def test_a_switch_is_on_off_or_its_default(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool | None, default: bool
) -> None:
    if value is None:
        monkeypatch.delenv("SGLANG_AUF_TEST", raising=False)
    else:
        monkeypatch.setenv("SGLANG_AUF_TEST", value)
    assert env.Switch("SGLANG_AUF_TEST", default, "").is_on() is (default if on is None else on)


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
