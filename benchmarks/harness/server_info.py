"""What a server is, and routes that OpenAI lacks: log-probabilities, an empty prefix cache.

Of SGLang's servers, and of vLLM's as its documentation (0.32) has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import snapshot_download
from pydantic import ConfigDict

from benchmarks.harness.config import RunConfig
from benchmarks.harness.results import StrictModel
from sglang_auf.env import CLIENT_API_KEY, client_api_key
from sglang_auf.errors import ServerError
from sglang_auf.files import CONFIG, HUB_ID
from sglang_auf.training.generation.client import is_local, tls

FLUSH_S = 10.0
CARD = "/v1/auf/card"
COUNTERS, DRAFTS = "vllm:generation_tokens", "vllm:spec_decode_num_drafts"
"""A counter in the /metrics of every vLLM server, and one of those that speculate. A router in front has neither."""
OTHER_SERVER = (
    "no SGLang server: what it runs, and on what, is not known, nor whether it decodes plainly. Tokens are those that "
    "its replies count (usage)"
)
VLLM_SERVER = "a server of vLLM: its drafter, device and dtype are not known. Tokens are those that its replies count"
SAID_BY_CARD = ("tree", "tree_nodes", "draft_vocabulary", "weights")


class ServerFacts(StrictModel):
    """What a server runs. model: the name it is served as. drafter, algorithm, block_size: None for plain decoding.

    revision: of the target, as it was asked for. overlap: SGLang's overlap schedule. tree, tree_nodes,
    draft_vocabulary, weights: of the running drafter, as /v1/auf/card has them; swaps: of drafters, since the server's
    start. These seven are None where nobody says it: SGLang's own server has no card, and earlier versions did not ask.

    sglang: its version; None for a server that is not SGLang. vllm: the version of one that is vLLM, of which target
    and algorithm ("speculative") are known; of any other server nothing is but `model`. What is None then is unknown.
    """

    model_config = ConfigDict(frozen=True)

    target: str | None
    model: str
    drafter: str | None
    algorithm: str | None
    block_size: int | None
    device: str | None
    dtype: str | None
    sglang: str | None
    vllm: str | None = None
    revision: str | None = None
    overlap: bool | None = None
    tree: bool | None = None
    tree_nodes: int | None = None
    draft_vocabulary: int | None = None
    weights: str | None = None
    swaps: int | None = None


def target_files(server: ServerFacts) -> Path | None:
    """The directory of the server's target, where this machine has one. Nothing is downloaded."""
    if server.target is None:
        return None
    directory = Path(server.target)
    if HUB_ID.fullmatch(server.target) and not directory.is_dir():
        try:
            directory = Path(snapshot_download(server.target, revision=server.revision, local_files_only=True))
        except (OSError, ValueError):  # what the hub's client raises where its cache has no such model
            return None
    return directory if (directory / CONFIG).is_file() else None


class NoRoute(ServerError):
    """A server that is up and has no such route, or shows it to nobody."""


class OtherServer(ServerError):
    """A server that is up and is not SGLang."""


def server_facts(base_url: str, model: str | None = None) -> ServerFacts:
    """Ask an SGLang server what it runs. model: the name that requests will carry; None: the first one it lists.

    Raises OtherServer for a server of another kind, and ServerError for one that is down or refuses.
    """
    try:
        info = call(base_url, "/server_info", hidden=True)
    except NoRoute as error:
        raise OtherServer(
            error.found, "an SGLang server", f"check the URL; an API key is read from {CLIENT_API_KEY}"
        ) from None
    if not isinstance(info, dict) or "speculative_algorithm" not in info:  # vLLM may have a route of this name, too
        raise OtherServer(f"{base_url}/server_info is not SGLang's", "an SGLang server", "check the URL")
    try:
        speculating = info["speculative_algorithm"] is not None
        found = {
            "target": info["model_path"],
            "revision": info["revision"],
            "model": model or first_model(base_url),
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
        raise ServerError(f"{base_url}/server_info or {CARD} without {error}", "SGLang 0.5.23") from None


def other_facts(base_url: str, model: str | None = None) -> ServerFacts:
    """What a server says of itself that is not SGLang. model: as for `server_facts`. Raises ServerError."""
    listed = _listed_models(base_url)
    facts: dict[str, Any] = dict.fromkeys(("target", "drafter", "algorithm", "block_size", "device", "dtype", "sglang"))
    card = next((card for card in listed if card["id"] == model), listed[0])
    if card.get("owned_by") == "vllm":
        facts |= _vllm_facts(base_url, card.get("root"))
    return ServerFacts(model=model or str(card["id"]), **facts)


def _vllm_facts(base_url: str, target: str | None) -> dict[str, Any]:
    """Of a server of vLLM; {} for one behind a router or a proxy that hides its routes. Raises ServerError."""
    try:
        version = call(base_url, "/version", hidden=True)
        counters = call(base_url, "/metrics", text=True, hidden=True)
    except NoRoute:
        return {}
    if "vllm:" not in counters:
        raise ServerError(
            f"no counter of vLLM in {base_url}/metrics",
            "vLLM's counters, which say whether it speculates",
            "start vLLM without --disable-log-stats",
        )
    if COUNTERS not in counters or not isinstance(version, dict):
        return {}
    algorithm = "speculative" if DRAFTS in counters else None
    return {"target": target, "vllm": str(version.get("version")), "algorithm": algorithm}


def asked_facts(config: RunConfig) -> ServerFacts:
    """What the server of a run says of itself; one that is neither SGLang nor vLLM is asked with config.plain only.

    Raises ServerError.
    """
    try:
        return server_facts(config.base_url, config.model)
    except OtherServer as error:
        found = error.found
    facts = other_facts(config.base_url, config.model)
    if facts.vllm is None and not config.plain:
        raise ServerError(
            found,
            "a server of SGLang or vLLM: tau needs its counts of verify steps",
            "check the URL (of vLLM itself, where /version and /metrics can be read), or add --plain to measure the "
            "speed of another server alone",
        )
    if facts.vllm is None and config.empty_cache:
        raise ServerError(
            f"--empty-cache, and {found}",
            "a server of SGLang or vLLM, whose prefix cache can be emptied",
            "leave --empty-cache out",
        )
    return facts


def run_warnings(config: RunConfig, server: ServerFacts, rendered: bool) -> list[str]:
    """What a reader of a run must know of its server. rendered: some prompts are put into a chat template."""
    if server.sglang is None:
        return [OTHER_SERVER if server.vllm is None else VLLM_SERVER]
    return [] if config.plain else card_warnings(config, rendered)


def wrong_server(config: RunConfig, server: ServerFacts, found: str) -> ServerError:
    """A server that decodes otherwise than config.plain says."""
    expected = "a server that decodes plainly, as --plain says"
    remedy = "leave --plain out, or start the baseline with python -m server --plain"
    if config.plain and server.sglang is None and server.vllm is None:
        remedy = "leave --plain out, and give the server's own URL, where /server_info or /metrics can be read"
    elif not config.plain and server.algorithm is not None and server.vllm is not None:
        expected = "a vLLM server that counts the verify steps of each request"
        remedy = "start it with --per-request-spec-decode-metrics summary"
    elif not config.plain:
        expected = "a speculating server: tau is a figure of speculative decoding"
        remedy = "start it with python -m server --profile NAME, or add --plain to record a baseline without tau"
    return ServerError(f"{found} at {config.base_url}", expected, remedy)


def first_model(base_url: str) -> str:
    """The first name that /v1/models lists. Raises ServerError."""
    return str(_listed_models(base_url)[0]["id"])


def _listed_models(base_url: str) -> list[dict[str, Any]]:
    """What /v1/models says of its models, of which there is one or more. Raises ServerError."""
    try:
        listed: list[dict[str, Any]] = call(base_url, "/v1/models")["data"]
        _ = [model["id"] for model in listed], listed[0]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{base_url}/v1/models without {error}", "an OpenAI-compatible server") from None
    return listed


def drafter_card(base_url: str) -> dict[str, Any] | None:
    """What an AUF server says of its drafter; None where there is no such route, as on SGLang's own server.

    Raises ServerError where the request fails otherwise.
    """
    try:
        found: dict[str, Any] = call(base_url, CARD)
    except NoRoute:
        return None
    return found


def card_warnings(config: RunConfig, rendered: bool) -> list[str]:
    """The ways in which a run differs from the drafter's training; [] where the server has no card of it.

    rendered: as for `run_warnings`.
    """
    card = drafter_card(config.base_url)
    if card is None:
        return []
    trained, longest = card["card"].get("thinking"), card["card"].get("max_length")
    found = [f"the server warns: {warning}" for warning in card["warnings"]]
    if rendered and trained is not None and config.thinking not in ("server", trained):
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


def flush_cache(base_url: str, vllm: bool = False) -> None:
    """Forget cached prefixes, so that earlier prompts are prefilled again. Raises ServerError unless it is idle."""
    url = f"{base_url}/reset_prefix_cache" if vllm else f"{base_url}/flush_cache"
    expected, remedy = "an idle SGLang server", "send it no other requests"
    if vllm:
        expected, remedy = "an idle vLLM server with that route", "start it with VLLM_SERVER_DEV_MODE=1"
    try:
        response = _send("POST", url, params={} if vllm else {"timeout": FLUSH_S}, timeout=2 * FLUSH_S)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(f"{type(error).__name__} from {url}: {error}", expected, remedy) from None
    if vllm and '"success":false' in response.text.replace(" ", ""):
        raise ServerError(f"{response.text} from {url}", "an idle vLLM server", "send it no other requests")


def call(
    base_url: str,
    path: str,
    body: dict[str, Any] | None = None,
    timeout_s: float = 120.0,
    *,
    text: bool = False,
    hidden: bool = False,
) -> Any:
    """The JSON reply to a GET, or to a POST of `body`. text: the reply is text.

    timeout_s: how long the server may be silent. Raises NoRoute for status 404, and ServerError when the server is down
    or refuses otherwise. hidden: a refusal, a redirect and a reply of another kind are NoRoute too: a proxy may answer.
    """
    url, kind = base_url + path, ServerError
    try:
        response = _send("GET" if body is None else "POST", url, json=body, timeout=timeout_s)
        response.raise_for_status()
        return response.text if text else response.json()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        found = f"status {status}: {error.response.text[:200]}"
        remedy = f"check the URL; an API key is read from {CLIENT_API_KEY}"
        if status == httpx.codes.NOT_FOUND or (hidden and status < httpx.codes.INTERNAL_SERVER_ERROR):
            kind = NoRoute
    except (httpx.HTTPError, ValueError) as error:
        found, remedy = f"{type(error).__name__}: {error}", "start the server (python -m server) or check the URL"
        if hidden and isinstance(error, ValueError):
            kind = NoRoute
    raise kind(f"{found} from {url}", "a server that is up", remedy)


def _send(method: str, url: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {client_api_key()}"}
    return httpx.request(method, url, headers=headers, verify=tls(), trust_env=not is_local(url), **options)
