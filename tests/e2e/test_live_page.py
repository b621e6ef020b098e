"""The live page in a real browser, over the shipped CPU profile. Needs playwright and a Chromium of the system."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sglang_auf.checkpoints.card import Adaptation
from tests.support.streams import events, said, truth

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

KEY = "a-key"
MODEL = "smollm2-135m"
SETTINGS = [f"--set=server_args.{setting}" for setting in ("max_total_tokens=4096", "context_length=2048")]
DRAFTING = [*SETTINGS, "--set=tree_nodes=7"]
"""Each step drafts, also on a busy machine."""
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 240_000
"""Timeout of what waits for a model, long enough for a busy machine."""

expect.set_options(timeout=PATIENCE_MS)


class Server:
    """A server that can be killed and started again on its port."""

    def __init__(self, start: Callable[..., Any], directory: Path, arguments: list[str]) -> None:
        self.start_server, self.directory, self.arguments = start, directory, arguments
        self.port: int | None = None
        self.start()

    def start(self) -> None:
        self.context = self.start_server(self.arguments, self.directory / "log", self.port)
        self.url, self.process = self.context.__enter__()
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        self.context.__exit__(None, None, None)

    def ask(self, stream: bool = False, **settings: Any) -> httpx.Response:
        body = {"model": MODEL, "max_tokens": 24, "temperature": 0, "stream": stream, **settings}
        body.setdefault("messages", [{"role": "user", "content": "Name three rivers."}])
        headers = {"Authorization": f"Bearer {KEY}", "x-auf-spans": "1"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Iterator[Server]:
    arguments = ["server", "--profile", MODEL, "--api-key", KEY, *DRAFTING]
    started = Server(start_server, tmp_path_factory.mktemp("live"), arguments)
    yield started
    started.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new tab. An error or a warning of the browser fails the test, unless a request was refused."""
    context = browser.new_context()
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    yield tab
    context.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def open_with_key(page: Page, server: Server, key: str = KEY) -> None:
    page.goto(f"{server.url}/auf")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()


def send(page: Page, tokens: int, prompt: str = "Name three rivers.") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_role("button", name="Send").click()


def test_it_asks_for_the_key_and_refuses_a_wrong_one(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/auf")
    expect(page.get_by_text("This server asks for its API key.")).to_be_visible()
    expect(page.locator("#dashboard")).to_be_hidden()
    for wrong in ("wrong", "schlüssel"):
        page.get_by_label("Key", exact=True).fill(wrong)
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_have_text("The key was refused.")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator("#model")).to_have_text(MODEL)
    expect(page.locator("#card-fields")).to_contain_text("7, 20, 28")
    expect(page.locator("#card-fields")).to_contain_text("8192 tokens")
    expect(page.locator("#warnings")).to_contain_text("1024 tokens")
    expect(page.locator("#unknown-fields")).to_contain_text("target revision")
    page.reload()
    expect(page.locator("#status")).to_have_text("Live")


def test_tinted_tokens_are_the_accepted_ones(server: Server, page: Page) -> None:
    open_with_key(page, server)
    with page.expect_response("**/v1/chat/completions") as asked:
        send(page, 48)
    expect(page.locator("#answer-status")).to_contain_text("tau")
    drafted, tokens, text = truth(events(asked.value.text()))
    assert drafted > 0
    assert page.locator("#answer .drafted").count() == drafted
    assert page.locator("#answer .own").count() == tokens - drafted
    assert page.locator("#answer > *").count() == tokens
    assert page.locator("#answer").text_content() == text
    expect(page.locator("#answer-status")).to_contain_text(f"{tokens} tokens, {drafted} of them drafted")
    tints = {
        kind: page.locator(f"#answer .{kind} > span").first.evaluate("e => getComputedStyle(e).backgroundColor")
        for kind in ("drafted", "own")
    }
    assert tints["own"] == "rgba(0, 0, 0, 0)"
    assert tints["drafted"] != tints["own"]


def test_spans_are_right_under_load_and_however_an_answer_ends(server: Server) -> None:
    """Long and short limits, ends of sequence, and text beyond ASCII; no span may be unknown without stop strings."""
    prompts = [
        "Say hi.",
        "Write the word water in Chinese, Greek and with emoji.",
        "What is 2+2?",
        "Name three rivers.",
    ]
    asked = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "temperature": temperature, "seed": 7}
        for prompt in prompts
        for limit, temperature in ((7, 0), (40, 0), (40, 1.2))
    ]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        options = {"stream_options": {"include_usage": True}}
        replies = list(pool.map(lambda settings: server.ask(stream=True, **settings, **options), asked))
    for reply in replies:
        chunks = events(reply.text)
        drafted, tokens, text = truth(chunks)
        flags = [flag for _, flag in said(chunks)]
        assert (flags.count(True), flags.count(False), len(flags)) == (drafted, tokens - drafted, tokens)
        assert "".join(piece for piece, _ in said(chunks)) == text


def test_tau_and_the_charts_follow_traffic_and_outlive_a_reload(server: Server, page: Page) -> None:
    open_with_key(page, server)
    expect(page.locator("#status")).to_have_text("Live")
    before = server_tau(server)
    for _ in range(2):
        assert server.ask().status_code == 200
    after = server_tau(server)
    assert before["requests"] + 2 == after["requests"]
    expect(page.locator("#tau-total")).to_have_text(f"{after['tau']:.2f}")
    expect(page.locator("#tau-window")).to_have_text(re.compile(r"^\d\.\d\d$"))
    steps = ", ".join(f"{accepted}: {count}" for accepted, count in enumerate(after["accepted_histogram"]))
    expect(page.locator("#accepted-chart svg")).to_have_attribute("aria-label", steps)
    expect(page.locator("#alpha-chart rect")).to_have_count(7)
    expect(page.locator("#tau-chart polyline").first).to_be_attached()
    expect(page.locator("#rate")).to_have_text(re.compile(r"^\d+\.\d$"))
    kept = "() => JSON.parse(sessionStorage.getItem('auf.samples')).map((sample) => sample.t)"
    seen = page.evaluate(kept)
    page.reload()
    expect(page.locator("#status")).to_have_text("Live")
    assert page.evaluate(kept)[: len(seen)] == seen


def server_tau(server: Server) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    reply: dict[str, Any] = httpx.get(f"{server.url}/v1/auf/acceptance", headers=headers, timeout=60).json()["total"]
    return reply


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(scheme: str, server: Server, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{server.url}/auf")
    expect(page.locator("#key-form")).to_be_visible()
    assert too_wide(page) == []
    open_with_key(page, server)
    expect(page.locator("#status")).to_have_text("Live")
    send(page, 12, "w" * 300)
    expect(page.locator("#answer-status")).to_contain_text("tau")
    assert too_wide(page) == []
    context.close()


def too_wide(page: Page) -> list[str]:
    """What reaches beyond the window's edges."""
    found: list[str] = page.evaluate("""() => [...document.querySelectorAll("body, body *")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth || e.scrollWidth > innerWidth)
        .map((e) => e.outerHTML.slice(0, 80))""")
    return found


def test_the_keyboard_is_enough(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/auf")
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Live")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt")).to_be_focused()
    outline = page.get_by_label("Prompt").evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("Say hi.")
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer-status")).to_contain_text("tokens/s")
    page.get_by_label("Tokens at most").fill("1500")
    page.get_by_label("Prompt").fill("Count from 1 to 1000, with commas.")
    for name in ("Tokens at most", "Temperature"):
        page.keyboard.press("Tab")
        expect(page.get_by_label(name)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(page.locator("#answer > *").nth(3)).to_be_attached()
    page.keyboard.press("Enter")
    expect(page.locator("#answer-status")).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    expect(page.locator("#running")).to_have_text("0")


def test_a_refused_request_says_why(server: Server, page: Page) -> None:
    open_with_key(page, server)
    send(page, 100_000)
    expect(page.locator("#answer-status")).to_contain_text("The server refused: ")
    expect(page.locator("#answer-status")).to_contain_text("100000")
    expect(page.locator("#answer-status")).to_have_attribute("data-state", "bad")
    send(page, 4)
    expect(page.locator("#answer-status")).to_contain_text("4 tokens")


def test_what_a_model_or_a_server_says_is_only_text(server: Server, page: Page) -> None:
    hostile = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    spans = {"choices": [], "sglext": {"spans": {"index": 0, "tokens": [[hostile, True], [hostile, None]]}}}
    stream = f"data: {json.dumps(spans)}\n\ndata: {json.dumps({'choices': [], 'error': {'message': hostile}})}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    page.route("**/v1/auf/load", lambda route: route.fulfill(json=route.fetch().json() | {"closed_because": hostile}))
    open_with_key(page, server)
    expect(page.locator("#status")).to_contain_text(hostile)
    send(page, 4)
    expect(page.locator("#answer")).to_have_text(hostile * 2)
    expect(page.locator("#answer-status")).to_contain_text(hostile)
    expect(page.get_by_text("not known", exact=True)).to_be_visible()
    assert page.locator("img, body script").count() == 0
    assert page.title() == "AUF live"


def test_a_swap_of_the_drafter_is_told_and_brings_its_card(server: Server, page: Page) -> None:
    swap: dict[str, Any] = {"generation": 0, "path": "/drafters/old", "state": "started", "other": None}
    swap |= {"before": None, "after": None, "watched": 0, "watches": 100}

    def with_swap(route: Any) -> None:
        reply = route.fetch().json() | {"swap": swap}
        if "card" in reply:
            reply |= {"drafter": swap["path"], "card": reply["card"] | {"adapted": adapted[swap["path"]]}}
        route.fulfill(json=reply)

    learnt = Adaptation(
        generation=3, parent="ab", recorded_rows=500, answers=64, old_tau=1.624, new_tau=1.75, low=0.05, high=0.2
    )
    adapted = {"/drafters/old": None, "/drafters/new": learnt.model_dump(mode="json")}
    for path in ("acceptance", "card"):
        page.route(f"**/v1/auf/{path}", with_swap)
    open_with_key(page, server)
    expect(page.locator("#card-fields")).to_contain_text("/drafters/old")
    expect(page.locator("#swap")).to_be_hidden()
    before, after = {"tau": 2.5, "error": 0.1, "requests": 100}, {"tau": 1.25, "error": 0.1, "requests": 25}
    swap |= {"generation": 1, "path": "/drafters/new", "state": "watching", "other": "/drafters/old", "watched": 7}
    swap["before"] = before
    expect(page.locator("#card-fields")).to_contain_text("/drafters/new")
    expect(page.locator("#card-fields")).to_contain_text("generation 3: tau 1.62 before, 1.75 after")
    expect(page.locator("#swap")).to_have_text(
        "Generation 1, /drafters/new: watched for 7 of 100 requests, in place of /drafters/old: "
        "tau 2.50 before, \N{EN DASH} after."
    )
    swap |= {"generation": 2, "path": "/drafters/old", "state": "taken back", "other": "/drafters/new", "after": after}
    expect(page.locator("#swap")).to_have_text(
        "Generation 2, /drafters/old: the server went back to it from /drafters/new: tau 2.50 before, 1.25 after."
    )
    expect(page.locator("#card-fields")).to_contain_text("/drafters/old")
    expect(page.locator("#card-fields")).not_to_contain_text("generation 3")


def test_an_engine_that_hangs_is_not_live(server: Server, page: Page) -> None:
    open_with_key(page, server)
    expect(page.locator("#status")).to_have_text("Live")
    engine = psutil.Process(server.process.pid).children(recursive=True)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for process in engine:
            process.suspend()
        try:
            asked = pool.submit(server.ask)
            expect(page.locator("#status")).to_contain_text("No step for over 20 s")
        finally:
            for process in engine:
                process.resume()
        assert asked.result().status_code == 200
    expect(page.locator("#status")).to_have_text("Live")


def test_it_outlives_a_restart_of_the_server(server: Server, page: Page) -> None:
    open_with_key(page, server)
    expect(page.locator("#status")).to_have_text("Live")
    page.evaluate("() => { document.body.dataset.same = 'yes'; }")
    send(page, 1500, "Count from 1 to 1000, with commas.")
    expect(page.locator("#answer > *").nth(3)).to_be_attached()
    server.kill()
    expect(page.locator("#status")).to_have_text(re.compile(r"^No answer since \d\d:\d\d:\d\d; retrying$"))
    expect(page.locator("#answer-status")).to_contain_text("The connection to the server broke")
    server.start()
    expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator("#tau-total")).to_have_text("\N{EN DASH}")
    send(page, 24)
    expect(page.locator("#answer-status")).to_contain_text("tau")
    assert page.locator("body").get_attribute("data-same") == "yes"


def test_a_draining_server_says_so(server: Server, page: Page) -> None:
    """Runs last, because it ends the module's server."""
    open_with_key(page, server)
    expect(page.locator("#status")).to_have_text("Live")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(server.ask, max_tokens=1500, ignore_eos=True)  # keeps the server draining while the page is checked
        expect(page.locator("#running")).to_have_text("1")
        os.kill(server.process.pid, signal.SIGTERM)
        expect(page.locator("#status")).to_contain_text("the server is stopping")
        send(page, 4)
        expect(page.locator("#answer-status")).to_contain_text("The server refused: the server is stopping")
        server.kill()
    expect(page.locator("#status")).to_contain_text("No answer since")


def test_a_plain_server_without_a_key(tmp_path: Path, start_server: Any, browser: Browser, page: Page) -> None:
    arguments = ["server", "--profile", MODEL, "--plain"]
    with start_server(arguments, tmp_path / "log") as (url, _):
        page.goto(f"{url}/auf")
        expect(page.get_by_text("This server decodes plainly")).to_be_visible()
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#tau-chart")).to_be_hidden()
        expect(page.locator("#card")).to_be_hidden()
        with page.expect_response("**/v1/chat/completions") as asked:
            send(page, 12)
        expect(page.locator("#answer-status")).to_contain_text("tokens/s")
        chunks = events(asked.value.text())
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert page.locator("#answer").text_content() == text != ""
        assert page.locator("#answer .drafted").count() == 0
        expect(page.locator("#rate")).to_have_text(re.compile(r"^\d+\.\d$"))
