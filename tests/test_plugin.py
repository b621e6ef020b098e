"""The entry points: when the CPU platform offers itself, what registers, and what a user reads when it cannot."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch

from sglang_auf import compat, plugin
from sglang_auf.cpu import platform
from sglang_auf.errors import CompatError
from sglang_auf.speculative import algorithm, swap

PLATFORM = "sglang_auf.cpu.platform.AufCpuPlatform"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without an accelerator and without settings."""
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return monkeypatch


def test_a_machine_without_an_accelerator_gets_the_platform(machine: pytest.MonkeyPatch) -> None:
    assert plugin.cpu_platform() == PLATFORM
    assert isinstance(resolve_name(PLATFORM), type)


@pytest.mark.parametrize("kind", [torch.cuda, torch.accelerator], ids=["cuda", "another accelerator"])
def test_a_machine_with_an_accelerator_does_not(machine: pytest.MonkeyPatch, kind: SimpleNamespace) -> None:
    machine.setattr(kind, "is_available", lambda: True)
    assert plugin.cpu_platform() is None


def test_sglangs_own_cpu_mode_is_left_alone(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.cpu_platform() is None
    machine.setenv("SGLANG_USE_CPU_ENGINE", "0")
    assert plugin.cpu_platform() == PLATFORM


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("cpu_engine", ["0", "1"])
def test_it_can_be_forced(machine: pytest.MonkeyPatch, accelerator: bool, cpu_engine: str) -> None:
    machine.setenv("SGLANG_PLATFORM", "auf_cpu")
    machine.setenv("SGLANG_USE_CPU_ENGINE", cpu_engine)
    machine.setattr(torch.cuda, "is_available", lambda: accelerator)
    assert plugin.cpu_platform() == PLATFORM


def test_another_sglang_gets_no_platform(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(compat, "version", lambda _: "0.6.0")
    with pytest.raises(CompatError, match=r"0\.6\.0"):
        plugin.cpu_platform()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_another_sglang_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat, "version", lambda _: "0.6.0")
    monkeypatch.setattr(plugin, "_register", lambda: pytest.fail("it must not register"))
    with pytest.raises(CompatError):
        plugin.register()
    (line,) = errors(caplog)
    assert all(part in line for part in ("sglang_auf", "0.6.0", compat.SGLANG_VERSION, "pip install"))
    assert "\n" not in line


def test_a_name_that_moved_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gone = compat.Seam("sglang.srt.layers.sampler:Sampler.gone", "sampler")
    monkeypatch.setattr(plugin, "seams", lambda: (gone,))
    monkeypatch.setattr(plugin, "_register", lambda: pytest.fail("it must not register"))
    with pytest.raises(CompatError):
        plugin.register()
    (line,) = errors(caplog)
    assert "Sampler.gone" in line


def test_sglang_finds_both_entry_points() -> None:
    for group, name, function in (
        ("sglang.srt.plugins", "auf", plugin.register),
        ("sglang.srt.platforms", "auf_cpu", plugin.cpu_platform),
    ):
        (entry,) = [e for e in entry_points(group=group) if e.name == name]
        assert entry.load() is function


REGISTERED = """
import json, warnings
warnings.simplefilter("ignore")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.sampler import _CUSTOM_SAMPLER_FACTORIES
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.speculative import dflash_utils
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
algorithm = SpeculativeAlgorithm.from_string("auf")
print(json.dumps({
    "platform": type(current_platform).__name__,
    "algorithm": type(algorithm).__name__,
    "overlap": algorithm.supports_overlap,
    "sampler": "auf" in _CUSTOM_SAMPLER_FACTORIES,
    "attention": "auf_cpu" in ATTENTION_BACKEND_CHOICES,
    "hooks": sorted(f"{kind.name} {target} {function.__name__}"
                    for target, hooks in HookRegistry._hooks.items() for kind, function, _ in hooks
                    if function.__module__.startswith("sglang_auf.")),
    "unapplied": sorted(set(HookRegistry._hooks) - HookRegistry._patched),
    "refuses": hasattr(dflash_utils.validate_dflash_request, "__wrapped__"),
}))
"""


def printed(program: str, **environment: str) -> str:
    """The last line that a program prints in a fresh process."""
    unset = ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_AUF_BUNDLED")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.e2e
def test_sglang_loads_all_of_it() -> None:
    """What SGLang's own plugin loading leaves behind."""
    found = json.loads(printed(REGISTERED, SGLANG_PLATFORM="auf_cpu"))
    assert found == {
        "platform": "AufCpuPlatform",
        "algorithm": "AufSpecAlgo",
        "overlap": True,
        "sampler": True,
        "attention": True,
        "hooks": sorted(
            f"{hook.kind} {hook.target.replace(':', '.')} {hook.function.__name__}"
            for hook in (*plugin.HOOKS, *algorithm.HOOKS, *swap.HOOKS, *platform.HOOKS)
        ),
        "unapplied": [],
        "refuses": True,
    }


ASKED = """
import asyncio, json, os, warnings
warnings.simplefilter("ignore")
from contextlib import suppress
from types import SimpleNamespace
from sglang.srt import runtime_context
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_auf.hooks import registry

weight_updater.get_parallel = lambda: SimpleNamespace(tp_group=SimpleNamespace(cpu_group=None))

def error_of(settings):
    try:
        GenerateReqInput(text="a", sampling_params=settings).normalize_batch_and_arguments()
    except Exception as error:
        return type(error).__name__

def aborted():
    scheduler = SimpleNamespace(abort_request=print)  # whose abort is ours?
    parts = dict.fromkeys(("tp_worker", "draft_worker", "memory_saver_adapter", "flush_cache", "is_fully_idle"))
    weight_updater.SchedulerWeightUpdaterManager(scheduler=scheduler, **parts)
    return scheduler.abort_request is not print

def next_seed():
    shared = SamplingParams(n=2, sampling_seed=41)
    with suppress(AttributeError):  # of a manager that has nothing to send with
        asyncio.run(TokenizerManager._send_one_request(None, SimpleNamespace(sampling_params=shared, rid="a")))
    return shared.sampling_seed

def found():
    return [error_of({"n": 129}), error_of(5), aborted(), next_seed()]

on_cpu_platform, registry.on_cpu_platform = registry.on_cpu_platform, lambda: False
by_server = {}
for algorithm in ("AUF", "DFLASH", None):
    runtime_context.get_spec = lambda: SimpleNamespace(speculative_algorithm=algorithm)
    by_server[str(algorithm)] = found()
os.environ["SGLANG_AUF_BUNDLED"] = "1"
by_server["bundled"] = found()
del os.environ["SGLANG_AUF_BUNDLED"]
registry.on_cpu_platform = on_cpu_platform
by_server["CPU platform"] = found()
print(json.dumps(by_server))
"""


@pytest.mark.e2e
def test_a_server_without_auf_answers_its_requests_as_sglang_alone_does() -> None:
    """What passes there passes, and what fails there fails as it did. Plain servers of ours check as those with AUF."""
    alone, checked = [None, "TypeError", False, 41], ["ValueError", "ValueError", True, 42]
    assert json.loads(printed(ASKED, SGLANG_PLATFORM="auf_cpu")) == {
        "AUF": checked,
        "DFLASH": alone,
        "None": alone,
        "bundled": checked,
        "CPU platform": checked,
    }


def test_importing_the_plugin_is_light() -> None:
    check = (
        "import sys, sglang_auf.plugin;"
        "sys.exit(bool({'sglang', 'torch', 'numpy', 'pydantic', 'prometheus_client'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.e2e
def test_the_platform_can_be_imported_before_sglang() -> None:
    done = subprocess.run([sys.executable, "-c", "import sglang_auf.cpu.platform"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
