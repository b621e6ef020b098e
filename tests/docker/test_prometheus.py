"""A real Prometheus, with the shipped configuration, on a live server: what it knows is what the server says."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import yaml

from benchmarks.harness.servers import free_port
from tests.docker.conftest import program
from tests.e2e.conftest import running
from tests.support.monitoring import PROMETHEUS, alert_queries, dashboard_queries, metric_names

pytestmark = pytest.mark.e2e
MODEL = "smollm2-135m"
WAIT_SECONDS = 120
EMPTY_HERE = {f"alpha_k / alpha_{k}" for k in range(8, 16)}
"""The drafter's block has 8 slots; the dashboard is drawn for up to 16."""


def get(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=30) as reply:
        return json.load(reply)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "Prometheus does not get there"
        time.sleep(0.5)


class Monitored:
    """A server and the Prometheus that scrapes it every second."""

    def __init__(self, server: str, prometheus: str) -> None:
        self.server = server
        self.prometheus = prometheus

    def series(self, expression: str) -> list[dict[str, Any]]:
        answer = get(f"{self.prometheus}/api/v1/query", query=expression)
        assert answer["status"] == "success"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        series = self.series(expression)
        return float(series[0]["value"][1]) if series else math.nan

    def chat(self, **more: Any) -> bytes:
        question = {"model": MODEL, "messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 24}
        request = urllib.request.Request(
            f"{self.server}/v1/chat/completions",
            json.dumps(question | more).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            if more.get("max_tokens", 0) > 1000:
                return bytes(reply.readline())  # and hang up
            return bytes(reply.read())

    def answer_some(self) -> None:
        """Get plain, sampled, streamed and one-token answers, leave one, and wait until all are scraped."""
        before = self.finished()
        self.chat()
        self.chat(temperature=0.8, seed=1)
        self.chat(stream=True)
        self.chat(max_tokens=1)
        with suppress(ConnectionError):
            self.chat(stream=True, max_tokens=1200, ignore_eos=True)
        until(lambda: self.finished() == before + 5)  # the server notices later that a client has left
        until(lambda: self.value("sum(sglang:num_running_reqs)") == 0 and not math.isnan(self.tau()))
        until(lambda: self.value("sum(auf_verify_steps_total)") == self.acceptance()["verify_steps"])

    def tau(self) -> float:
        return self.value("sum(auf_emitted_tokens_total) / sum(auf_verify_steps_total)")

    def finished(self) -> int:
        counted = self.acceptance()
        return int(counted["requests"] + counted["requests_without_verify"])

    def acceptance(self) -> dict[str, Any]:
        total: dict[str, Any] = get(f"{self.server}/v1/auf/acceptance")["total"]
        return total


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    prometheus = program("prometheus", "Debian package prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    recording = f"record.directory={directory / 'recording'}"
    with running(["server", "--profile", MODEL, "--set", recording], directory / "server.log") as (url, _):
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        (scrape,) = config["scrape_configs"]
        del scrape["dns_sd_configs"]
        scrape["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(PROMETHEUS / "alerts.yml", directory)
        address = f"127.0.0.1:{free_port()}"
        with (directory / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    prometheus,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            monitored = Monitored(url, f"http://{address}")
            until(lambda: ready(monitored.prometheus) and monitored.value("up") == 1)
            # Twice: a series that begins with the first request has a rate only from its second scrape on.
            monitored.answer_some()
            monitored.answer_some()
            time.sleep(3)
            yield monitored
        finally:
            process.kill()
            process.wait()


def ready(prometheus: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{prometheus}/-/ready") as reply:
        return bool(reply.status == 200)
    return False


def test_tau_in_prometheus_is_the_servers(monitored: Monitored) -> None:
    told = monitored.acceptance()
    assert told["requests"] >= 6
    assert monitored.tau() == pytest.approx(told["tau"], rel=1e-12)
    assert monitored.value("1 + sum(auf_accepted_tokens_total) / sum(auf_verify_steps_total)") == pytest.approx(
        told["tau_verify"], rel=1e-12
    )


def test_accepted_lengths_in_prometheus_are_the_servers(monitored: Monitored) -> None:
    series = monitored.series("auf_accepted_length_total")
    counts = {int(one["metric"]["accepted"]): int(one["value"][1]) for one in series}
    assert [counts[accepted] for accepted in sorted(counts)] == monitored.acceptance()["accepted_histogram"]


def test_what_is_read_at_a_scrape_is_what_the_routes_say(monitored: Monitored) -> None:
    kept = get(f"{monitored.server}/v1/auf/recording")["recording"]
    assert kept["recorded"] >= 1
    assert monitored.value("sum(auf_recorded_total)") == kept["recorded"]
    dropped = {one["metric"]["reason"]: int(one["value"][1]) for one in monitored.series("auf_record_dropped_total")}
    assert dropped == kept["dropped"]
    assert monitored.value("max(auf_recording_error)") == monitored.value("max(auf_silence_seconds)") == 0
    card = get(f"{monitored.server}/v1/auf/card")
    (drafter,) = monitored.series("auf_drafter_info")
    assert {"generation": "0", "weights": card["weights"], "model_name": MODEL}.items() <= drafter["metric"].items()


def test_the_dashboards_tau_and_alpha_are_those_of_its_window(monitored: Monitored) -> None:
    """All that happened lies in the last hour, and every counter began before it."""
    queries = {name: expression.replace("[1m]", "[1h]") for name, expression in dashboard_queries()}
    told = monitored.acceptance()
    assert monitored.value(queries["tau / tau"]) == pytest.approx(told["tau"], rel=0.02)
    for k, alpha in enumerate(told["alpha"][:2], start=1):
        assert monitored.value(queries[f"alpha_k / alpha_{k}"]) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize(("name", "expression"), dashboard_queries())
def test_a_dashboard_query_has_an_answer(monitored: Monitored, name: str, expression: str) -> None:
    assert bool(monitored.series(expression)) == (name not in EMPTY_HERE)


@pytest.mark.parametrize(("name", "expression"), dashboard_queries() + alert_queries())
def test_every_metric_of_a_query_exists(monitored: Monitored, name: str, expression: str) -> None:
    known = set(get(f"{monitored.prometheus}/api/v1/label/__name__/values")["data"])
    assert metric_names(expression)
    assert metric_names(expression) <= known


def test_the_models_that_the_dashboard_offers(monitored: Monitored) -> None:
    values = get(f"{monitored.prometheus}/api/v1/label/model_name/values", **{"match[]": "auf_requests_total"})
    assert values["data"] == [MODEL]


def test_no_alert_fires_on_a_healthy_server(monitored: Monitored) -> None:
    rules = get(f"{monitored.prometheus}/api/v1/rules")["data"]["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == {name: "ok" for name, _ in alert_queries()}
    assert not [rule["name"] for rule in rules if rule["state"] == "firing"]
