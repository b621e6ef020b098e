"""Running totals: the sums themselves, and that SGLang's server feeds them once per finished choice."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components import output_streamer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_auf.acceptance import Acceptance, macro_tau, total_acceptance
from sglang_auf.hooks import metrics
from sglang_auf.hooks.metrics import ACCEPTED_LENGTHS, COUNTERS, READ, AcceptanceTotals
from tests.support.toy_tokenizer import toy_tokenizer

BLOCK = 4
EMPTY = Acceptance()
requests = st.one_of(
    st.just(EMPTY),
    st.builds(
        Acceptance.of_request,
        st.lists(st.integers(0, 5), min_size=BLOCK, max_size=BLOCK).filter(any),
        st.integers(1, 100),
    ),
)


@given(st.lists(requests, max_size=12), st.integers(1, 6))
def test_totals_are_the_sum_and_the_window_the_sum_of_the_last(finished: list[Acceptance], size: int) -> None:
    totals = AcceptanceTotals(window=size)
    for acceptance in finished:
        totals.add(acceptance)
    snapshot = totals.snapshot()
    for name, counted in (("total", finished), ("window", finished[-size:])):
        figures = snapshot[name]
        expected = total_acceptance(counted).as_dict()
        assert {key: figures[key] for key in expected} == expected
        assert figures["tau_macro"] == pytest.approx(macro_tau(counted))
        assert figures["requests"] + figures["requests_without_verify"] == len(counted)
    assert snapshot["window"]["size"] == size


def test_nothing_finished_yet() -> None:
    snapshot = AcceptanceTotals().snapshot()
    assert (snapshot["total"]["tau"], snapshot["total"]["tau_macro"]) == (None, None)
    assert snapshot["window"]["requests"] == snapshot["window"]["requests_without_verify"] == 0


def test_threads_lose_no_request() -> None:
    totals = AcceptanceTotals()
    acceptance = Acceptance.of_request([1, 0, 2, 0], 8)

    def add_many() -> None:
        for _ in range(500):
            totals.add(acceptance)

    threads = [threading.Thread(target=add_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = totals.snapshot()
    assert (snapshot["total"]["requests"], snapshot["total"]["emitted"]) == (4000, 28000)
    assert snapshot["window"]["requests"] == 100


class Served:
    """The scripted server (see scripted_server.py for what a prompt means), and what its counts grew by."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=60)
        self.forget()

    def forget(self) -> None:
        self.totals, self.metrics = self.read_totals(), self.read_metrics()

    def read_totals(self) -> dict[str, Any]:
        figures: dict[str, Any] = self.client.get("/totals").raise_for_status().json()["total"]
        return figures

    def read_metrics(self) -> dict[tuple[str, str], float]:
        text = self.client.get("/metrics").raise_for_status().text
        return {
            (sample.name, sample.labels.get("accepted", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in COUNTERS and sample.labels["model_name"] == "scripted"
        }

    def grew(self) -> dict[str, Any]:
        """By how much the counts of /totals grew, those of /metrics having grown by the same."""
        names = {
            "auf_requests_total": "requests",
            "auf_requests_without_verify_total": "requests_without_verify",
            "auf_verify_steps_total": "verify_steps",
            "auf_emitted_tokens_total": "emitted",
            "auf_accepted_tokens_total": "accepted",
            "auf_proposed_tokens_total": "proposed",
        }
        totals, metrics = self.read_totals(), self.read_metrics()
        growth = {name: totals[name] - self.totals[name] for name in names.values()}
        histogram = self.totals["accepted_histogram"] or [0] * 8
        growth["accepted_histogram"] = [
            after - before for after, before in zip(totals["accepted_histogram"] or [0] * 8, histogram, strict=True)
        ]
        for metric, name in names.items():
            assert metrics[metric, ""] - self.metrics[metric, ""] == growth[name], metric
        for accepted, steps in enumerate(growth["accepted_histogram"]):
            key = (ACCEPTED_LENGTHS, str(accepted))
            assert metrics[key] - self.metrics[key] == steps, key
        self.forget()
        return growth

    def post(self, path: str, **body: Any) -> str:
        return self.client.post(path, json=body).raise_for_status().text


@pytest.fixture
def served(scripted_server: str) -> Iterator[Served]:
    served = Served(scripted_server)
    yield served
    served.client.post("/algorithm", params={"name": "AUF"}).raise_for_status()
    served.client.close()


ONE = {
    "requests": 1,
    "requests_without_verify": 0,
    "verify_steps": 3,
    "emitted": 11,
    "accepted": 10,
    "proposed": 21,
    "accepted_histogram": [1, 0, 0, 1, 0, 0, 0, 1],
}
SCRIPT = "3 0 7 cut 2"
NOTHING = {name: 0 for name in ONE} | {"accepted_histogram": [0] * 8}
MESSAGES = [{"role": "user", "content": SCRIPT}]


@pytest.mark.parametrize("stream", [True, False])
def test_every_route_counts_a_choice_once(served: Served, stream: bool) -> None:
    served.post("/generate", text=SCRIPT, stream=stream, sampling_params={"max_new_tokens": 100})
    assert served.grew() == ONE
    served.post("/v1/completions", model="scripted", prompt=SCRIPT, max_tokens=100, stream=stream)
    assert served.grew() == ONE
    served.post("/v1/chat/completions", model="scripted", messages=MESSAGES, stream=stream)
    assert served.grew() == ONE


@pytest.mark.parametrize("stream", [True, False])
def test_n_choices_count_n_times_and_the_prefill_before_them_does_not(served: Served, stream: bool) -> None:
    served.post("/v1/chat/completions", model="scripted", messages=MESSAGES, n=3, stream=stream)
    grew = served.grew()
    assert (grew["requests"], grew["verify_steps"], grew["requests_without_verify"]) == (3, 9, 0)


def test_a_request_that_hides_its_details_still_counts(served: Served) -> None:
    served.post("/v1/completions", model="scripted", prompt=SCRIPT, max_tokens=100, return_spec_tokens_details=False)
    assert served.grew() == ONE


def test_an_aborted_answer_counts_with_its_steps(served: Served) -> None:
    served.post("/v1/completions", model="scripted", prompt="5 6 abort", max_tokens=100)
    grew = served.grew()
    assert (grew["requests"], grew["verify_steps"], grew["accepted"]) == (1, 2, 11)


def test_one_token_is_a_request_without_verify(served: Served) -> None:
    served.post("/v1/completions", model="scripted", prompt="cut 0", max_tokens=1)
    assert served.grew() == NOTHING | {"requests_without_verify": 1}


def test_what_no_client_asked_for_does_not_count(served: Served) -> None:
    served.client.get("/health_generate").raise_for_status()
    served.post("/generate", text=SCRIPT, log_metrics=False, sampling_params={"max_new_tokens": 100})
    served.post("/v1/completions", model="scripted", prompt="3 queue", max_tokens=100)
    assert served.grew() == NOTHING


@pytest.mark.parametrize("algorithm", [None, "DFLASH"])
def test_a_server_without_auf_counts_nothing(served: Served, algorithm: str | None) -> None:
    served.client.post("/algorithm", params={"name": algorithm} if algorithm else {}).raise_for_status()
    served.post("/v1/completions", model="scripted", prompt=SCRIPT, max_tokens=100)
    assert served.grew() == NOTHING


@pytest.mark.parametrize("algorithm", ["AUF", "DFLASH", None])
def test_tokens_of_clients_are_counted_whatever_the_algorithm(served: Served, algorithm: str | None) -> None:
    def generated() -> int:
        return int(served.client.get("/totals").raise_for_status().json()["generated"])

    served.client.post("/algorithm", params={"name": algorithm} if algorithm else {}).raise_for_status()
    before = generated()
    for stream in (True, False):
        served.post("/v1/completions", model="scripted", prompt=SCRIPT, max_tokens=100, stream=stream)
    assert generated() - before == 2 * 12
    served.post("/generate", text=SCRIPT, log_metrics=False, sampling_params={"max_new_tokens": 100})
    assert generated() - before == 2 * 12


def read(served: Served) -> dict[tuple[str, str], float]:
    """What READERS add to /metrics, by name and reason."""
    text = served.client.get("/metrics").raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {"auf_requests_total", "sglang_http_responses_total"} <= {
        sample.name.replace(":", "_") for sample in samples
    }
    return {(one.name, one.labels.get("reason", "")): one.value for one in samples if one.name in READ}


def test_metrics_say_at_each_scrape_what_the_server_knows_then(served: Served) -> None:
    """One reader of this server always fails, and takes no other along."""
    before = read(served)
    assert {name for name, _ in before} == READ.keys() - {"auf_drafter_info"}, "it has no drafter"
    served.post("/v1/completions", model="scripted", prompt="3 0 5 6", max_tokens=100)
    served.post("/v1/completions", model="scripted", prompt="5 6 abort", max_tokens=100)
    until = time.monotonic() + 60
    while not (grew := {key: value - before[key] for key, value in read(served).items() if value != before[key]}) or (
        len(grew) < 2 and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert grew == {("auf_recorded_total", ""): 1, ("auf_record_dropped_total", "unfinished"): 1}


def test_a_server_that_gives_no_figures_keeps_sglangs_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    app = SimpleNamespace(routes=[route := SimpleNamespace(app="SGLang's")])
    monkeypatch.setattr(metrics, "READERS", [])
    metrics._answer_scrapes(None, app)
    assert route.app == "SGLang's"


def handed_over(
    monkeypatch: pytest.MonkeyPatch, step: list[int], stream: bool = False, **settings: Any
) -> list[list[int]]:
    """What an answer of 16 steps hands over, one every 0.3 seconds."""
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    accept = output_streamer._GenerationStreamAccumulator.accept
    request = Req(
        "r", "", array("q", [1]), SamplingParams(max_new_tokens=900, **settings), vocab_size=64, stream=stream
    )
    request.tokenizer = toy_tokenizer()
    request.sampling_params.normalize(request.tokenizer)
    handed: list[list[int]] = []
    for _ in range(16):
        now += 0.3
        request.output_ids.extend(step)
        reports = output_streamer._GenerationStreamAccumulator(**REPORTS)
        metrics._report_in_time(accept, reports, req=request)
        assert reports.default_force_stream_interval == 50
        handed += map(list, reports.output_ids)
    return handed


def test_an_answer_that_is_not_streamed_is_handed_over_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of three tokens pass by the multiples of 50 at which SGLang hands over; streams are as they were."""
    step = [5, 6, 7]
    assert handed_over(monkeypatch, step, stream=True) == [step] * 16
    assert handed_over(monkeypatch, step) == [step * 5, step * 4, step * 4]


@pytest.mark.parametrize("stops", [{"stop": "x"}, {"stop_regex": "x"}])
def test_of_an_answer_with_stops_nothing_is_handed_over_that_a_stop_may_cut_off(
    stops: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of five tokens end at 50, where SGLang hands over the beginning of a stop, too."""
    assert handed_over(monkeypatch, [5] * 5, **stops) == []


REPORTS: dict[str, Any] = {
    **dict.fromkeys(("return_logprob", "return_hidden_states", "return_routed_experts", "return_indexer_topk"), False),
    "spec_algorithm": SpeculativeAlgorithm.NONE,
    "disaggregation_mode": DisaggregationMode.NULL,
    "default_stream_interval": 1,
    "default_force_stream_interval": 50,
    "get_cached_tokens_details": lambda _: None,
    "is_request_level_customized_info_key": lambda _: False,
    "current_weight_version": None,
}


def test_listeners_are_told_of_counted_requests_and_when_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(metrics, "LISTENERS", [lambda acceptance, came: told.append((acceptance.emitted, came))])
    monkeypatch.setattr(metrics, "TOTALS", AcceptanceTotals())
    monkeypatch.setattr(metrics, "serves_auf", lambda: True)
    states = {
        rid: SimpleNamespace(
            obj=SimpleNamespace(log_metrics=counts, sampling_params={"custom_params": custom}),
            time_stats=SimpleNamespace(created_time=came),
        )
        for rid, counts, came, custom in (
            ("client's", True, 2.5, None),
            ("health check", False, 3.5, None),
            ("without drafts", True, 4.5, {"speculative": False}),
        )
    }
    meta_info = {"finish_reason": {"type": "stop"}, "completion_tokens": 5, "spec_verify_ct": 2}
    meta_info |= {"spec_correct_drafts_histogram": [1, 0, 1], "spec_num_proposed_drafts": 6}
    for rid in states:
        metrics._count_request(None, SimpleNamespace(rid_to_state=states), meta_info, SimpleNamespace(rids=[rid]), 0)
    assert told == [(4, 2.5), (0, 4.5)]
    total = metrics.TOTALS.snapshot()["total"]
    assert (total["requests"], total["requests_without_verify"], total["verify_steps"]) == (1, 1, 2)
