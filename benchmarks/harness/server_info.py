"""SGLang's own routes (those that OpenAI lacks): what a server is, and the log-probabilities of its next token."""

from __future__ import annotations

from typing import Any

import httpx
from pydantic import ConfigDict

from benchmarks.harness.config import RunConfig
from benchmarks.harness.results import StrictModel
from sglang_auf.env import CLIENT_API_KEY, client_api_key
from sglang_auf.errors import ServerError
from sglang_auf.training.generation.client import is_local, tls

FLUSH_S = 10.0
CARD = "/v1/auf/card"
SAID_BY_CARD = ("tree", "tree_nodes", "draft_vocabulary", "weights")


class ServerFacts(StrictModel):
    """What a server runs. model: the name it is served as. drafter, algorithm, block_size: None for plain decoding.

    overlap: SGLang's overlap schedule. tree, tree_nodes, draft_vocabulary, weights: of the running drafter, as
    /v1/auf/card has them; swaps: of drafters, since the server's start. These six are None where nobody says it:
    SGLang's own server has no card, and earlier versions did not ask.
    """

    model_config = ConfigDict(frozen=True)

    target: str
    model: str
    drafter: str | None
    algorithm: str | None
    block_size: int | None
    device: str
    dtype: str
    sglang: str
    overlap: bool | None = None
    tree: bool | None = None
    tree_nodes: int | None = None
    draft_vocabulary: int | None = None
    weights: str | None = None
    swaps: int | None = None


def server_facts(base_url: str, model: str | None = None) -> ServerFacts:
    """Ask a server what it runs. model: the name that requests will carry; None: the first one the server lists."""
    info = call(base_url, "/server_info")
    try:
        speculating = info["speculative_algorithm"] is not None
        found = {
            "target": info["model_path"],
            "model": model or call(base_url, "/v1/models")["data"][0]["id"],
            "drafter": info["speculative_draft_model_path"] if speculating else None,
            "algorithm": info["speculative_algorithm"],
            "block_size": info["speculative_num_draft_tokens"] if speculating else None,
            "device": info["device"],
            "dtype": str(info["dtype"]),
            "sglang": info["version"],
            "overlap": not info["disable_overlap_schedule"],
        }
        if speculating and (card := drafter_card(base_url)) is not None:
            found |= {name: card.get(name) for name in SAID_BY_CARD}
            found |= {"drafter": card["swap"]["path"], "swaps": card["swap"]["generation"]}
        return ServerFacts(**found)
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{base_url}/server_info, /v1/models or {CARD} without {error}", "an SGLang server") from None


def drafter_card(base_url: str) -> dict[str, Any] | None:
    """What an AUF server says of its drafter; None where there is no such route, as on SGLang's own server.

    Raises ServerError where the request fails otherwise.
    """
    try:
        found: dict[str, Any] = call(base_url, CARD)
    except ServerError as error:
        if "status 404" in error.found:
            return None
        raise
    return found


def card_warnings(config: RunConfig) -> list[str]:
    """The ways in which a run differs from the drafter's training; [] where the server has no card of it."""
    card = drafter_card(config.base_url)
    if card is None:
        return []
    trained, longest = card["card"].get("thinking"), card["card"].get("max_length")
    found = [f"the server warns: {warning}" for warning in card["warnings"]]
    if trained is not None and config.thinking not in ("server", trained):
        found.append(f"the drafter was trained with thinking {trained}, and is asked with --thinking {config.thinking}")
    if longest is not None and config.max_tokens >= longest:
        found.append(f"answers of up to {config.max_tokens} tokens; the drafter was trained on up to {longest} in all")
    return found


def next_token_logprobs(base_url: str, input_ids: list[int], candidates: list[int]) -> tuple[dict[int, float], float]:
    """Log-probabilities of the token after input_ids, by one prefill: (candidate -> value, the largest of all tokens).

    The difference of two log-probabilities at one position is the difference of the two logits. Raises ServerError.
    """
    request = {
        "input_ids": input_ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "top_logprobs_num": 1,
        "token_ids_logprob": candidates,
    }
    meta = call(base_url, "/generate", request)["meta_info"]
    chosen = {int(token): float(value) for value, token, _ in meta["output_token_ids_logprobs"][0]}
    best = float(meta["output_top_logprobs"][0][0][0])
    if set(chosen) != set(candidates):
        raise ServerError(
            f"log-probabilities of tokens {sorted(chosen)}", f"those of {sorted(candidates)}", "use SGLang 0.5.23"
        )
    return chosen, best


def flush_cache(base_url: str) -> None:
    """Forget cached prefixes, so that earlier prompts are prefilled again. Raises ServerError unless it is idle."""
    url = f"{base_url}/flush_cache"
    try:
        response = _send("POST", url, params={"timeout": FLUSH_S}, timeout=2 * FLUSH_S)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(
            f"{type(error).__name__} from {url}: {error}", "an idle SGLang server", "send it no other requests"
        ) from None


def call(base_url: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 120.0) -> Any:
    """The JSON reply to a GET, or to a POST of `body`.

    timeout_s: how long the server may be silent. Raises ServerError when it is down or refuses.
    """
    url = base_url + path
    try:
        response = _send("GET" if body is None else "POST", url, json=body, timeout=timeout_s)
        response.raise_for_status()
        return response.json()
    except httpx.HTTPStatusError as error:
        found = f"status {error.response.status_code}: {error.response.text[:200]}"
        remedy = f"check the URL; an API key is read from {CLIENT_API_KEY}"
    except (httpx.HTTPError, ValueError) as error:
        found, remedy = f"{type(error).__name__}: {error}", "start the server (python -m server) or check the URL"
    raise ServerError(f"{found} from {url}", "an SGLang server that is up", remedy)


def _send(method: str, url: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {client_api_key()}"}
    return httpx.request(method, url, headers=headers, verify=tls(), trust_env=not is_local(url), **options)
