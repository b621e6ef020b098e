"""Totals of acceptance in the server process, since its start and over the last requests.

A choice is counted once, when it finishes, where SGLang's tokenizer manager turns the scheduler's counts into
`meta_info`. /generate, chat, completions and aborted answers all pass there. Not counted are

- health checks (SGLang marks them `log_metrics=False`);
- the prefill that SGLang sends ahead of n > 1 to fill the prefix cache (`max_new_tokens=0`, no answer);
- the verify steps of a request that asked for none of the drafts (`custom_params.speculative` false);
- requests aborted while they wait for the scheduler, which SGLang finishes on another path without counts.

With `--enable-metrics` the same counts are Prometheus counters on SGLang's own /metrics, and what `python -m server`
knows besides (READ) is read when somebody asks for them.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_auf.acceptance import Acceptance, macro_tau, total_acceptance
from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import RECEIVE_BATCH, Hook, serves_auf
from sglang_auf.hooks.validation import speculates

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

WINDOW = 100
"""Finished requests in the recent window. A count instead of a time, so that an idle server keeps its last figures."""

PREFIX_PREFILL = {"type": "length", "length": 0}
"""The finish reason of a request with `max_new_tokens=0`."""

REPORT_SECONDS = 1.0
"""How long tokens of an answer that is not streamed may wait in the scheduler before they are counted."""

REPORTED = "auf_reported"
"""Attribute of SGLang's record of a request in the scheduler: when tokens of it were last handed over because of us."""

ACCEPTED_LENGTHS = "auf_accepted_length_total"
COUNTERS = {
    "auf_requests_total": "Finished requests with at least one verify step.",
    "auf_requests_without_verify_total": "Finished requests without a verify step (one token, or aborted before one), "
    "and those that asked for no drafts.",
    "auf_requests_without_drafts_total": "Finished requests that asked for no drafts.",
    "auf_verify_steps_total": "Verify steps of finished requests. tau = auf_emitted_tokens_total / this.",
    "auf_emitted_tokens_total": "Tokens of answers that came from verify steps, not from a prefill.",
    "auf_accepted_tokens_total": "Drafted tokens the target confirmed, before a stop cut any off.",
    "auf_proposed_tokens_total": "Drafted tokens that were verified: B-1 per step of a chain, or the nodes of a tree.",
    "auf_drafter_swaps_total": "Times that another drafter was put in the place of the running one.",
    "auf_drafter_taken_back_total": "Swaps after which the server went back to the drafter before, because tau fell.",
    ACCEPTED_LENGTHS: "Verify steps by drafted tokens accepted. alpha_k = steps with k or more / with k-1 or more.",
}
READ = {
    "auf_silence_seconds": "Seconds for which a request has waited and no step has ended. 0: no request waits.",
    "auf_drafter_info": "1 for the drafter that runs. generation: swaps so far. weights: their SHA-256.",
    "auf_recording_error": "1: answers cannot be recorded right now, GET /v1/auf/recording says why. 0: they can.",
    "auf_recorded_total": "Answers that were recorded.",
    "auf_record_dropped_total": "Answers that were not recorded, by reason.",
}
"""Read when Prometheus asks. Names that end in _total are counters, the others gauges."""


class AcceptanceTotals:
    """Sums over finished requests. Thread-safe, because the tokenizer manager adds while a route reads."""

    def __init__(self, window: int = WINDOW) -> None:
        self._lock = threading.Lock()
        self._total = Acceptance()
        self._tau_sum = 0.0
        self._without_verify = 0
        self._window: deque[Acceptance] = deque(maxlen=window)
        self.generated = 0
        """Tokens that the scheduler has sent so far, also of unfinished answers and with any algorithm."""

    def add(self, acceptance: Acceptance) -> None:
        """Count one finished request; the empty Acceptance is a request without a verify step."""
        with self._lock:
            self._window.append(acceptance)
            if acceptance.tau is None:
                self._without_verify += 1
            else:
                self._total += acceptance
                self._tau_sum += acceptance.tau

    def snapshot(self) -> dict[str, Any]:
        """{"total": figures, "window": figures of the last `size` requests}, ready for JSON.

        Figures are `Acceptance.as_dict()` (its `tau` is the micro mean) plus `tau_macro`, the mean of tau over
        requests, and `requests_without_verify`.
        """
        with self._lock:
            everything, tau_sum, without_verify = self._total, self._tau_sum, self._without_verify
            recent = list(self._window)
        tau_macro = tau_sum / everything.requests if everything.requests else None
        recent_sum = total_acceptance(recent)
        return {
            "total": _figures(everything, tau_macro, without_verify),
            "window": _figures(recent_sum, macro_tau(recent), len(recent) - recent_sum.requests)
            | {"size": self._window.maxlen},
        }


def _figures(acceptance: Acceptance, tau_macro: float | None, without_verify: int) -> dict[str, Any]:
    return acceptance.as_dict() | {"tau_macro": tau_macro, "requests_without_verify": without_verify}


class AcceptanceMetrics:
    """The Prometheus counters in COUNTERS, labelled with `model_name` as SGLang's are.

    There is no gauge of tau, which would keep its last value through an idle hour. Counters add up in Prometheus'
    multiprocess mode, which SGLang uses, and tau over any window is
    `rate(auf_emitted_tokens_total[5m]) / rate(auf_verify_steps_total[5m])`.
    """

    def __init__(self, model_name: str, block_size: int) -> None:
        # prometheus_client decides on its first import whether it writes to PROMETHEUS_MULTIPROC_DIR, which SGLang
        # sets when it launches; a plugin that imported it earlier would blank SGLang's own metrics.
        from prometheus_client import Counter

        self._counters = {
            name: Counter(name, text, ["model_name"]).labels(model_name)
            for name, text in COUNTERS.items()
            if name != ACCEPTED_LENGTHS
        }
        lengths = Counter(ACCEPTED_LENGTHS, COUNTERS[ACCEPTED_LENGTHS], ["model_name", "accepted"])
        self._lengths = [lengths.labels(model_name, str(accepted)) for accepted in range(block_size)]

    def add(self, acceptance: Acceptance, drafted: bool = True) -> None:
        """Count one finished request; the empty Acceptance is a request without a verify step, or without drafts."""
        increments = {
            "auf_requests_without_drafts_total": int(not drafted),
            "auf_requests_total": acceptance.requests,
            "auf_requests_without_verify_total": 1 - acceptance.requests,
            "auf_verify_steps_total": acceptance.verify_steps,
            "auf_emitted_tokens_total": acceptance.emitted,
            "auf_accepted_tokens_total": acceptance.accepted,
            "auf_proposed_tokens_total": acceptance.proposed,
        }
        for name, increment in increments.items():
            self._counters[name].inc(increment)
        for counter, steps in zip(self._lengths, acceptance.histogram, strict=False):
            counter.inc(steps)

    def add_swap(self, taken_back: bool) -> None:
        """Count a swap of the drafter, or that one was taken back."""
        self._counters["auf_drafter_taken_back_total" if taken_back else "auf_drafter_swaps_total"].inc()


TOTALS = AcceptanceTotals()
"""The totals of this process."""

_metrics: list[AcceptanceMetrics] = []
"""The counters of this process: none until SGLang starts its own, and none at all without --enable-metrics."""

LISTENERS: list[Callable[[Acceptance, float], None]] = []
"""Each is told of a request that is counted, and when the server received it (time.perf_counter)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A value at this moment. name: of READ."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


READERS: list[Callable[[], Awaitable[Iterable[Figure]]]] = []
"""Each is asked for figures when Prometheus asks, in the event loop of the process that answers."""


def count_swap(taken_back: bool) -> None:
    for counters in _metrics:
        counters.add_swap(taken_back)


def _start_metrics(_: None, manager: Any) -> None:
    """After `TokenizerManager.init_metric_collector_watchdog`."""
    if manager.enable_metrics and serves_auf():
        from sglang.srt.runtime_context import get_spec

        _metrics.append(AcceptanceMetrics(manager.served_model_name, get_spec().speculative_num_draft_tokens))


class Scrape:
    """ASGI app in the place of SGLang's /metrics: its series, and beside them what READERS say.

    SGLang collects the series of its processes from files, where a value stays until it is written again: a hung engine
    would seem to answer, and a drafter that was swapped out to run. What is known in the one process that answers is
    read there at each scrape, so that no file of a dead process counts either.
    """

    def __init__(self) -> None:
        self._broken: set[Any] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

        figures = [figure for reader in READERS for figure in await self._read(reader)]
        registry = CollectorRegistry()
        # All that SGLang's own app has (utils/common.py).
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(_Read(figures))
        await make_asgi_app(registry=registry)(scope, receive, send)

    async def _read(self, reader: Callable[[], Awaitable[Iterable[Figure]]]) -> list[Figure]:
        """[] of one that fails, so that the other series are there. The log says it once."""
        try:
            return list(await reader())
        except Exception:
            if reader not in self._broken:
                logger.exception("/metrics goes without %s", reader.__qualname__)
                self._broken.add(reader)
            return []


class _Read:
    """Figures as a collector of prometheus_client."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures = list(figures)

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, text in READ.items():
            if series := [figure for figure in self._figures if figure.name == name]:
                labels = list(series[0].labels)
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = kind(name, text, labels=labels)
                for figure in series:
                    family.add_metric([figure.labels[label] for label in labels], figure.value)
                yield family


def _answer_scrapes(_: None, app: Any) -> None:
    """After `add_prometheus_middleware`, which adds the route last."""
    if READERS:
        app.routes[-1].app = Scrape()


def _count_request(_: None, manager: Any, meta_info: dict[str, Any], recv_obj: Any, i: int) -> None:
    """After `_calculate_spec_decoding_metrics`, which SGLang calls once for each choice that finishes, before it
    forgets the request's state."""
    state = manager.rid_to_state[recv_obj.rids[i]]
    if not serves_auf() or not state.obj.log_metrics:
        return
    if meta_info["finish_reason"] == PREFIX_PREFILL:
        return
    # A request that asks for no drafts says nothing of the drafter.
    drafted = speculates(state.obj.sampling_params.get("custom_params"))
    acceptance = Acceptance.from_meta_info(meta_info) if drafted else Acceptance()
    TOTALS.add(acceptance)
    for counters in _metrics:
        counters.add(acceptance, drafted)
    for listener in LISTENERS:
        listener(acceptance, state.time_stats.created_time)


def _count_tokens(manager: Any, output: Any) -> None:
    """Before `TokenizerManager._handle_batch_output`."""
    for rid, tokens in zip(output.rids, getattr(output, "output_ids", ()), strict=False):  # embeddings have none
        state = manager.rid_to_state.get(rid)
        if state is not None and state.obj.log_metrics:
            TOTALS.generated += len(tokens)


def _report_in_time(accept: Callable[..., None], reports: Any, *, req: Any) -> None:
    """Around `_GenerationStreamAccumulator.accept`, in the scheduler.

    Of an answer that is not streamed it hands tokens over where their number is a multiple of an interval (50), which
    steps of several tokens pass by, so that a slow server seemed to stand still. What is handed over is not taken back
    where it turns out to be the beginning of a stop, so an answer with stops is handed over when it has ended.
    """
    if req.stream:
        accept(reports, req=req)
        return
    now, interval = time.monotonic(), reports.default_force_stream_interval
    if not hasattr(req, REPORTED):
        setattr(req, REPORTED, now)
    if req.sampling_params.stop_strs or req.sampling_params.stop_regex_strs:
        reports.default_force_stream_interval = sys.maxsize
    elif len(req.output_ids) > req.send_token_offset and now - getattr(req, REPORTED) >= REPORT_SECONDS:
        setattr(req, REPORTED, now)
        reports.default_force_stream_interval = 1
    accept(reports, req=req)
    reports.default_force_stream_interval = interval


_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_REPORTS = "sglang.srt.managers.scheduler_components.output_streamer:_GenerationStreamAccumulator"
SEAMS = (
    Seam("sglang.srt.managers.tokenizer_manager:ReqState.time_stats", "hooks.metrics"),
    Seam("sglang.srt.observability.req_time_stats:APIServerReqTimeStats.created_time", "hooks.metrics"),
    Seam(f"{_REPORTS}.default_force_stream_interval", "hooks.metrics"),
)
HOOKS = (
    Hook(f"{_REPORTS}.accept", "AROUND", _report_in_time, ("self", "req")).on_ours(),
    Hook(RECEIVE_BATCH, "BEFORE", _count_tokens, ("self", "recv_obj")),
    Hook(f"{_MANAGER}.init_metric_collector_watchdog", "AFTER", _start_metrics, ("self",)),
    Hook("sglang.srt.utils.common:add_prometheus_middleware", "AFTER", _answer_scrapes, ("app",)),
    Hook(
        f"{_MANAGER}._calculate_spec_decoding_metrics",
        "AFTER",
        _count_request,
        ("self", "meta_info", "recv_obj", "i"),
    ),
)
