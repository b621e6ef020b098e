"""How the processes of a server on a CPU begin: with what environment, and from what.

Importing SGLang takes long. SGLang's processes are spawned, so each imports it anew; a fork of a process that has
imported it begins at once and shares its memory. A fork inherits no threads, and OpenMP would wait for them for ever:
so only a process of our own is forked, which computes nothing before.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

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


def set_environment() -> bool:
    """For programs that this process begins; what the user has set stays. Whether anything was missing."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
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
