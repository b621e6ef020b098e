"""Numbers of a request that become an index, a size or an integer of fixed width are checked before anything uses them.

SGLang looks at few of them (`TokenizerManager._validate_one_request`: at lengths, never at ids). A scheduler that fails
on one request ends, and every client of the server loses its answer. The checks hold on servers of ours, with and
without a drafter, on every route that generates; what fails is answered with HTTP 400 as SGLang's own checks are (a
ValueError). Three fields are no numbers and are looked at here all the same, because a request with them can end the
engine too: embeddings, labels for metrics, and stop regexes where several processes must agree on an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import Hook

MOST_CHOICES = 128
"""Of n: SGLang makes that many copies of a request before it looks at any of them."""

MOST_ANSWERS = 4096
"""Of an HTTP request: its prompts times n. Each is a request of its own, and takes a place in the queue of all clients.
When the client leaves, each is looked for in that queue."""

MOST_LOGPROBS = 1000
"""Of top_logprobs_num and the list token_ids_logprob: each makes a row of that width for every token."""

BIAS = 100.0
"""OpenAI's limit of a logit_bias, either way."""

INTEGERS = {
    "max_new_tokens": (0, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "top_k": (-1, 2**31 - 1),
    "n": (1, MOST_CHOICES),
    "stream_interval": (1, 2**31 - 1),
    "sampling_seed": (-(2**63), 2**63 - 1),
}
IN_OPENAI = {
    "max_new_tokens": "max_tokens or max_completion_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "top_logprobs_num": "top_logprobs, for completions logprobs,",
}
"""What clients of OpenAI's routes know as something else."""

FLOATS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_REQUEST = "sglang.srt.managers.io_struct:GenerateReqInput"

_FIELDS = (
    *("sampling_params", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    *("input_embeds", "custom_labels", "text", "input_ids"),
)
SEAMS = (
    *(Seam(f"{_REQUEST}.{name}", "hooks.ranges") for name in _FIELDS),
    Seam("sglang.srt.runtime_context:get_observability", "hooks.ranges", ()),
    Seam("sglang.srt.runtime_context:get_parallel", "hooks.ranges", ()),
)


def check_copies(request: Any) -> None:
    """Before `GenerateReqInput.normalize_batch_and_arguments`, which copies the request n times. Raises ValueError."""
    given = request.sampling_params
    for settings in given if isinstance(given, list) else [given]:
        if isinstance(settings, dict):
            _integer("n", settings.get("n"))


def check_answers(manager: Any, request: Any, http: Any = None) -> None:
    """Before `TokenizerManager.generate_request`. Raises ValueError.

    http: the HTTP request. None is a caller within a server or of SGLang's Engine, who disturbs nobody else.
    """
    if http is None:
        return
    given = request.input_ids if request.text is None else request.text
    prompts = len(given) if isinstance(given, list) and given and not isinstance(given[0], Integral) else 1
    settings = request.sampling_params
    first = settings[0] if isinstance(settings, list) and settings else settings  # SGLang wants the same n of all
    n = first.get("n") if isinstance(first, dict) else None
    answers = prompts * (n if isinstance(n, int) else 1)
    if answers > MOST_ANSWERS:
        raise ValueError(
            f"A request may have {MOST_ANSWERS} answers (prompts times n), got {answers}; send several requests."
        )


def check_numbers(manager: Any, request: Any, input_ids: Any) -> None:
    """Before `TokenizerManager._validate_one_request`, of one request of a batch. Raises ValueError.

    input_ids: the prompt's tokens, None where it is given as embeddings.
    """
    vocabulary = manager.model_config.vocab_size
    if input_ids is not None and not len(input_ids):
        # SGLang refuses one empty text, not one of a list. Its row does not exist: alone it ends the scheduler, beside
        # others it is answered from another request's row (layers/logits_processor.py, _get_pruned_states).
        raise ValueError("The prompt is empty: at least one token is needed.")
    # What is behind the context is refused or cut off, and a body of 16 MiB has millions of ids.
    _ids("input_ids", (input_ids or ())[: manager.model_config.context_len], vocabulary)
    settings = request.sampling_params
    if not isinstance(settings, dict):
        return
    for name in INTEGERS:
        _integer(name, settings.get(name))
    for name in FLOATS:
        value = settings.get(name)
        if value is not None and not _is_finite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
    _ids("stop_token_ids", _listed("stop_token_ids", settings.get("stop_token_ids")), vocabulary)
    _check_bias(settings.get("logit_bias"), vocabulary)
    _check_logprobs(request, 0 if input_ids is None else len(input_ids), vocabulary)
    if getattr(request, "input_embeds", None) is not None:
        # A prefill batch of a request with embeddings and one with tokens has rows for the first alone
        # (managers/schedule_batch.py, prepare_for_extend), and the scheduler ends.
        raise ValueError("input_embeds is not supported: such a request cannot share a batch with others.")
    _check_labels(getattr(request, "custom_labels", None))
    _check_stop_regex(settings.get("stop_regex"))


def check_detokenized(serving: Any, adapted: Any, request: Any, raw_request: Any) -> None:
    """Before `OpenAIServingDetokenize._handle_non_streaming_request`. Raises ValueError."""
    vocabulary = serving.tokenizer_manager.model_config.vocab_size
    for entry in request.tokens:
        _ids("tokens", entry if isinstance(entry, list) else [entry], vocabulary)


def _check_bias(bias: Any, vocabulary: int) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise ValueError(f"logit_bias must map token ids to numbers, got {type(bias).__name__}.")
    for key, value in bias.items():
        if not str(key).isdecimal() or int(key) >= vocabulary:
            raise ValueError(f"logit_bias must have token ids in [0, {vocabulary - 1}], got {key!r}.")
        if not _is_finite(value) or abs(value) > BIAS:
            raise ValueError(f"logit_bias of token {key} must be in [-{BIAS:g}, {BIAS:g}], got {value!r}.")


def _check_logprobs(request: Any, length: int, vocabulary: int) -> None:
    """The three settings that choose which log-probabilities are returned; an embedding request has none of them."""
    most = min(MOST_LOGPROBS, vocabulary)
    for name, lowest, highest in (("top_logprobs_num", 0, most), ("logprob_start_len", -1, length)):
        value = getattr(request, name, None)
        if value is not None and not _in_range(value, lowest, highest):
            raise ValueError(_out_of_range(name, lowest, highest, value))
    ids = _listed("token_ids_logprob", getattr(request, "token_ids_logprob", None))
    if len(ids) > MOST_LOGPROBS:
        raise ValueError(f"token_ids_logprob must have at most {MOST_LOGPROBS} ids, got {len(ids)}.")
    _ids("token_ids_logprob", ids, vocabulary)


def _check_labels(given: Any) -> None:
    """A label that the metrics do not have ends the server when the request is counted."""
    if not given:
        return
    from sglang.srt.runtime_context import get_observability

    allowed = get_observability().tokenizer_metrics_allowed_custom_labels or []
    if unknown := sorted(set(given) - set(allowed)):
        raise ValueError(f"custom_labels must have names of {sorted(allowed)}, got {unknown}.")


def _check_stop_regex(given: Any) -> None:
    """A search that takes too long is interrupted (hooks/stops.py), at another moment in each process of a model."""
    if not given:
        return
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size > 1:
        raise ValueError("stop_regex is not supported with --tp-size above 1; leave it out, or use stop.")


def _integer(name: str, value: Any) -> None:
    lowest, highest = INTEGERS[name]
    if value is not None and not _in_range(value, lowest, highest):
        raise ValueError(_out_of_range(name, lowest, highest, value))


def _out_of_range(name: str, lowest: int, highest: int, value: Any) -> str:
    known = f"{name} ({IN_OPENAI[name]} on OpenAI's routes)" if name in IN_OPENAI else name
    return f"{known} must be an integer in [{lowest}, {highest}], got {value!r}."


def _ids(name: str, ids: Iterable[Any], vocabulary: int) -> None:
    for token in ids:
        if not _in_range(token, 0, vocabulary - 1):
            raise ValueError(f"{name} must have token ids in [0, {vocabulary - 1}], got {token!r}.")


def _listed(name: str, value: Any) -> list[Any]:
    """A list without its nulls, which SGLang leaves out too; one number counts as a list of one."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set)):
        return [one for one in value if one is not None]
    raise ValueError(f"{name} must be a list of token ids, got {value!r}.")


def _in_range(value: Any, lowest: int, highest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and lowest <= int(value) <= highest


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an integer of hundreds of digits
        return False


HOOKS = (
    Hook(f"{_MANAGER}.generate_request", "BEFORE", check_answers, ("self", "obj", "request")).on_ours(),
    Hook(f"{_REQUEST}.normalize_batch_and_arguments", "BEFORE", check_copies, ("self",)).on_ours(),
    Hook(
        "sglang.srt.entrypoints.openai.serving_tokenize:OpenAIServingDetokenize._handle_non_streaming_request",
        "BEFORE",
        check_detokenized,
        ("self", "adapted_request", "request", "raw_request"),
    ).on_ours(),
    Hook(f"{_MANAGER}._validate_one_request", "BEFORE", check_numbers, ("self", "obj", "input_ids")).on_ours(),
)
