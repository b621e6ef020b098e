"""What a request breaks before the scheduler has it is answered with HTTP 400, on every route that generates.

Two kinds of fault reach further in SGLang. A field of a wrong shape raises a TypeError, an IndexError or the like while
the request is prepared: the client gets a 500, or a stream that ends in the middle. A field of a wrong type passes, and
the scheduler ends when it uses it: types are checked only where objects travel as msgpack, which is not the default
(managers/io_struct.py, `_USE_PICKLE_IPC`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook

_IO = "sglang.srt.managers.io_struct"
_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"

OPAQUE = ("mm_inputs", "positional_embed_overrides", "time_stats")
"""Fields of a tokenized request that hold objects without a fixed type."""

SEAMS = (
    Seam(f"{_IO}:msgpack_encode", "hooks.intake", ("obj",)),
    Seam(f"{_IO}:msgpack_decode", "hooks.intake", ("data",)),
    Seam("sglang.srt.managers.embed_types:PositionalEmbeds", "hooks.intake"),
)

FAULTS = (
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    NotImplementedError,
    re.error,  # of a stop_regex
)


def refuse_faults(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a step that prepares a request, plain or coroutine: what it raises becomes a ValueError, thus a 400."""
    try:
        prepared = original(*args, **kwargs)
    except FAULTS as error:
        raise _refusal(error) from error
    return _awaited(prepared) if inspect.isawaitable(prepared) else prepared


async def _awaited(prepared: Awaitable[Any]) -> Any:
    try:
        return await prepared
    except FAULTS as error:
        raise _refusal(error) from error


def _refusal(error: BaseException) -> ValueError:
    return ValueError(f"The request cannot be prepared, a field has a wrong form ({type(error).__name__}: {error}).")


def check_types(tokenized: Any, *_: Any, **__: Any) -> None:
    """After `TokenizerManager._create_tokenized_object`: the scheduler's types, by SGLang's own encoder and decoder.

    Raises ValueError, which names the field where msgspec does.
    """
    import msgspec
    from sglang.srt.managers.embed_types import PositionalEmbeds
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    overrides = tokenized.positional_embed_overrides
    if overrides is not None and not isinstance(overrides, PositionalEmbeds):
        raise ValueError(f"positional_embed_overrides must be a PositionalEmbeds, got a {type(overrides).__name__}.")
    settings = msgspec.structs.replace(tokenized.sampling_params, custom_params=None)  # may hold anything
    plain = msgspec.structs.replace(tokenized, **dict.fromkeys(OPAQUE), sampling_params=settings)
    try:
        msgpack_decode(msgpack_encode(plain))
    except (msgspec.MsgspecError, *FAULTS) as error:
        raise ValueError(f"A field of the request has a wrong type ({_with_names(str(error), tokenized)}).") from error


def _with_names(complaint: str, tokenized: Any) -> str:
    """msgspec names a field by its place in the encoded list, whose first entry is the name of the class."""
    return re.sub(r"\$\[(\d+)\]", lambda place: tokenized.__struct_fields__[int(place[1]) - 1], complaint)


HOOKS = (
    Hook(
        f"{_MANAGER}._create_tokenized_object",
        "AFTER",
        check_types,
        ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
    ),
    *(
        Hook(f"{_IO}:{kind}.{method}", "AROUND", refuse_faults, parameters)
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
        for method, parameters in (("normalize_batch_and_arguments", ("self",)), ("__getitem__", ("self", "i")))
    ),
    Hook(f"{_MANAGER}._init_req_state", "AROUND", refuse_faults, ("self", "obj", "request")),
    Hook(f"{_MANAGER}._tokenize_one_request", "AROUND", refuse_faults, ("self", "obj")),
    Hook(f"{_MANAGER}._batch_tokenize_and_process", "AROUND", refuse_faults, ("self", "batch_size", "obj")),
)
