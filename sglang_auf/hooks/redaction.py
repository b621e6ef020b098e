"""Keys stay out of logs and replies.

SGLang prints its whole configuration when it starts, and GET /server_info sends it to whoever holds any key: once as
the server process has it and once as the scheduler has it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
CONFIGURATION = "sglang.srt.server_args:ServerArgs.resolved_dict"
"""What SGLang shows of its configuration, in logs, /server_info and internal states. Nothing is configured from it."""


@cache  # once per process, however often it is called
def install() -> None:
    """Register the hook; SGLang applies it after the last plugin."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(CONFIGURATION.replace(":", "."), redacted, HookType.AFTER)


def redacted(configuration: dict[str, Any], *_: Any) -> dict[str, Any]:
    """The same with "***" for each secret that is set."""
    return configuration | {name: "***" for name in SECRETS if configuration.get(name)}
