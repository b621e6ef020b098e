"""Every environment variable of this project, with its meaning and its default.

SGLang hands the environment of the server on to its scheduler processes, which is why switches of the scheduler are
variables: SGLang has no server argument for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sglang_auf.errors import ConfigError

SPELLINGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable that is "1" or "0", or another of SPELLINGS. `default` holds where it is empty or not set."""

    name: str
    default: bool
    meaning: str

    def is_on(self) -> bool:
        """Raises ConfigError for what is no switch."""
        given = os.environ.get(self.name, "")
        if given and given.lower() not in SPELLINGS:
            raise ConfigError(f"{self.name}={given}", "1 or 0", "correct or unset it")
        return SPELLINGS[given.lower()] if given else self.default

    def is_asked_for(self) -> bool:
        """Whether it was switched on, not only left at its default."""
        return bool(os.environ.get(self.name)) and self.is_on()

    def set(self, on: bool) -> None:
        """For this process and those that it starts."""
        os.environ[self.name] = "1" if on else "0"


TREE = Switch("SGLANG_AUF_TREE", True, "verify a tree of drafts, as large as the load makes worthwhile (CPU)")
CPU_OVERLAP = Switch("SGLANG_AUF_CPU_OVERLAP", False, "run AUF under SGLang's overlap schedule, as on a GPU (CPU)")
DRAFT_VOCABULARY = Switch("SGLANG_AUF_DRAFT_VOCABULARY", True, "draft only tokens of the drafter's list, if it has one")
FORK = Switch("SGLANG_AUF_FORK", False, "SGLang's processes are forks of the server's, which has imported SGLang (CPU)")
REPLAY = Switch("SGLANG_AUF_REPLAY", True, "a forward of few rows is a list of kernels, without the modules (CPU)")
ROW_INVARIANT = Switch("SGLANG_AUF_ROW_INVARIANT", True, "products give a row the same bits in any batch (CPU)")

TREE_NODES = "SGLANG_AUF_TREE_NODES"
"""Nodes of each request's tree, whatever the load. Default: as many as the load makes worthwhile."""

STEP_LOG = "SGLANG_AUF_STEP_LOG"
"""Steps after which the scheduler logs how long their parts took (CPU). Default: 0, never."""

BUNDLED = "SGLANG_AUF_BUNDLED"
"""Set by `python -m server`: requests are checked and seeded as with AUF, with --plain too, and what it has said of the
drafter is not said again. Default: not set."""

PLANNED_DEVICE = "SGLANG_AUF_PLANNED_DEVICE"
"""Set by `python -m server --check`: bytes of a CUDA device that need not be here. SGLang takes its arguments for one.
Default: not set."""

API_KEY = "SGLANG_AUF_API_KEY"
"""The server's API key, for `python -m server`, where `ps` does not show it. Default: no key."""

HOME = "SGLANG_AUF_HOME"
"""Directory of prepared targets. Default: sglang-auf under $XDG_CACHE_HOME or ~/.cache."""

CLIENT_API_KEY = "OPENAI_API_KEY"
"""The key that benchmarks, `sglang-auf prompts` and `regenerate` send to a server. Default: a placeholder."""


def step_log() -> int:
    """Raises ValueError for what is no number."""
    given = os.environ.get(STEP_LOG, "0")
    if not given.isdecimal():
        raise ValueError(f"{STEP_LOG}={given}")
    return int(given)


def tree_nodes() -> int | None:
    """Raises ValueError for what is no such number."""
    given = os.environ.get(TREE_NODES)
    if given is not None and not (given.isdecimal() and int(given)):
        raise ValueError(f"{TREE_NODES}={given}")
    return None if given is None else int(given)


def home() -> Path:
    """Where prepared targets and caches lie."""
    if chosen := os.environ.get(HOME):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sglang-auf"


def client_api_key() -> str:
    """What clients send where no key is set: the openai client refuses an empty one."""
    return os.environ.get(CLIENT_API_KEY, "EMPTY")
