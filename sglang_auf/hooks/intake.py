"""What a request breaks before the scheduler has it is answered with HTTP 400, on every route that generates.

Two kinds of fault reach further in SGLang. A field of a wrong shape raises a TypeError, an IndexError or the like while
the request is prepared: the client gets a 500, or a stream that ends in the middle. A field of a wrong type passes, and
the scheduler ends when it uses it: types are checked only where objects travel as msgpack, which is not the default
(managers/io_struct.py, `_USE_PICKLE_IPC`).

And a long text takes seconds to tokenise, in which the event loop would serve no other client. So that is done beside
it, as SGLang does for chats.
"""

from __future__ import annotations

import asyncio
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

HEALTH_ROUTES = ("/health", "/health_generate")

SKEW_S = 3600.0
"""How far from now a request may say that it came, in seconds: a router in front says it."""

LONG = 2**14
"""Characters that are tokenised in the event loop, in some 10 ms. More are not."""

SEAMS = (
    Seam(f"{_MANAGER}.init_tokenizer_and_processor", "hooks.intake", ("self",)),  # async_dynamic_batch_tokenizer
    *(Seam(f"{_IO}:GenerateReqInput.{name}", "hooks.intake") for name in ("rid", "received_time")),
    Seam("sglang.srt.constants:HEALTH_CHECK_RID_PREFIX", "hooks.intake"),
    Seam("sglang.srt.observability.req_time_stats:monotonic_time", "hooks.intake"),
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


async def tokenize(original: Any, manager: Any, texts: Any, *rest: Any, **more: Any) -> Any:
    """Around `TokenizerManager._tokenize_texts`, a coroutine function. texts: one, or a list."""
    listed = texts if isinstance(texts, list) else [texts]
    short = sum(len(text) for text in listed if isinstance(text, str)) <= LONG
    if short or manager.async_dynamic_batch_tokenizer is not None:  # that one has a thread of its own
        return await original(manager, texts, *rest, **more)
    return await beside(original, manager, texts, *rest, **more)


async def beside(original: Any, *arguments: Any, **options: Any) -> Any:
    """Around a coroutine function that waits for nothing: it runs in another thread."""
    return await asyncio.to_thread(lambda: asyncio.run(original(*arguments, **options)))


def admit(original: Any, manager: Any, request: Any, http: Any = None) -> None:
    """Around `TokenizerManager._init_req_state`. http: the HTTP request, None within a server. Raises ValueError."""

    def checked() -> None:
        check_origin(request, http)
        original(manager, request, http)

    refuse_faults(checked)


def check_origin(request: Any, http: Any = None) -> None:
    """Raises ValueError for what a request says about itself and only SGLang may say.

    Every id begins with the empty one, so to abort that request would be to abort all. A busy scheduler drops a request
    with the id of a health check without a word: the client would wait for ever, and so would a server that is told to
    stop. And the metrics of all clients would hold a time that is no time.
    """
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
    from sglang.srt.observability.req_time_stats import monotonic_time

    ids = request.rid if isinstance(request.rid, list) else [request.rid]
    if "" in ids:
        raise ValueError("rid must not be empty; leave it out, or give each request an id of its own.")
    reserved = [rid for rid in ids if isinstance(rid, str) and rid.startswith(HEALTH_CHECK_RID_PREFIX)]
    if reserved and (http is None or not http.url.path.endswith(HEALTH_ROUTES)):
        raise ValueError(f"rid must not begin with {HEALTH_CHECK_RID_PREFIX}, got {reserved[0]!r}.")
    came = request.received_time
    if came is not None and not abs(came - monotonic_time()) < SKEW_S:  # `not <` refuses NaN too
        raise ValueError(f"received_time must be within an hour of the server's clock, got {came!r}.")


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
    ).on_ours(),
    *(
        Hook(f"{_IO}:{kind}.{method}", "AROUND", refuse_faults, parameters).on_ours()
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
        for method, parameters in (("normalize_batch_and_arguments", ("self",)), ("__getitem__", ("self", "i")))
    ),
    Hook(f"{_MANAGER}._init_req_state", "AROUND", admit, ("self", "obj", "request")).on_ours(),
    Hook(f"{_MANAGER}._tokenize_one_request", "AROUND", refuse_faults, ("self", "obj")).on_ours(),
    Hook(f"{_MANAGER}._tokenize_texts", "AROUND", tokenize, ("self", "texts", "is_cross_encoder")).on_ours(),
    Hook(
        "sglang.srt.entrypoints.openai.serving_tokenize:OpenAIServingTokenize._handle_non_streaming_request",
        "AROUND",
        beside,
        ("self", "adapted_request", "request", "raw_request"),
    ).on_ours(),
    Hook(f"{_MANAGER}._batch_tokenize_and_process", "AROUND", refuse_faults, ("self", "batch_size", "obj")).on_ours(),
)
