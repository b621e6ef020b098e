"""Keys stay out of logs and replies.

SGLang prints its configuration when it starts, and GET /server_info sends it to anyone with a key: once as the server
process has it and once as the scheduler has it.
"""

from __future__ import annotations

from typing import Any

from sglang_auf.hooks.registry import Hook

SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def redacted(configuration: dict[str, Any], *_: Any) -> dict[str, Any]:
    """The configuration with "***" for each secret that is set.

    After `ServerArgs.resolved_dict`, which SGLang uses only to show its configuration: in logs, /server_info and
    internal states.
    """
    return configuration | {name: "***" for name in SECRETS if configuration.get(name)}


HOOKS = (Hook("sglang.srt.server_args:ServerArgs.resolved_dict", "AFTER", redacted, ("self",)),)
