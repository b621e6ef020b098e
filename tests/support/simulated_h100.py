"""A server's start on a machine that looks like one with an H100, up to the engine: prints one JSON object a case.

Run in a process of its own: `python simulated_h100.py TARGET DRAFTER`, with the profile's changes of each case (a list
of lists of "key=value") as JSON on standard input. torch.cuda's questions are answered as an H100 answers them; nothing
is launched on it. sglang-kernel's library needs a driver, so what is imported of it is a stand-in.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

MEMORY = 80 << 30
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    uuid="GPU-0",
    is_integrated=False,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Anything(ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class StandIns(MetaPathFinder, Loader):
    """Finds every module of sglang-kernel."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        ours = name == "sgl_kernel" or name.startswith("sgl_kernel.")
        return ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def simulate() -> None:
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (9, 0),
        "get_device_properties": PROPERTIES,
        "mem_get_info": (MEMORY, MEMORY),
        "is_bf16_supported": True,
        "is_initialized": False,
        "get_arch_list": ["sm_90"],
        "empty_cache": None,
        "synchronize": None,
        "set_device": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.accelerator.is_available = lambda: True
    sys.meta_path.insert(0, StandIns())


def start(target: str, drafter: str, changes: list[str], plain: bool) -> dict[str, Any]:
    """What `python -m server --profile qwen3-8b` does before it launches the engine (server/launch.py)."""
    from server.arguments import build_server_args, check_server_args, sglang_arguments
    from server.preflight import check_device, check_models, load_sglang
    from server.profile import load_profile
    from sglang_auf.errors import AufError

    profile = load_profile("qwen3-8b", [f"target={target}", f"drafter={drafter}", *changes])
    try:
        check_device(profile)
        load_sglang(profile.device, needs_algorithm=not plain)
        check_server_args(profile.server_args)
        served = check_models(profile, target, plain)
        path = served.speculation.checked.path if served.speculation else None
        given = build_server_args(sglang_arguments(profile, target, path))
    except AufError as error:
        return {"refused": str(error)}
    from sglang.srt.arg_groups.overrides import resolved_view

    view = resolved_view(given)
    graphs = view.cuda_graph_config
    return {
        "block": served.speculation.block_size if served.speculation else None,
        "decode_graphs": str(graphs.decode.backend),
        "largest_graph": max(graphs.decode.bs),
    } | {
        name: getattr(view, name)
        for name in (
            *("attention_backend", "speculative_draft_attention_backend", "sampling_backend", "speculative_algorithm"),
            *("speculative_num_draft_tokens", "disable_overlap_schedule", "max_running_requests", "page_size"),
            *("disable_radix_cache", "enable_deterministic_inference", "mem_fraction_static", "dtype"),
        )
    }


def main() -> None:
    target, drafter = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        simulate()
        found = []
        for case in json.load(sys.stdin):
            plain = "plain" in case
            found.append(start(target, drafter, [change for change in case if change != "plain"], plain))
        from sglang.srt.platforms import current_platform
        from sglang.srt.plugins.hook_registry import HookRegistry
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        on_cuda = SimpleNamespace(device="cuda")
        worker = SpeculativeAlgorithm.from_string("AUF").factory(on_cuda)  # checks the worker's seams first
    answer = {
        "platform": type(current_platform).__name__,
        "worker": worker.__name__,
        "unapplied": sorted(set(HookRegistry._hooks) - HookRegistry._patched),
        "kernels of the CPU platform": "sglang_auf.cpu.kernels" in sys.modules,
        "cases": found,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
