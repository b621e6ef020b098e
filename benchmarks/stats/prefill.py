"""What an SGLang server says of every token of an answer, by one prefill of the prompt and the answer."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.harness.server_info import call
from sglang_auf.errors import ServerError

PREFILL_S = 600.0
"""Seconds that a server may take for one prompt and answer."""


class TokenLogprob(NamedTuple):
    """Log-probabilities at one place of an answer: of its token, and of the best token, whose id is `best`.

    Their difference is the difference of the two logits.
    """

    value: float
    best_value: float
    best: int


def longest_prefill(base_url: str) -> int:
    """The largest number of tokens that an SGLang server takes as a prompt. Raises ServerError."""
    try:
        return int(call(base_url, "/server_info")["max_req_input_len"]) - 1
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{base_url}/server_info without {error}", "SGLang 0.5.23") from None


def answer_logprobs(base_url: str, prompt_ids: list[int], answer_ids: list[int], cache: str) -> list[TokenLogprob]:
    """What the server says of each token of an answer, after all that is before it.

    cache: a name for cached prefixes. Those that requests with another name left on the server are not used: they may
    be of decoding, which is what is judged. Raises ServerError.
    """
    ids = [*prompt_ids, *answer_ids]
    request = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        # SGLang takes no prefix beyond this place from its cache, and returns a value for each token behind it.
        "logprob_start_len": len(prompt_ids) - 1,
        "top_logprobs_num": 1,
        "extra_key": cache,
    }
    try:
        meta = call(base_url, "/generate", request, PREFILL_S)["meta_info"]
        prefilled, values, best = (
            meta[name] for name in ("prompt_tokens", "input_token_logprobs", "input_top_logprobs")
        )
        # The first place is the prompt's last token, which has no value there.
        told = [(int(token), float(value)) for value, token, _ in values[1:]]
        largest = [(float(value), int(token)) for ((value, token, _),) in best[1:]]
    except (KeyError, TypeError, ValueError) as error:
        found = f"a reply of {base_url}/generate that cannot be read ({type(error).__name__}: {error})"
        raise ServerError(found, "a log-probability of each token", "use SGLang 0.5.23") from None
    # SGLang writes 0 for the last token of the vocabulary.
    same = len(told) == len(largest) == len(answer_ids) and all(
        token in (sent, 0) for (token, _), sent in zip(told, answer_ids, strict=True)
    )
    if prefilled != len(ids) or not same:
        raise ServerError(
            f"log-probabilities of {len(told)} tokens, after a prefill of {prefilled}, from {base_url}",
            f"those of the {len(answer_ids)} tokens that end a text of {len(ids)}",
            "use SGLang 0.5.23, without --allow-auto-truncate",
        )
    return [TokenLogprob(value, *at_best) for (_, value), at_best in zip(told, largest, strict=True)]
