"""Replies of our routes. Their words are those of sglang_auf.acceptance and sglang_auf.checkpoints.card."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_auf.checkpoints.card import DrafterCard
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.recording.recorder import DROPPED


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figures(Reply):
    """Acceptance of many requests. null: no verify step yet."""

    tau: float | None = Field(description="emitted / verify_steps over all requests (micro mean)")
    tau_macro: float | None = Field(description="mean of the requests' own tau")
    tau_verify: float | None = Field(description="1 + accepted / verify_steps, before any stop cut tokens off")
    verify_steps: int
    accepted: int = Field(description="drafted tokens the target confirmed")
    proposed: int = Field(description="drafted tokens that were verified: B-1 per step of a chain, or a tree's nodes")
    nodes_per_step: float | None = Field(description="proposed / verify_steps")
    emitted: int = Field(description="tokens of answers that came from verify steps, not from a prefill")
    requests: int = Field(description="finished requests with at least one verify step")
    requests_without_verify: int
    accepted_histogram: list[int] = Field(description="[a]: verify steps that accepted exactly a drafted tokens")
    alpha: list[float | None] = Field(
        description="alpha_k = P(A >= k | A >= k-1), k = 1..B-1; null: no step accepted k-1"
    )


class WindowFigures(Figures):
    """The same over the last `size` finished requests."""

    size: int


class MeasuredReply(Reply):
    """Tau of finished requests."""

    tau: float
    error: float = Field(description="standard error of tau")
    requests: int
    longest: float = Field(description="seconds that the longest of them took, from its receipt to its end")


class SwapReply(Reply):
    """POST /v1/auf/drafter: how the running drafter came to run."""

    generation: int = Field(description="swaps of the drafter so far, those back included")
    path: str = Field(description="where the running drafter lies")
    state: Literal["started", "watching", "kept", "taken back"] = Field(
        description="watching: tau is compared with what it was before the swap; taken back: it had fallen"
    )
    other: str | None = Field(
        description="watching: what the server may go back to; taken back: what it had swapped in"
    )
    before: MeasuredReply | None = Field(description="before the last swap; null: too few requests, or no swap")
    after: MeasuredReply | None = Field(description="after that swap, once it is known whether tau fell")
    watched: int = Field(
        description="finished requests that count for this drafter, up to `watches`; after a swap none before "
        "`before.longest` seconds have passed, since the short ones end first"
    )
    watches: int = Field(description="requests after which the new drafter is kept")


class SwapRequest(BaseModel):
    """POST /v1/auf/drafter."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, max_length=4096, description="absolute, a directory on the server's machine")


class AcceptanceReply(Reply):
    """GET /v1/auf/acceptance. The window may reach back to a former drafter; `swap` says since when this one runs."""

    model: str
    block_size: int
    total: Figures
    window: WindowFigures
    swap: SwapReply


class CardReply(Reply):
    """GET /v1/auf/card. unknown: fields of the card that have no value."""

    model: str
    drafter: str
    block_size: int = Field(description="B as served; the card has the one it was trained with")
    tree: bool = Field(description="a step verifies a tree of drafts; false: a chain of the whole block")
    tree_nodes: int | None = Field(description="nodes of each request's tree; null: a chain, or the load decides")
    draft_vocabulary: int | None = Field(description="tokens that the drafter chooses among as served; null: all")
    weights: str | None = Field(
        description="SHA-256 of the weights that draft: of their file, or of the sorted digests of several; null: the "
        "files are gone, or were touched since they were loaded"
    )
    card: DrafterCard
    unknown: list[str]
    warnings: list[str]
    target: TargetFacts
    swap: SwapReply


class Recording(Reply):
    """What a server keeps of its answers. Counts are of answers, since the start; each choice of a request is one."""

    directory: str
    share: float = Field(description="of the answers that may be kept, drawn at random")
    opt_in: bool = Field(description="only answers to requests with the header X-SGLang-AUF-Record: on are kept")
    max_bytes: int
    max_age: float = Field(description="days after which a row is gone")
    rows: int = Field(description="answers on the disk, those of earlier starts included")
    bytes: int
    oldest: str | None = Field(description="when the oldest file was begun (ISO 8601); null: there is none")
    unread: int = Field(description="files that could not be read at the start: in `bytes`, not in `rows`")
    recorded: int
    waiting_tokens: int = Field(description="tokens that are not on the disk yet")
    dropped: dict[str, int] = Field(description="; ".join(f"{reason}: {why}" for reason, why in DROPPED.items()))
    error: str | None = Field(description="why nothing can be written right now; null: it can")


class RecordingReply(Reply):
    """GET /v1/auf/recording."""

    model: str
    recording: Recording | None = Field(description="null: this server keeps nothing of its answers")


class LoadReply(Reply):
    """GET /v1/auf/load."""

    model: str
    started: float = Field(description="when this server began, in seconds since 1970; counts begin there too")
    closed_because: str | None = Field(description="why requests for tokens get 503 right now; null: they do not")
    running: int = Field(description="requests being answered")
    queued: int = Field(description="requests that wait for room")
    silence: float = Field(
        description="seconds for which a request has waited and no step has ended; 0: no request waits"
    )
    generated_tokens: int = Field(
        description="tokens made since the start, those of running answers included; of an answer that is not "
        "streamed, up to a second late, and of one with stop strings or stop regexes when it has ended"
    )
