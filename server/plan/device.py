"""A CUDA device that this machine does not have: what SGLang has to know of it to resolve its arguments."""

from __future__ import annotations

import os
import re

from server.profile import Profile
from sglang_auf.env import PLANNED_DEVICE
from sglang_auf.errors import ConfigError
from sglang_auf.hooks.registry import Hook, install

UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def parse_memory(text: str) -> int:
    """Bytes of "24GB" (10**9 each) or "24GiB" (2**30). Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if not size:
        raise ConfigError(
            f"--device-memory {text!r}",
            "a size as 24GB (10**9 bytes each) or 24GiB (2**30)",
            "GPUs sold as 24 GB have 24GiB",
        )
    return size


def choose(profile: Profile, memory: int | None) -> bool:
    """Whether the server that is planned would run on this machine: its device is here, and is the one to plan for.

    memory: bytes of the CUDA device to plan for, None for the one that is here. Where it is given, SGLang in this
    process takes its arguments for such a device. It does so if this is called before SGLang is imported, which is when
    it asks for the platform (plugin.cpu_platform), and before its plugins are loaded, which applies the hook. Raises
    ConfigError.
    """
    import torch

    if profile.device == "cpu":
        if memory is not None:
            raise ConfigError(
                "--device-memory and device: cpu",
                "a CUDA profile; a CPU profile is planned for the memory that is free here",
                "leave out --device-memory",
            )
        return True
    if memory is None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "--check of a CUDA profile, and PyTorch sees no CUDA device",
                "the memory of the device to plan for",
                "--device-memory 48GiB",
            )
        return True
    os.environ[PLANNED_DEVICE] = str(memory)
    install([MEMORY])
    return False


def _planned_memory(found: float | None, device: str | None = None) -> float:
    """After `get_device_memory_capacity`: MiB."""
    return int(os.environ[PLANNED_DEVICE]) / 2**20


MEMORY = Hook("sglang.srt.utils.common:get_device_memory_capacity", "AFTER", _planned_memory, ("device",))
