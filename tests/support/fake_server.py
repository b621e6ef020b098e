"""A server with SGLang's routes and no engine: its answers are a fixed function of the conversation.

Run as a program it takes the arguments of `python -m server`, or those of `python -m sglang.launch_server` for the
built-in DFLASH, for tests of what starts servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass
class FakeEngine:
    """speculative: replies carry speculation counts. forked: prompts whose answer this server changes at token 3.
    wobbling: prompts whose answer it changes there when they are asked again. cut: prompts whose whole answer ends by
    its length, with the same tokens.

    gap: how far below the best token /generate puts the first candidate, or a token of an answer that is not this
    server's own. most_input: max_req_input_len of /server_info. unsaid: tokens that /generate leaves out of an answer's
    log-probabilities. fields: "plugin" or "sglang" names of counts.
    card: what /v1/auf/card answers; None: there is no such route, as on SGLang's own server; "broken": status 500.
    sglang: False for another OpenAI-compatible server, which has none of SGLang's routes, and refuses its fields.
    vllm: that one is vLLM; "router": behind a router, which has a version and metrics of its own; "proxy": behind a
    proxy, which refuses these routes. spec_metrics: it was started with --per-request-spec-decode-metrics. log_stats:
    it was not started with --disable-log-stats. busy: its prefix cache cannot be emptied. extra_tokens: that steps
    without a draft, which it does not count, have added to each answer. thoughts: a parser takes all text out as such.
    own_info: what /server_info answers in place of SGLang's facts. counts: replies have a usage. target: the path of
    the model that it says it serves. cached: of the tokens of each prompt, those that it says its prefix cache
    had. unrecorded: for each request for a completion, what it said of being recorded.
    law: draws the answers of chats and tells their log-probabilities (known_law.py); None: one fixed answer a prompt.
    """

    speculative: bool = True
    algorithm: str = "AUF"
    block: int = 4
    delay_s: float = 0.0
    forked: str | None = None
    wobbling: str | None = None
    cut: str | None = None
    gap: float = 0.0
    most_input: int = 100_000
    unsaid: int = 0
    fields: str = "plugin"
    device: str = "cpu"
    answers_ids: bool = True
    card: dict[str, Any] | str | None = None
    sglang: bool = True
    vllm: bool | str = False
    spec_metrics: bool = True
    log_stats: bool = True
    busy: bool = False
    extra_tokens: int = 0
    thoughts: bool = False
    own_info: dict[str, Any] | None = None
    counts: bool = True
    target: str = "/models/toy"
    cached: int | None = None
    law: Any = None
    drawn_steps: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    unrecorded: list[str | None] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    continued: list[dict[str, Any]] = field(default_factory=list)
    generated: list[dict[str, Any]] = field(default_factory=list)
    flushed: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    def tokens(self, messages: list[dict[str, str]], limit: int) -> list[int]:
        seed = zlib.crc32(json.dumps(messages).encode())
        tokens = [(seed + 7 * i) % 1000 for i in range(min(limit, 8 + seed % 9))]
        forks = self.forked and self.forked in messages[-1]["content"]
        if self.wobbling and self.wobbling in messages[-1]["content"]:
            forks = sum(request["messages"] == messages for request in self.requests) > 1
        if forks:
            tokens[3] += 1000
        return tokens

    def answer(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a chat's answer."""
        if self.law is None:
            return self.tokens(body["messages"], body["max_tokens"])
        tokens, steps = self.law.answer(ids_of(body["messages"]), body.get("seed", 0), body["max_tokens"])
        self.drawn_steps[tuple(tokens)] = steps
        return tokens

    def teacher_forced(self, ids: list[int], start: int, top: int) -> dict[str, Any]:
        """meta_info of a prefill of prompt and answer, whose prompt ends at place `start`. top: only with a law."""
        prompt, emitted = ids[: start + 1], ids[start + 1 :]
        if self.law is not None:
            told = self.law.told(prompt, emitted, top)
            likeliest = [[[value, token, None] for value, token in of_place[1:]] for of_place in told]
            values = [[None, prompt[-1], None], *([*of_place[0], None] for of_place in told)]
            return {
                "prompt_tokens": len(ids),
                "input_token_logprobs": values,
                "input_top_logprobs": [None, *likeliest],
            }
        own = self.tokens(json.loads(bytes(prompt)), len(emitted))
        values = [[None, prompt[-1], None]]
        best: list[Any] = [None]
        for token, right in zip(emitted[self.unsaid :], own[self.unsaid :], strict=True):
            values.append([-0.5 - self.gap * (token != right), token, None])
            best.append([[-0.5, right, None]])
        return {"prompt_tokens": len(ids), "input_token_logprobs": values, "input_top_logprobs": best}

    def refused(self, body: dict[str, Any]) -> list[str]:
        """The fields of a request that only SGLang knows, where this is another server."""
        known = {"return_token_ids"} if self.vllm else set()
        return [] if self.sglang else [name for name in body if name.startswith("return_") and name not in known]

    def ending(self, asked: str) -> str:
        return "length" if self.cut and self.cut in asked else "tool_calls" if "CALL" in asked else "stop"

    def histogram(self, tokens: list[int]) -> list[int]:
        steps = self.steps(tokens)
        return [steps.count(accepted) for accepted in range(self.block)]

    def steps(self, tokens: list[int]) -> list[int]:
        """Accepted drafts of each verify step; of the last one, the end may be cut off."""
        if self.law is not None:
            return self.drawn_steps[tuple(tokens)]
        accepted: list[int] = []
        while 1 + sum(accepted) + len(accepted) < len(tokens):
            accepted.append((tokens[0] + len(accepted)) % self.block)
        return accepted

    def spans(self, tokens: list[int]) -> list[list[tuple[str, bool]]]:
        """The tokens of prefill and of each step, as the header x-auf-spans has an AUF server tell them."""
        parts, rest = [[(text_of(tokens[:1]), False)]], tokens[1:]
        for accepted in self.steps(tokens):
            of_step, rest = rest[: accepted + 1], rest[accepted + 1 :]
            parts.append([(text_of([token]), place < accepted) for place, token in enumerate(of_step)])
        return parts

    def sglext(self, body: dict[str, Any], tokens: list[int]) -> dict[str, Any] | None:
        extension: dict[str, Any] = {}
        if self.answers_ids and body.get("return_output_ids_in_sglext"):
            extension["output_ids"] = [tokens]
        if self.answers_ids and body.get("return_input_ids_in_sglext"):
            extension["input_ids"] = ids_of(body["messages"])
        counts = self.histogram(tokens)
        if self.speculative and body.get("return_spec_tokens_details") and sum(counts):
            extension["spec_tokens_details"] = self._details(counts)
        return extension or None

    def vllms(self, body: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
        """metrics of a reply of vLLM, whose histogram ends at its num_spec_tokens."""
        counts, drafts = self.histogram(tokens), self.block - 1
        if not (self.vllm and self.speculative and self.spec_metrics and sum(counts)):
            return {}
        return {
            "speculative_decoding": {
                "mean_acceptance_length": 9.0,  # not what is read
                "acceptance_histogram": counts,
                "num_spec_steps": sum(counts),
                "num_draft_tokens": sum(counts) * drafts,
                "num_spec_tokens": drafts,
            }
        }

    def _details(self, counts: list[int]) -> dict[str, Any]:
        steps = sum(counts)
        if self.fields == "plugin":
            return {"verify_steps": steps, "accepted_histogram": counts, "tau": 1.0, "alpha": [None] * (self.block - 1)}
        while counts[-1] == 0:
            counts.pop()
        return {
            "spec_verify_ct": steps,
            "spec_correct_drafts_histogram": counts,
            "spec_num_proposed_drafts": steps * (self.block - 1),
        }


def make_app(engine: FakeEngine) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def only_openais(request: Request, proceed: Any) -> Response:
        known = engine.sglang or request.url.path.startswith("/v1/")
        own = request.url.path in ("/version", "/metrics", "/reset_prefix_cache")
        if own and engine.vllm == "proxy":
            return JSONResponse({"detail": "Forbidden"}, status_code=403)
        known |= bool(engine.vllm) and own
        if not known and not (engine.own_info and request.url.path == "/server_info"):
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return await proceed(request)

    @app.get("/health_generate")
    def health() -> Response:
        return Response(status_code=200)

    @app.get("/server_info")
    def info() -> dict[str, Any]:
        return engine.own_info or {
            "model_path": engine.target,
            "speculative_algorithm": engine.algorithm if engine.speculative else None,
            "speculative_draft_model_path": "/drafters/toy" if engine.speculative else None,
            "speculative_num_draft_tokens": engine.block if engine.speculative else None,
            "device": engine.device,
            "dtype": "bfloat16",
            "disable_overlap_schedule": engine.device == "cpu",
            "max_req_input_len": engine.most_input,
            "revision": None,
            "version": "0.5.23",
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        of_vllm = {"owned_by": "vllm", "root": "/models/toy"} if engine.vllm else {}
        return {"object": "list", "data": [{"id": "toy", "object": "model", **of_vllm}]}

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": "0.32.0"}

    @app.get("/metrics")
    def metrics() -> Response:
        lines = ["python_info 1"] + ["vllm:num_requests_running 0"] * engine.log_stats
        if engine.vllm == "router":
            return Response("\n".join(lines), media_type="text/plain")
        lines += ["vllm:generation_tokens_total 0"] * engine.log_stats
        lines += ["vllm:spec_decode_num_drafts_total 0"] * (engine.log_stats and engine.speculative)
        return Response("\n".join(lines), media_type="text/plain")

    @app.post("/reset_prefix_cache")
    def reset() -> Response:
        engine.flushed += not engine.busy
        return JSONResponse({"success": not engine.busy})

    @app.get("/v1/auf/card")
    def card() -> Response:
        if engine.card == "broken":
            return Response(status_code=500)
        return Response(status_code=404) if engine.card is None else JSONResponse(engine.card)

    @app.post("/flush_cache")
    def flush() -> Response:
        engine.flushed += 1
        return Response(status_code=400 if engine.in_flight else 200)

    @app.post("/generate")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        engine.generated.append(body)
        if "logprob_start_len" in body:
            asked = (body[name] for name in ("input_ids", "logprob_start_len", "top_logprobs_num"))
            return {"meta_info": engine.teacher_forced(*asked)}
        first, second = body["token_ids_logprob"]
        chosen = [[-0.5 - engine.gap, first, None], [-0.5, second, None]]
        return {"meta_info": {"output_token_ids_logprobs": [chosen], "output_top_logprobs": [[[-0.5, second, None]]]}}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any], request: Request) -> Response:
        engine.requests.append(body)
        engine.unrecorded.append(request.headers.get("x-sglang-auf-record"))
        if refused := engine.refused(body):
            return JSONResponse({"message": f"extra fields not permitted: {refused}"}, status_code=400)
        engine.in_flight += 1
        engine.most_in_flight = max(engine.most_in_flight, engine.in_flight)
        try:
            await asyncio.sleep(engine.delay_s)
        finally:
            engine.in_flight -= 1
        if "FAIL" in body["messages"][-1]["content"]:
            return JSONResponse({"message": "the engine is on fire"}, status_code=500)
        if "PAGE" in body["messages"][-1]["content"]:
            return Response("<html>", media_type="text/html")
        if "BROKEN" in body["messages"][-1]["content"]:
            return Response("data: {\n\n" if body.get("stream") else "{", media_type="application/json")
        tokens = engine.answer(body)
        if body.get("stream"):
            spans = request.headers.get("x-auf-spans") == "1" and engine.speculative and engine.algorithm == "AUF"
            return StreamingResponse(_stream(engine, body, tokens, spans), media_type="text/event-stream")
        ending = engine.ending(body["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text_of(tokens)}, "finish_reason": ending}
        choice |= _vllms_ids(engine, body, tokens)
        return JSONResponse(_part(engine, body, tokens, "chat.completion", [choice], usage=True, sglext=True))

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any], request: Request) -> Response:
        engine.continued.append(body)
        engine.unrecorded.append(request.headers.get("x-sglang-auf-record"))
        if refused := engine.refused(body):
            return JSONResponse({"message": f"extra fields not permitted: {refused}"}, status_code=400)
        tokens = engine.tokens([{"role": "raw", "content": body["prompt"]}], body["max_tokens"])
        if body.get("stream"):
            return StreamingResponse(_stream_text(engine, body, tokens), media_type="text/event-stream")
        choice = _text_choice(body, tokens, "stop") | {"prompt_token_ids": ids_of(body["prompt"])}
        return JSONResponse(_part(engine, body, tokens, "text_completion", [choice], usage=True, sglext=True))

    return app


def ids_of(asked: object) -> list[int]:
    if isinstance(asked, list) and asked and isinstance(asked[0], int):
        return asked
    return list(json.dumps(asked).encode())


def _text_choice(body: dict[str, Any], tokens: list[int], ending: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": text_of(tokens), "finish_reason": ending, "logprobs": None}
    return choice | ({"token_ids": tokens} if body.get("return_token_ids") else {})


async def _stream_text(engine: FakeEngine, body: dict[str, Any], tokens: list[int]) -> AsyncIterator[str]:
    for place, token in enumerate(tokens):
        choice = _text_choice(body, [token], "stop" if place == len(tokens) - 1 else None)
        if place == 0 and body.get("return_token_ids"):
            choice["prompt_token_ids"] = ids_of(body["prompt"])
        yield f"data: {json.dumps(_part(engine, body, tokens, 'text_completion', [choice]))}\n\n"
    for with_ in ({"sglext": True}, {"usage": True}):
        yield f"data: {json.dumps(_part(engine, body, tokens, 'text_completion', [], **with_))}\n\n"
    yield "data: [DONE]\n\n"


def text_of(tokens: list[int]) -> str:
    return "".join(f"t{token} " for token in tokens)


async def _stream(
    engine: FakeEngine, body: dict[str, Any], tokens: list[int], spans: bool = False
) -> AsyncIterator[str]:
    def event(choices: list[Any], **with_: bool) -> str:
        return f"data: {json.dumps(_part(engine, body, tokens, 'chat.completion.chunk', choices, **with_))}\n\n"

    yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for token in tokens:
        name = "reasoning" if engine.thoughts else "content"
        choice = {"index": 0, "delta": {name: text_of([token])}, "finish_reason": None}
        yield event([choice | _vllms_ids(engine, body, [token])])
    for part in engine.spans(tokens) if spans else []:
        told = _part(engine, body, tokens, "chat.completion.chunk", []) | {"sglext": {"spans": {"tokens": part}}}
        yield f"data: {json.dumps(told)}\n\n"
    if "CUT" in body["messages"][-1]["content"]:
        return
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event([], sglext=True)
    yield event([], usage=True)
    yield "data: [DONE]\n\n"


def _vllms_ids(engine: FakeEngine, body: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    return {"token_ids": tokens} if engine.vllm and body.get("return_token_ids") else {}


def _part(
    engine: FakeEngine,
    body: dict[str, Any],
    tokens: list[int],
    kind: str,
    choices: list[Any],
    usage: bool = False,
    sglext: bool = False,
) -> dict[str, Any]:
    part: dict[str, Any] = {"id": "x", "object": kind, "created": 0, "model": "toy", "choices": choices}
    if engine.vllm and body.get("return_token_ids") and "messages" in body:
        part["prompt_token_ids"] = ids_of(body["messages"])
    if usage and engine.vllm:
        part["metrics"] = engine.vllms(body, tokens) or None
    if usage and engine.counts:
        count = len(tokens) + engine.extra_tokens
        given = len(ids_of(body.get("messages", body.get("prompt"))))
        part["usage"] = {"prompt_tokens": given, "completion_tokens": count, "total_tokens": given + count}
        if engine.cached is not None:
            part["usage"]["prompt_tokens_details"] = {"cached_tokens": engine.cached}
    if sglext and (extension := engine.sglext(body, tokens)):
        part["sglext"] = extension
    return part


def asked(engine: FakeEngine) -> Counter[str]:
    """Last user messages of all requests but the warm-up."""
    last = [request["messages"][-1]["content"] for request in engine.requests]
    return Counter(text for text in last if not text.startswith("Count upwards"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile")
    parser.add_argument("--speculative-algorithm", default="AUF")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--plain", action="store_true")
    options, flags = parser.parse_known_args()
    if options.profile == "broken":
        sys.exit("the drafter does not fit the target")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    told = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("TOLD_")]
    print(f"child {child.pid}", " ".join(options.set), " ".join(flags), " ".join(told), flush=True)
    settings = dict(setting.split("=", 1) for setting in options.set)
    invariant = os.environ.get("SGLANG_AUF_ROW_INVARIANT") != "0"
    engine = FakeEngine(
        speculative=not options.plain,
        algorithm=options.speculative_algorithm,
        block=int(settings.get("block_size", 4)),
        forked=None if options.plain else settings.get("fork"),
        wobbling=None if invariant else settings.get("wobble"),
        cut=None if options.plain else settings.get("cut"),
        gap=9.0,
        fields="plugin" if options.speculative_algorithm == "AUF" else "sglang",
    )
    uvicorn.run(make_app(engine), host=options.host, port=options.port, log_level="error", ws="none")


if __name__ == "__main__":
    main()
