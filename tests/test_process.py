"""How a CPU server's processes begin, each case in a process of its own, since it changes the process for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sglang_auf import process
from sglang_auf.env import FORK
from sglang_auf.process import ENVIRONMENT, THREADS, quota_cores, set_environment

TUNABLES, SPINS = ENVIRONMENT


def result(program: str, *arguments: str, **environment: str) -> Any:
    """What the program prints, a JSON value."""
    unset = (*ENVIRONMENT, "OMP_WAIT_POLICY", FORK.name)
    clean = {name: value for name, value in os.environ.items() if name not in unset} | {THREADS: "1"}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return json.loads(subprocess.check_output(command, env=clean | environment, text=True, timeout=60))


BEGIN = """
    import json, os, sys
    from sglang_auf.process import begin_server
    begins = os.environ["BEGINS"] = str(int(os.environ.get("BEGINS", 0)) + 1)
    begin_server()
    names = ["GLIBC_TUNABLES", "GOMP_SPINCOUNT", "SGLANG_AUF_FORK"]
    print(json.dumps([begins, sys.argv[1:], *(os.environ.get(name) for name in names)]))
"""


def test_a_server_begins_anew_once_with_the_same_arguments() -> None:
    arguments = ["--set", "a=b c", "--plain"]
    assert result(BEGIN, *arguments) == ["2", arguments, "glibc.malloc.hugetlb=1", "10000", "1"]


def test_what_the_user_has_set_stays() -> None:
    settings = {TUNABLES: "glibc.malloc.hugetlb=0", FORK.name: "0"}
    assert result(BEGIN, **settings) == ["2", [], "glibc.malloc.hugetlb=0", "10000", "0"]
    assert result(BEGIN, **settings, OMP_WAIT_POLICY="ACTIVE") == ["1", [], "glibc.malloc.hugetlb=0", None, "0"]
    settings[SPINS] = "7"
    assert result(BEGIN, **settings) == ["1", [], "glibc.malloc.hugetlb=0", "7", "0"]


@pytest.mark.parametrize(
    ("own", "quotas", "cores"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "c/cpu.max": "100000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "250000 50000"}, 3),
        ("0::/../../a", {"cpu.max": "200000 100000"}, 2),
        ("1:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "250000", "cpu/d/cpu.cfs_period_us": "100000"}, 3),
        ("1:cpu:/host/path", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:memory:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_server_has_a_thread_for_each_core_of_its_quota(
    own: str, quotas: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (said := tmp_path / "own").write_text(f"{own}\n")
    for name, content in quotas.items():
        (file := tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    monkeypatch.setattr(process, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(process, "OWN_CGROUPS", said)
    assert quota_cores() == cores
    for usable, threads in ((64, cores), (1, cores and 1)):
        variables: dict[str, str] = {}
        monkeypatch.setattr(os, "environ", variables)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: set(range(usable)))
        set_environment()
        assert variables.get(THREADS) == (None if threads is None else str(threads))
    variables[THREADS] = "5"
    set_environment()
    assert variables[THREADS] == "5"


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "OWN_CGROUPS", tmp_path / "missing")
    assert quota_cores() is None


FORKED = """
    import json, multiprocessing, signal, sys, threading
    from sglang_auf.process import fork_children

    def child(pipe):
        signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)]
        pipe.send([seen, signals == [signal.SIG_IGN, signal.SIG_IGN, signal.SIG_DFL]])

    multiprocessing.set_start_method("spawn")
    signal.signal(signal.SIGTERM, lambda *_: None)
    if "thread" in sys.argv:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    assert fork_children("result", None) == "result"
    method = multiprocessing.get_start_method()
    if method == "fork":
        seen = "set before the fork"
        receive, send = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(target=child, args=(send,)).start()
        print(json.dumps(receive.recv()))
    else:
        print(json.dumps(method))
"""


def test_a_child_is_a_copy_of_the_server_and_leaves_it_to_answer_signals() -> None:
    assert result(FORKED, SGLANG_AUF_FORK="1") == ["set before the fork", True]


@pytest.mark.parametrize(("fork", "argument"), [("0", ""), ("1", "thread")])
def test_children_are_spawned_unless_asked_for_and_where_a_thread_runs(fork: str, argument: str) -> None:
    assert result(FORKED, argument, SGLANG_AUF_FORK=fork) == "spawn"


BEGINS = """
import os, signal, sys, time
from sglang_auf import process
if os.environ.get("BEGUN"):
    time.sleep(0.2)  # what a program imports before it handles signals
    process.end_on_sigterm()
    sys.exit("still here")
process.end_on_sigterm()
os.environ["BEGUN"] = "1"
process.set_environment = lambda: True
begin, process.os.execv = os.execv, lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), begin(*arguments))
process.begin_server()
"""


def test_a_sigterm_between_the_programs_of_a_server_is_not_lost(tmp_path: Path) -> None:
    """Process 1 of a container would never hear of it."""
    (program := tmp_path / "program.py").write_text(BEGINS)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, env=environment()
    )
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.parametrize(
    ("trains", "ranks", "handled"),
    [(True, None, True), (True, "1", True), (True, "2", False), (False, "2", True), (False, "two", True)],
)
def test_ranks_of_a_training_end_at_once_and_other_programs_in_order(
    trains: bool, ranks: str | None, handled: bool
) -> None:
    """A rank that waits for others in C++ runs no handler."""
    told = f"import signal; from sglang_auf.process import end_on_sigterm; end_on_sigterm(trains={trains}); "
    told += "print(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)"
    world = {} if ranks is None else {"WORLD_SIZE": ranks}
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, env=environment() | world
    )
    assert done.stdout.strip() == str(handled)


@pytest.mark.parametrize(
    ("world", "rank", "first"),
    [(None, None, True), ("1", "3", True), ("2", "0", True), ("2", "1", False), ("2", None, True)],
)
def test_the_first_rank_speaks_for_all(
    world: str | None, rank: str | None, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", rank)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert process.is_first_rank() is first


def environment() -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "BEGUN")}
    return known | {"PYTHONPATH": os.pathsep.join(sys.path)}
