"""What an SGLang server says of every token of an answer, by one prefill of the prompt and the answer."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.harness.server_info import call
from sglang_auf.errors import ServerError

PREFILL_S = 600.0
"""Seconds that a server may take for one prompt and answer."""


class TokenLogprob(NamedTuple):
    """Log-probabilities at one place of an answer.

    token: of the answer, and `value` is its own. top: (value, token) of the likeliest tokens, the likeliest first. The
    difference of two values is the difference of the two logits.
    """

    token: int
    value: float
    top: tuple[tuple[float, int], ...]


def longest_prefill(base_url: str) -> int:
    """The largest number of tokens that an SGLang server takes as a prompt. Raises ServerError."""
    try:
        return int(call(base_url, "/server_info")["max_req_input_len"]) - 1
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{base_url}/server_info without {error}", "SGLang 0.5.23") from None


def answer_logprobs(
    base_url: str, prompt_ids: list[int], answer_ids: list[int], cache: str, top: int = 1
) -> list[TokenLogprob]:
    """What the server says of each token of an answer, after all that is before it.

    cache: a name for cached prefixes. Those that requests with another name left on the server are not used: they may
    be of decoding, which is what is judged. top: how many of the likeliest tokens are told at each place.

    Raises ServerError.
    """
    ids = [*prompt_ids, *answer_ids]
    request = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        # SGLang takes no prefix beyond this place from its cache, and returns a value for each token behind it.
        "logprob_start_len": len(prompt_ids) - 1,
        "top_logprobs_num": top,
        "extra_key": cache,
    }
    try:
        meta = call(base_url, "/generate", request, PREFILL_S)["meta_info"]
        prefilled, values, best = (
            meta[name] for name in ("prompt_tokens", "input_token_logprobs", "input_top_logprobs")
        )
        # The first place is the prompt's last token, which has no value there.
        told = [(int(token), float(value)) for value, token, _ in values[1:]]
        likeliest = [tuple((float(value), int(token)) for value, token, _ in of_place) for of_place in best[1:]]
    except (KeyError, TypeError, ValueError) as error:
        found = f"a reply of {base_url}/generate that cannot be read ({type(error).__name__}: {error})"
        raise ServerError(found, "a log-probability of each token", "use SGLang 0.5.23") from None
    # SGLang writes 0 for the last token of the vocabulary.
    same = len(told) == len(likeliest) == len(answer_ids) and all(
        token in (sent, 0) for (token, _), sent in zip(told, answer_ids, strict=True)
    )
    if prefilled != len(ids) or not same or any(len(of_place) != top for of_place in likeliest):
        raise ServerError(
            f"log-probabilities of {len(told)} tokens, after a prefill of {prefilled}, from {base_url}",
            f"those of the {len(answer_ids)} tokens that end a text of {len(ids)}, and of {top} likeliest beside each",
            "use SGLang 0.5.23, without --allow-auto-truncate",
        )
    return [
        TokenLogprob(token, value, of_place)
        for token, (_, value), of_place in zip(answer_ids, told, likeliest, strict=True)
    ]
