"""The rows of SGLang names: they hold for the installed SGLang, and what moves is named."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
import types
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sglang_auf import compat, plugin
from sglang_auf.compat import Seam, check_seams, check_version, moved
from sglang_auf.cpu import platform
from sglang_auf.cpu import seams as cpu
from sglang_auf.errors import CompatError
from sglang_auf.speculative import algorithm, swap
from sglang_auf.speculative.seams import TREE_SEAMS, WORKER_SEAMS
from sglang_auf.training.text import tools

SEAMS = (*plugin.all_seams(), *tools.SEAMS)
HOOKS = (*plugin.HOOKS, *algorithm.HOOKS, *swap.HOOKS, *platform.HOOKS)


class Worker:
    """A class of the fake SGLang below."""

    device = "cpu"
    block: int

    def accept(self, tokens: object, *, drafted: object = None, **kwargs: object) -> None: ...

    @classmethod
    def make(cls, path: str) -> None: ...


class Special(Worker): ...


def softmax(logits: object) -> None: ...


@pytest.fixture
def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module to hold against rows of our own."""
    module = types.ModuleType("fake_sglang")
    vars(module).update(Worker=Worker, Special=Special, softmax=softmax)
    monkeypatch.setitem(sys.modules, "fake_sglang", module)
    return "fake_sglang"


def test_every_row_holds_for_the_installed_sglang() -> None:
    check_version()
    check_seams(SEAMS)


def test_rows_of_the_worker_wait_for_the_worker() -> None:
    assert all("dflash_worker_v2" not in seam.target for seam in plugin.seams())
    assert {seam.used_by for seam in WORKER_SEAMS} == {
        "speculative.algorithm",
        "speculative.penalties",
        "speculative.worker",
        "speculative.draft_head",
        "speculative.swap",
    }
    assert {seam.used_by for seam in TREE_SEAMS} == {"speculative.tree_step", "cpu.linear"}


def test_every_hook_is_checked() -> None:
    assert {hook.seam for hook in (*plugin.HOOKS, *algorithm.HOOKS, *swap.HOOKS)} <= set(plugin.seams())
    assert {hook.seam for hook in platform.HOOKS} <= set(cpu.SEAMS)


def test_a_target_has_one_row_and_one_signature() -> None:
    """Only hooks may meet on a target, and then they expect the same of it."""
    hooked = {hook.target: hook.parameters for hook in HOOKS}
    assert all(hooked[hook.target] == hook.parameters for hook in HOOKS)
    others = [seam.target for seam in SEAMS if seam not in {hook.seam for hook in HOOKS}]
    assert len({*others, *hooked}) == len(others) + len(hooked)


def test_every_row_names_a_module_of_ours() -> None:
    package = Path(compat.__file__).parent
    for user in {seam.used_by for seam in SEAMS}:
        assert (package / f"{user.replace('.', '/')}.py").is_file(), user


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("softmax", ("logits",)),
        ("Worker.accept", ("self", "tokens", "drafted", "kwargs")),
        ("Worker.make", ("path",)),
        ("Worker.device", None),
        ("Worker.block", None),
        ("Special.block", None),
        ("Special", None),
    ],
)
def test_what_is_there_is_accepted(fake_sglang: str, name: str, parameters: tuple[str, ...] | None) -> None:
    assert moved(Seam(f"{fake_sglang}:{name}", "us", parameters)) is None


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("cross_entropy", None, "cross_entropy"),
        ("Worker.verify", ("self",), "verify"),
        ("Special.width", None, "width"),
        ("softmax", ("logits", "temperature"), "takes ('logits',), expected ('logits', 'temperature')"),
        ("Worker.accept", ("self", "drafted", "tokens", "kwargs"), "expected ('self', 'drafted', 'tokens', 'kwargs')"),
        ("Worker.device", ("self",), "is a str"),
    ],
)
def test_what_moved_is_named_with_its_user(
    fake_sglang: str, name: str, parameters: tuple[str, ...] | None, complaint: str
) -> None:
    found = moved(Seam(f"{fake_sglang}:{name}", "our_module", parameters))
    assert found is not None
    assert complaint in found
    assert f"{fake_sglang}:{name}" in found
    assert "our_module" in found


def prefetch(self: object) -> None: ...


prefetch.__module__ = "sglang_auf.speculative.worker"


def test_what_we_add_is_missing_or_ours_and_a_later_one_of_sglang_is_named(
    fake_sglang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = Seam(f"{fake_sglang}:Worker.prefetch", "our_module", added=True)
    assert moved(added) is None
    monkeypatch.setattr(Worker, "prefetch", prefetch, raising=False)
    assert moved(added) is None
    monkeypatch.setattr(Worker, "prefetch", Worker.accept)
    found = moved(added)
    assert found is not None
    assert f"{fake_sglang}:Worker.prefetch (added by our_module)" in found
    gone = moved(Seam("sglang.srt.no_such_module:Model.prefetch", "us", added=True))
    assert gone is not None and "no_such_module" in gone


def test_a_module_that_is_gone_is_named() -> None:
    found = moved(Seam("sglang.srt.no_such_module:name", "us"))
    assert found is not None
    assert "no_such_module" in found


def test_everything_that_moved_comes_in_one_message(fake_sglang: str) -> None:
    rows = (
        Seam(f"{fake_sglang}:softmax", "worker", ("x",)),
        Seam(f"{fake_sglang}:Worker", "worker"),
        Seam(f"{fake_sglang}:gone", "sampler"),
    )
    with pytest.raises(CompatError) as caught:
        check_seams(rows)
    assert "softmax" in caught.value.found
    assert "gone" in caught.value.found
    assert f"{fake_sglang}:Worker " not in caught.value.found
    assert compat.SGLANG_VERSION in caught.value.remedy


@pytest.mark.parametrize("installed", ["0.5.24", "0.4.9.post1", None])
def test_another_version_is_refused_with_both_named(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        assert name == "sglang"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(CompatError) as caught:
        check_version()
    assert (installed or "none") in caught.value.found
    assert compat.SGLANG_VERSION in caught.value.expected
    assert compat.SGLANG_VERSION in caught.value.remedy


def test_the_pin_is_the_one_in_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert f"sglang=={compat.SGLANG_VERSION}" in project["project"]["dependencies"]


def run(code: str) -> str:
    """Output of Python code in a fresh process, without the installed plugin."""
    environment = os.environ | {"SGLANG_PLUGINS": "none", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.e2e
def test_checking_at_registration_does_not_import_the_worker() -> None:
    seen = run(
        "import sys\n"
        "from sglang_auf import compat, plugin\n"
        "compat.check_seams(plugin.seams())\n"
        "print([name for name in sys.modules if name.endswith(('dflash_worker_v2', 'managers.scheduler'))])\n"
    )
    assert seen.splitlines()[-1] == "[]"


def test_all_rows_can_be_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert compat.SGLANG_VERSION in first
    assert lines == [f"holds  {seam}" for seam in SEAMS]

    monkeypatch.setattr(plugin, "seams", lambda: (Seam("sglang.srt.layers.sampler:gone", "us"),))
    monkeypatch.setattr(compat, "version", lambda _: "0.6.0")
    assert compat.main() == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "0.6.0" in first
    assert second.startswith("moved  sglang.srt.layers.sampler:gone (used by us)")


def test_what_we_override_has_the_parameters_of_its_row() -> None:
    """A row that follows SGLang while our own method stays behind would hide the break."""
    from sglang_auf.cpu.attention import CpuAttentionBackend
    from sglang_auf.cpu.memory import CpuKVPool
    from sglang_auf.cpu.platform import AufCpuPlatform, assign_req_to_token_pool, verify_cache_slots
    from sglang_auf.speculative.worker import AufWorker

    rows = {seam.target.rpartition(":")[2]: seam.parameters for seam in SEAMS}
    ours = {
        "assign_extend_cache_locs_func": verify_cache_slots,
        "assign_req_to_token_pool_func": assign_req_to_token_pool,
    }
    for cls in (AufWorker, AufCpuPlatform, CpuAttentionBackend, CpuKVPool):
        for name in vars(cls):
            for base in cls.__mro__[1:]:
                if f"{base.__name__}.{name}" in rows:
                    ours[f"{base.__name__}.{name}"] = vars(cls)[name]
    assert len(ours) > 18
    for name, function in ours.items():
        parameters = inspect.signature(function).parameters
        expected = rows[name]
        if expected is not None and "args" not in parameters:  # forward_decode and forward_extend pass all on
            assert set(parameters) == set(expected), name
