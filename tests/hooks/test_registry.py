"""Hooks reach SGLang's registry once, under SGLang's spelling of a name, and in the order that plugin.py counts on."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_auf.env import BUNDLED
from sglang_auf.hooks import registry
from sglang_auf.hooks.registry import Hook, install, is_ours


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of a fake SGLang, whose function is `fake_sglang:Server.handle`; the registries are empty."""
    made: list[str] = []

    class Server:
        def handle(self, request: int) -> int:
            made.append("sglang")
            return request + 1

    module = ModuleType("fake_sglang")
    vars(module)["Server"] = Server
    monkeypatch.setitem(sys.modules, "fake_sglang", module)
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(registry, "_installed", set())
    return made


def hook(kind: Any, name: str, calls: list[str]) -> Hook:
    def before(server: Any, request: int) -> None:
        calls.append(name)

    def after(result: int, server: Any, request: int) -> int:
        calls.append(name)
        return result * 10

    def around(original: Any, server: Any, request: int) -> int:
        calls.append(name)
        return int(original(server, request))

    function = {"BEFORE": before, "AFTER": after, "AROUND": around}[kind]
    return Hook("fake_sglang:Server.handle", kind, function, ("self", "request"))


def test_the_hook_installed_last_runs_first(calls: list[str]) -> None:
    install(hook(kind, kind, calls) for kind in ("BEFORE", "AROUND"))
    install([hook("BEFORE", "last", calls), hook("AFTER", "after", calls)])
    HookRegistry.apply_hooks()
    assert sys.modules["fake_sglang"].Server().handle(1) == 20
    assert calls == ["last", "AROUND", "BEFORE", "sglang", "after"]


def test_installing_twice_is_installing_once(calls: list[str]) -> None:
    ours = (hook("BEFORE", "ours", calls), hook("AFTER", "after", calls))
    install(ours)
    install(ours)
    assert {target: len(hooks) for target, hooks in HookRegistry._hooks.items()} == {"fake_sglang.Server.handle": 2}
    HookRegistry.apply_hooks()
    sys.modules["fake_sglang"].Server().handle(1)
    assert calls == ["ours", "sglang", "after"]


def test_a_hook_on_our_servers_leaves_others_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(hook(kind, kind, calls).on_ours() for kind in ("BEFORE", "AROUND", "AFTER"))
    HookRegistry.apply_hooks()
    server = sys.modules["fake_sglang"].Server()
    for ours, result, expected in (
        (False, 2, ["sglang"]),
        (True, 20, ["AROUND", "BEFORE", "sglang", "AFTER"]),
    ):
        monkeypatch.setattr(registry, "is_ours", lambda ours=ours: ours)
        calls.clear()
        assert server.handle(1) == server.handle(request=1) == result
        assert calls == expected * 2


class AufCpuPlatform:
    """By name and module the CPU platform of the plugin."""

    __module__ = "sglang_auf.cpu.platform"

    def is_out_of_tree(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("algorithm", "platform", "bundled", "ours"),
    [
        (None, None, None, False),
        ("DFLASH", None, None, False),
        ("AUF", None, None, True),
        (None, AufCpuPlatform(), None, True),
        (None, None, "1", True),
    ],
)
def test_which_servers_are_ours(
    algorithm: str | None, platform: Any, bundled: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(is_out_of_tree=lambda: False)
    monkeypatch.setattr("sglang.srt.platforms.current_platform", platform or other)
    monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: SimpleNamespace(speculative_algorithm=algorithm))
    monkeypatch.delenv(BUNDLED, raising=False)
    if bundled:
        monkeypatch.setenv(BUNDLED, bundled)
    assert is_ours() is ours


def test_the_row_of_a_hook_names_the_module_of_its_function() -> None:
    from sglang_auf.hooks import replies

    assert {each.seam.used_by for each in replies.HOOKS} == {"hooks.replies"}
