"""The end of one request ends no other one whose id begins with the same letters.

A client may choose the id of its request (`rid`), and when it leaves, SGLang's scheduler aborts every request whose id
begins with that id (managers/scheduler.py, `abort_request`): with the id "a", a sixteenth of all others.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"

SEAMS = (Seam(f"{_MANAGER}.init_running_status", "hooks.aborts", ("self",)),)  # where rid_to_state is made


def abort_one(original: Any, manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """Around `TokenizerManager.abort_request`. A request that cannot be aborted alone runs to its end."""
    if not abort_all and any(other != rid and other.startswith(rid) for other in manager.rid_to_state):
        logger.warning("request %r is not aborted: ids of other requests begin with its id", rid)
        return
    original(manager, rid, abort_all)


HOOKS = (Hook(f"{_MANAGER}.abort_request", "AROUND", abort_one, ("self", "rid", "abort_all")),)
