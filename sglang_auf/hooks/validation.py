"""Requests that speculative verification cannot honour are refused with a reason (HTTP 400), never answered wrongly."""

from __future__ import annotations

from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import HANDLE_REQUEST, Hook, serves_auf

SEAMS = (
    *(
        Seam(f"sglang.srt.sampling.sampling_params:SamplingParams.{name}", "hooks.validation")
        for name in (
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "min_new_tokens",
            "min_p",
            "custom_params",
        )
    ),
    Seam("sglang.srt.runtime_context:get_exec", "hooks.validation", ()),
    Seam("sglang.srt.runtime_context:get_schedule", "hooks.validation", ()),
    Seam(
        "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase.create_error_response",
        "hooks.validation",
        ("self", "message", "err_type", "status_code", "param"),
    ),
)
NEUTRAL_PENALTIES = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
"""The sampling parameters that depend on the answer so far, and what they are where none is asked for."""

SPECULATIVE = "speculative"
"""In a request's `custom_params`, where SGLang has its `thinking_budget` too: false keeps the drafter out of it."""

_REMEDY = "leave it out, or ask a server without speculation"


def speculates(custom_params: Any) -> bool:
    """Whether drafts may be made for a request with these `custom_params`: always, unless it says otherwise."""
    return not isinstance(custom_params, dict) or custom_params.get(SPECULATIVE) is not False


def refusal(
    sampling_params: Any,
    *,
    return_sampling_mask: bool = False,
    return_hidden_states: Any = False,
    token_indices_to_pool: Any = None,
    deterministic: bool = False,
    mixed_chunk: bool = False,
) -> str | None:
    """Why a request cannot be honoured, or None. The server has --enable-deterministic-inference, --enable-mixed-chunk.

    Penalties are applied along the drafts (speculative/penalties.py). A mixed batch draws the next token of requests
    that decode with SGLang's own state of their penalties, which has seen no token of the answer.
    """
    custom = sampling_params.custom_params
    if isinstance(custom, dict) and not isinstance(asked := custom.get(SPECULATIVE, True), bool):
        return f"custom_params.{SPECULATIVE}={asked!r}: give true (the default), or false for an answer without drafts"
    if mixed_chunk:
        for name, value in NEUTRAL_PENALTIES.items():
            given = getattr(sampling_params, name)
            if given not in (None, value):
                return (
                    f"{name}={given} is not supported with speculative decoding (AUF) and --enable-mixed-chunk; leave "
                    "it out, or ask a server without that flag"
                )
    if deterministic and sampling_params.min_p > 0:
        # An assertion of SGLang's seeded sampler (layers/sampler.py), which would end the engine for every client.
        return (
            f"min_p={sampling_params.min_p} is not supported with --enable-deterministic-inference: SGLang's seeded "
            "sampler cannot apply it; leave it out, or ask a server without that flag"
        )
    if return_sampling_mask:
        return f"return_sampling_mask is not supported with the AUF sampler; {_REMEDY}"
    if return_hidden_states:  # SGLang refuses it under the overlap schedule, and answers with none without it
        return f"return_hidden_states is not supported with speculative decoding (AUF); {_REMEDY}"
    if token_indices_to_pool is not None:
        # SGLang reads scores there only from requests that it knows to be prompts alone, which it knows of none with
        # speculation (Req.is_prefill_only), and would answer with those of other positions.
        return (
            "token_indices_to_pool (score_extraction_token_id of /v1/score) is not supported with speculative decoding "
            f"(AUF); {_REMEDY}"
        )
    return None


def validate_dflash_request(result: str | None, req: Any, enable_overlap: bool) -> str | None:
    """After SGLang's own check of DFLASH requests (speculative/dflash_utils.py).

    SGLang runs a refused request too, for one token of a prompt of its own, with the settings that it came with.
    """
    from sglang.srt.runtime_context import get_exec, get_schedule

    reason = result or refusal(
        req.sampling_params,
        return_sampling_mask=req.return_sampling_mask,
        return_hidden_states=req.return_hidden_states,
        token_indices_to_pool=req.token_indices_to_pool,
        deterministic=bool(get_exec().deterministic.enable_deterministic_inference),
        mixed_chunk=bool(get_schedule().enable_mixed_chunk),
    )
    if reason is not None:
        req.sampling_params.min_p = 0.0
        req.return_sampling_mask = False
    return reason


def openai_complaint(request: Any, served_name: str, target: str) -> tuple[int, str, str] | None:
    """(status, type, message) for a request that is an error in OpenAI's API but that SGLang would answer, or None.

    request: a chat or completion request model. target: the server's --model-path, by which the model may be called
    too. SGLang answers under any model name, and answers a chat with a limit of 0 tokens with an empty message.
    """
    model = getattr(request, "model", None)
    # "default" is what SGLang's request models hold when the client names no model.
    if model not in (None, "default", served_name, target):
        return 404, "NotFoundError", f"model {model!r} does not exist; this server has {served_name!r}"
    if hasattr(request, "messages"):
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(request, name, None) == 0:
                return 400, "BadRequestError", f"{name} must be at least 1, got 0"
    return None


def handle_openai_request(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """Around `OpenAIServingBase.handle_request` (entrypoints/openai/serving_base.py), a coroutine function."""
    if not serves_auf():
        return original(serving, request, raw_request)
    manager = serving.tokenizer_manager
    complaint = openai_complaint(request, manager.served_model_name, manager.model_path)
    if complaint is None:
        return original(serving, request, raw_request)
    return _answer(serving, *complaint)


async def _answer(serving: Any, status: int, kind: str, message: str) -> Any:
    return serving.create_error_response(message=message, err_type=kind, status_code=status)


HOOKS = (
    Hook(
        "sglang.srt.speculative.dflash_utils:validate_dflash_request",
        "AFTER",
        validate_dflash_request,
        ("req", "enable_overlap"),
    ).on_ours(),
    Hook(HANDLE_REQUEST, "AROUND", handle_openai_request, ("self", "request", "raw_request")),
)
