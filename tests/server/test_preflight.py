"""What is refused before anything loads."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import preflight
from server.profile import Profile
from sglang_auf import compat
from sglang_auf.checkpoints.card import DrafterCard
from sglang_auf.errors import CardError, CompatError, ConfigError, ServerError, TargetError


@pytest.fixture
def listener() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_port_in_use_is_named(listener: int, host: str) -> None:
    with pytest.raises(ServerError, match=str(listener)) as caught:
        preflight.check_port(host, listener)
    assert "--port" in caught.value.remedy


def test_port_that_was_just_left_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = server.accept()
            connection.close()  # the server closes first: its side of the connection lingers in TIME_WAIT
            client.recv(1)
    preflight.check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        preflight.check_port(host, 30000)


@pytest.mark.parametrize(
    ("cuda", "device", "fails"), [(False, "cuda", True), (False, "cpu", False), (True, "cuda", False)]
)
def test_cuda_profile_needs_cuda(cuda: bool, device: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    profile = Profile.model_validate({"target": "t", "device": device, "served_model_name": "t"})
    if fails:
        with pytest.raises(ConfigError, match="cuda"):
            preflight.check_device(profile)
    else:
        preflight.check_device(profile)


def test_seams_are_those_of_the_pinned_sglang() -> None:
    compat.check_seams(preflight.SEAMS)


def unknown_algorithm(name: str) -> None:
    raise ValueError(f"Unknown speculative algorithm name: {name}")


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, str], None]:
    """Sets the platform SGLang chose: ours or its own, and its device."""

    def choose(ours: bool, device: str) -> None:
        module = "sglang_auf.cpu.platform" if ours else "sglang.srt.platforms.cuda"
        cls = type("Platform", (), {"__module__": module, "device_type": device, "device_name": "a name"})
        monkeypatch.setattr("sglang.srt.platforms.current_platform", cls())

    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    return choose


def test_plugin_that_did_not_load_is_said_and_not_served_without(
    platform: Callable[[bool, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform(True, "cpu")
    monkeypatch.setattr("sglang.srt.speculative.spec_info.SpeculativeAlgorithm.from_string", unknown_algorithm)
    monkeypatch.setattr(preflight, "check_seams", lambda _: None)
    with pytest.raises(ServerError, match="plugin did not load"):
        preflight.load_sglang("cpu", needs_algorithm=True)
    preflight.load_sglang("cpu", needs_algorithm=False)


@pytest.mark.parametrize(
    ("device", "ours", "platform_device", "remedy"),
    [
        ("cpu", False, "cuda", "SGLANG_PLATFORM=auf_cpu"),
        ("cpu", False, "cpu", "SGLANG_PLATFORM=auf_cpu"),
        ("cuda", True, "cpu", "unset SGLANG_PLATFORM"),
        ("cpu", True, "cpu", None),
        ("cuda", False, "cuda", None),
    ],
)
def test_profile_and_platform_must_agree(
    device: str, ours: bool, platform_device: str, remedy: str | None, platform: Callable[[bool, str], None]
) -> None:
    platform(ours, platform_device)
    if remedy is None:
        preflight.load_sglang(device, needs_algorithm=False)
        return
    with pytest.raises(ConfigError, match="a name") as caught:
        preflight.load_sglang(device, needs_algorithm=False)
    assert remedy in caught.value.remedy


def test_other_sglang_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SGLANG_VERSION", "9.9.9")
    with pytest.raises(CompatError, match=r"9\.9\.9"):
        preflight.load_sglang("cpu", needs_algorithm=True)


@pytest.mark.parametrize(("variable", "value"), [("SGLANG_RUST_SERVER", "1"), ("SGLANG_GRPC_PORT", "40000")])
def test_other_front_ends_are_refused(
    variable: str, value: str, platform: Callable[[bool, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform(True, "cpu")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        preflight.load_sglang("cpu", needs_algorithm=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


CARD = DrafterCard(
    target_name=None, target_config_hash=None, target_layer_ids=(1,), mask_token_id=3, block_size=16, head="dflash"
)


class Checked:
    """check_drafter's stand-in: remembers how it was asked and finds one thing to warn of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(preflight, "check_drafter", self)

    def __call__(self, drafter: str, target: str, **options: Any) -> SimpleNamespace:
        self.asked = {"drafter": drafter, "target": target} | options
        return SimpleNamespace(card=CARD, warnings=("trained with thinking on",), path=Path("/local/drafter"))


def profile(**changes: Any) -> Profile:
    fields = {"target": "t", "drafter": "owner/drafter", "device": "cpu", "served_model_name": "name"}
    return Profile.model_validate(fields | changes)


def test_drafter_is_checked_as_it_will_be_served(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Checked(monkeypatch)
    served = preflight.check_models(
        profile(block_size=8, thinking="off", drafter_revision="abc", server_args={"context_length": 2048}),
        str(target),
        plain=False,
    )
    assert checked.asked == {
        "drafter": "owner/drafter",
        "target": str(target),
        "drafter_revision": "abc",
        "target_revision": None,
        "block_size": 8,
        "context_length": 2048,
        "thinking": "off",
    }
    assert served.speculation is not None
    assert (served.model, served.target.num_layers, served.speculation.block_size) == ("name", 4, 8)


@pytest.mark.parametrize("plain", [False, True])
def test_a_model_without_a_name_has_its_targets(plain: bool, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checked(monkeypatch)
    served = preflight.check_models(profile(served_model_name=None), str(target), plain)
    assert (served.model, served.named_after_target) == (target.name, True)
    served = preflight.check_models(profile(), str(target), plain)
    assert (served.model, served.named_after_target) == ("name", False)


def test_block_size_comes_from_the_card(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checked(monkeypatch)
    served = preflight.check_models(profile(), str(target), plain=False)
    assert served.speculation is not None
    assert served.speculation.block_size == 16


def test_plain_needs_no_drafter(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_drafter", lambda *_, **__: pytest.fail("checked a drafter"))
    assert preflight.check_models(profile(drafter="/nowhere"), str(target), plain=True).speculation is None


def test_profile_without_a_drafter_serves_plainly_only_when_asked(target: Path) -> None:
    with pytest.raises(ConfigError, match="without a drafter") as caught:
        preflight.check_models(profile(drafter=None), str(target), plain=False)
    assert "--plain" in caught.value.remedy


def test_missing_target_and_missing_drafter_are_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="nowhere"):
        preflight.check_models(profile(), str(tmp_path / "nowhere"), plain=True)
    with pytest.raises(CardError, match="nowhere"):
        preflight.check_models(profile(drafter=str(tmp_path / "nowhere")), str(target), plain=False)
