"""Which device a plan is for."""

from __future__ import annotations

import os

import pytest

from server.plan import device
from server.profile import Profile
from sglang_auf.env import PLANNED_DEVICE
from sglang_auf.errors import ConfigError
from sglang_auf.plugin import cpu_platform


def profile(on: str) -> Profile:
    return Profile.model_validate({"target": "t", "device": on})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("80 gib", 80 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("500MiB", 500 * 2**20),
    ],
)
def test_a_size_in_either_unit(text: str, size: int) -> None:
    assert device.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "0GB", "24G", "1e3GB", "24 GB free"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GiB"):
        device.parse_memory(text)


def test_a_cpu_profile_is_planned_for_this_machine_alone() -> None:
    assert device.choose(profile("cpu"), None)
    with pytest.raises(ConfigError, match="leave out --device-memory"):
        device.choose(profile("cpu"), 2**30)


@pytest.mark.parametrize("here", [True, False])
def test_without_a_cuda_device_its_memory_must_be_given(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: here)
    if here:
        assert device.choose(profile("cuda"), None)
        return
    with pytest.raises(ConfigError, match="--device-memory 48GiB"):
        device.choose(profile("cuda"), None)


@pytest.mark.parametrize("here", [True, False])
def test_a_given_device_is_another_one_and_the_cpu_platform_steps_aside(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: here)
    monkeypatch.setattr(device, "install", lambda _: None)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setenv(PLANNED_DEVICE, "0")  # so that what is set is undone
    monkeypatch.delenv(PLANNED_DEVICE)
    assert not device.choose(profile("cuda"), 3 * 2**30)
    assert os.environ[PLANNED_DEVICE] == str(3 * 2**30)
    assert cpu_platform() is None
    assert device._planned_memory(None) == 3 * 1024, "MiB, as SGLang counts"
