"""A profile as arguments of SGLang's own server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from server.profile import Profile
from sglang_auf import ALGORITHM
from sglang_auf.errors import ConfigError
from sglang_auf.settings import enable_thinking, suggestion

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

# Arguments that the profile or a flag owns. If server_args gave them too, one of the two would be ignored.
OWNED = {
    "model_path": "target",
    "revision": "target_revision",
    "speculative_algorithm": "drafter",
    "speculative_draft_model_path": "drafter",
    "speculative_draft_model_revision": "drafter_revision",
    "speculative_num_draft_tokens": "block_size",
    "speculative_dflash_block_size": "block_size",
    "device": "device",
    "dtype": "dtype",
    "default_chat_template_kwargs": "thinking",
    "host": "host",
    "port": "port",
    "served_model_name": "served_model_name",
    "api_key": "--api-key",
}

WITHOUT_KEY = ("/health", "/ready", "/metrics")
"""Where SGLang asks for no API key; the path that the server is served under counts (sglang/srt/utils/auth.py)."""

# Routes, totals and the gate live in one HTTP process on one machine.
ONLY_ONE = ("tokenizer_worker_num", "nnodes")

OTHER_SERVERS = ("grpc_port", "grpc_mode", "smg_grpc_mode", "use_ray", "encoder_only")
"""Ask SGLang for another server: one without the API key and the closed routes of this one, or none at all."""


def sglang_arguments(profile: Profile, target: str, drafter: Path | None, api_key: str | None = None) -> dict[str, Any]:
    """Keyword arguments for SGLang's ServerArgs. target: directory or hub id. drafter: None serves plainly.

    Plain serving drops every speculative_* argument and keeps the rest, so that the two differ in nothing else.
    """
    arguments = dict(profile.server_args)
    arguments |= {
        "model_path": target,
        "revision": profile.target_revision,
        "device": profile.device,
        "dtype": profile.dtype,
        "host": profile.host,
        "port": profile.port,
        "served_model_name": profile.served_model_name,
        "api_key": api_key,
    }
    if (thinking := enable_thinking(profile.thinking)) is not None:
        arguments["default_chat_template_kwargs"] = {"enable_thinking": thinking}
    if drafter is None:
        return {key: value for key, value in arguments.items() if not key.startswith("speculative_")}
    arguments |= {"speculative_algorithm": ALGORITHM, "speculative_draft_model_path": str(drafter)}
    if profile.block_size is not None:
        arguments["speculative_num_draft_tokens"] = profile.block_size
    return arguments


def check_server_args(given: dict[str, Any]) -> None:
    """Raise ConfigError for the first key that SGLang does not know or the profile owns, or whose value is wrong."""
    from sglang.srt.server_args import ServerArgs

    known = get_type_hints(ServerArgs, include_extras=True)
    for key, value in given.items():
        if key in OWNED:
            raise ConfigError(f"server_args.{key}", f"{OWNED[key]}, which sets this argument")
        if key not in known:
            raise ConfigError(
                f"server_args.{key}: SGLang has no such argument{suggestion(key, known)}",
                "an argument of SGLang's server by its Python name",
                "python -m sglang.launch_server --help lists them (with - for _)",
            )
        _check_value(key, value, known[key])
        if key in OTHER_SERVERS and value not in (None, False):
            raise ConfigError(
                f"server_args.{key} = {value}",
                "this HTTP server, whose key, routes and counts another one would go past",
                "leave it out, or start SGLang's own server (python -m sglang.launch_server)",
            )
        if key in ONLY_ONE and value != 1:
            raise ConfigError(f"server_args.{key} = {value}", "1, since this server is one HTTP process")
        if key == "skip_server_warmup" and value:
            raise ConfigError(
                f"server_args.{key} = {value}",
                "the first request, which proves that the server answers, and drafts, before it is announced",
                "leave it out",
            )
        if key == "fastapi_root_path" and value.startswith(WITHOUT_KEY):
            raise ConfigError(
                f"server_args.{key} = {value!r}, under which SGLang would ask no request for its API key",
                f"a path that does not begin with {', '.join(WITHOUT_KEY)}",
            )


def _check_value(key: str, value: object, annotation: Any) -> None:
    try:
        # SGLang's records do not check types; a wrong one would give a stack trace in the middle of start-up.
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        raise ConfigError(
            f"server_args.{key} = {value!r}", error.errors()[0]["msg"], "change the profile or the --set"
        ) from error
    for detail in getattr(annotation, "__metadata__", ()):
        choices = getattr(detail, "choices", None)
        if choices and value is not None and value not in choices:
            raise ConfigError(f"server_args.{key} = {value!r}", f"one of {', '.join(map(str, choices))}")


def build_server_args(arguments: dict[str, Any]) -> ServerArgs:
    """SGLang's record, resolved. Raises ConfigError with SGLang's reason where SGLang refuses the combination."""
    from sglang.srt.server_args import ServerArgs

    record = ServerArgs(**arguments)
    try:
        record.resolve_once()
    except (ValueError, AssertionError, NotImplementedError, OSError, ImportError) as error:
        raise ConfigError(
            f"SGLang refuses these arguments: {error}",
            "arguments that it can honour",
            "change the profile or the --set",
        ) from error
    return record
