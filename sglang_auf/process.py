"""A process of ours: its end by SIGTERM, what its control groups leave it, and how those of a CPU server begin.

Importing SGLang takes long. SGLang's processes are spawned, so each imports it anew; a fork of a process that has
imported it begins at once and shares its memory. A fork inherits no threads, and OpenMP would wait for them for ever:
so only a process of our own is forked, which computes nothing before.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, NoReturn

from sglang_auf.env import FORK

ENVIRONMENT = {
    # Huge pages, where the system allows them on request.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # How often a waiting OpenMP thread looks before it gives its core away. With OpenMP's own 300,000 it keeps the core
    # for milliseconds; where another program wants it, the thread that is waited for has none. With 0 it sleeps at
    # once, and is woken some hundred times in a step (figures: docs/results/threads.md).
    "GOMP_SPINCOUNT": "10000",
}
"""What the C library and OpenMP read when a program begins, and never again."""

THREADS = "OMP_NUM_THREADS"
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def end_on_sigterm(*, trains: bool = False) -> None:
    """From now on SIGTERM ends this program with exit code 143, and every `finally` runs.

    The first thing that a program does: to process 1 of a container the kernel sends no signal without a handler. One
    that trains is left alone where it is one rank of several: a handler waits for Python, and a rank that waits for
    others may wait for ever. Other programs get a handler whatever a platform says of ranks.
    """
    if not trains or not is_one_of_several_ranks():
        signal.signal(signal.SIGTERM, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # begin_server keeps it back


def is_one_of_several_ranks() -> bool:
    """Whether a launcher, such as torchrun, says so. Some platforms say it of every program."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks: it is the first one, or there is no other."""
    return not is_one_of_several_ranks() or os.environ.get("RANK", "0") == "0"


def is_begun_again() -> bool:
    """Whether torchrun says that it began this rank before, and that one of the ranks failed (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def end_at_once(code: int) -> NoReturn:
    """End this process without what Python does at an end, which may wait for ever: for threads, for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def cgroups(controller: str) -> list[Path]:
    """Directories of the control groups that this process is in, the innermost first: each may have a limit.

    controller: "cpu" or "memory". cgroup 2 has one tree, cgroup 1 one for each controller. In a container the kernel
    may name a path that begins above what is mounted: then only the root counts, which is the container's own.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, own = CGROUPS / (controller if controllers else ""), PurePosixPath(path.lstrip("/"))
        inner = [root / group for group in (own, *own.parents)] if ".." not in own.parts else [root]
        found += [group for group in inner if group.is_dir()]
    return found


def quota_cores() -> int | None:
    """Cores that the control groups' quotas leave this process, rounded up; None without a quota."""
    cores = [-(-quota // period) for quota, period in _quotas()]
    return min(cores, default=None)


def _quotas() -> Iterator[tuple[int, int]]:
    """Microseconds of all cores together that may be used in a period, and the period."""
    for group in cgroups("cpu"):
        with contextlib.suppress(OSError):
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota), int(period)
        with contextlib.suppress(OSError):  # cgroup 1, where -1 is none
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota), int(period)


def _wanted() -> dict[str, str]:
    """ENVIRONMENT, and a thread for each core of a quota: OpenMP counts the cores that the process may run on."""
    cores = quota_cores()
    if cores is None:
        return ENVIRONMENT
    return ENVIRONMENT | {THREADS: str(min(cores, len(os.sched_getaffinity(0))))}


def set_environment() -> bool:
    """For programs that this process begins; what the user has set stays. Whether anything was missing."""
    missing = {name: value for name, value in _wanted().items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:  # says the same in other words, and GOMP_SPINCOUNT would overrule it
        missing.pop("GOMP_SPINCOUNT", None)
    os.environ.update(missing)
    return bool(missing)


def begin_server() -> None:
    """Begin this program anew with ENVIRONMENT, unless it has it, and let SGLang fork from it.

    Before anything is imported that takes long. The process and its command line stay the same.
    """
    os.environ.setdefault(FORK.name, "1")
    if set_environment():
        sys.stdout.flush()
        sys.stderr.flush()
        # The new program has no handler yet; what is kept back comes when it has one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def fork_children(result: Any, server_args: Any) -> Any:
    """AFTER SGLang's `_set_envs_and_config`, which has just decided that all children are spawned."""
    if FORK.is_on() and threading.active_count() == 1:
        gc.collect()
        gc.freeze()  # a collection would write to every object, and unshare its page
        os.register_at_fork(after_in_child=_leave_signals)
        multiprocessing.set_start_method("fork", force=True)
    return result


def _leave_signals() -> None:
    """What stops a server often goes to its whole group of processes (Ctrl-C, systemd). The server's own process
    answers it: it finishes what it has begun, for which it needs its children, and then ends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
