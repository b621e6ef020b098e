"""Reports of runs asked of the fake server; the page itself is opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import read_records
from benchmarks.reports.report import alpha_over_tasks, load_runs, speedup_points
from tests.benchmarks.stats.test_intervals import record

Start = Callable[..., Any]


@pytest.fixture
def runs(fake: Start, data_dir: Path, tmp_path: Path) -> Path:
    """auf and plain, two concurrencies of each, as a sweep leaves them."""
    auf, plain = fake(), fake(speculative=False)
    arguments = ["sweep", "--base-url", auf.url, "--plain-url", plain.url, "--out", str(tmp_path / "sweep")]
    arguments += ["--tasks", "gsm8k,mt_bench", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    assert main([*arguments, "--concurrency", "1,2"]) == 0
    return tmp_path / "sweep"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    rows = [{"kind": "train", "step": 10, "loss": 2.0}, {"kind": "held_out", "step": 10, "tau": 1.5}]
    (folder / "run.json").write_text('{"steps": 10}')  # as a training run has it, too
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_report_has_every_section_and_needs_nothing_beside_it(runs: Path, training: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main(["report", str(runs), str(training), "--out", str(out), "--paper", "--title", "A <b> title"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt; title" in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Tau", "alpha_k", "Accepted lengths", "Tau by prompt length", "Tau by position in the answer",
        "Speed-up by concurrency", "Speed", "Training",
        "The paper&#39;s figures", "Where the figures come from",
    ]  # fmt: skip
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    text = (out / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == [
        "tau.png", "alpha.png", "accepted.png", "prompt-length.png", "speedup.png", "training.png"
    ]  # fmt: skip
    assert all((out / picture).is_file() for picture in pictures)


def test_a_report_shows_vllm_beside_its_own_plain_decoding(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    asked = ["--tasks", "gsm8k", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    servers = {"auf": fake(), "vllm": fake(sglang=False, vllm=True), "again": fake(sglang=False, vllm=True)}
    servers["more"] = fake(sglang=False, vllm=True, block=6)
    servers["plain"] = fake(sglang=False, vllm=True, speculative=False)
    for name, server in servers.items():
        more = ["--plain"] * (name == "plain")
        assert main(["run", "--base-url", server.url, "--out", str(tmp_path / name), *asked, *more]) == 0
    directories = [tmp_path / name for name in servers]
    assert main(["report", *map(str, directories), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "toy, vLLM 0.32.0, block 4" in text and "toy, vLLM 0.32.0, plain decoding" in text and "None" not in text
    measured, _ = load_runs(directories)
    points = speedup_points(measured)
    assert list(points) == [
        "vLLM 0.32.0, block 4 (T=0)",
        "vLLM 0.32.0, block 4 (T=0), again",
        "vLLM 0.32.0, block 6 (T=0)",
    ]
    assert all(len(line) == 1 for line in points.values()), "vLLM names no drafter: each run may have another"


def test_of_another_server_a_report_shows_speed_and_no_speed_up(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    asked = ["--tasks", "gsm8k", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    for name, server, more in (("auf", fake(), []), ("other", fake(sglang=False), ["--plain"])):
        assert main(["run", "--base-url", server.url, "--out", str(tmp_path / name), *asked, *more]) == 0
    out = tmp_path / "report"
    assert main(["report", str(tmp_path / "auf"), str(tmp_path / "other"), "--out", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "toy, a server that is not SGLang, decoding not known" in text
    assert "other: no SGLang server: what it runs" in text
    assert "None" not in text and "plain decoding" not in text.split("## Where the figures come from")[1]
    measured, _ = load_runs([tmp_path / "auf", tmp_path / "other"])
    assert not speedup_points(measured), "nobody knows whether it is the same target on the same device"


def test_a_report_shows_the_figures_of_the_runs_own_summary(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "auf-c1"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    (measured,), _ = load_runs([runs / "auf-c1"])
    summary = measured.summary
    interval = summary.macro.tau_interval
    assert interval is not None
    assert f"{summary.macro.tau:.2f} ({interval.low:.2f}..{interval.high:.2f})" in text
    assert f"| {summary.micro.tau:.2f} |" in text
    for value in alpha_over_tasks(measured.records):
        assert value is None or f" {value:.2f} |" in text


def test_what_the_prefix_cache_had_is_shown_beside_tau(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--tasks", "gsm8k", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    out, page, server = tmp_path / "sweep", tmp_path / "page", fake(cached=2)
    assert main(["run", "--base-url", server.url, "--out", str(tmp_path / "run"), *asked]) == 0
    tokens = [record.prompt_tokens for record in read_records(tmp_path / "run" / "records.jsonl")]
    share = f"{100 * 2 * len(tokens) / sum(tokens):.0f} %"
    assert f"s, {share} of the prompts' tokens from the prefix cache)" in capsys.readouterr().out
    assert main(["sweep", "--base-url", server.url, "--out", str(out), *asked, "--concurrency", "1"]) == 0
    heading, _, row = (out / "sweep.md").read_text().splitlines()[2:5]
    assert heading.endswith("| AUF cached |") and row.endswith(f"| {share} |")
    capsys.readouterr()
    assert main(["run", "--base-url", fake().url, "--out", str(tmp_path / "silent"), *asked]) == 0
    assert "the prefix cache" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "silent"), "--out", str(page)]) == 0
    heading, _, run, silent = (page / "report.md").read_text().split("## Tau\n")[1].splitlines()[3:7]
    assert heading.endswith("| micro | cached |") and run.endswith(f"| {share} |") and silent.endswith("| - |")


def test_tasks_weigh_equally_in_alpha() -> None:
    """Task a: 1 of 2 steps accepts. Task b, with three times the requests: all do."""
    records = [record("p", [1, 1], "a"), *(record(f"q{i}", [0, 3], "b") for i in range(3))]
    assert alpha_over_tasks(records) == (pytest.approx((0.5 + 1.0) / 2),)
    assert alpha_over_tasks([]) == ()


def test_speedups_compare_runs_of_the_same_questions_alone(runs: Path) -> None:
    measured, _ = load_runs([runs])
    points = speedup_points(measured)
    ((name, found),) = points.items()
    assert name == "drafters/toy (AUF, block 4, T=0)"
    assert sorted(at for at, _ in found) == [1, 2]
    speeds = {run.name: run.summary.throughput.tokens_per_s for run in measured}
    assert dict(found)[1] == pytest.approx(speeds["sweep/auf-c1"] / speeds["sweep/plain-c1"])  # type: ignore[operator]
    others = [run for run in measured if not (run.plain and run.manifest.config.concurrency == 1)]
    assert [at for at, _ in next(iter(speedup_points(others).values()))] == [2]
    for run in measured:
        if run.plain:
            run.manifest.sessions[0].machine["cpu"] = "another"
    assert speedup_points(measured) == {}


def test_servers_that_draft_otherwise_are_lines_of_their_own(runs: Path, tmp_path: Path) -> None:
    """Chain, tree, and another drafter at the same path; where no server says it, the runs' names tell them apart."""
    measured, _ = load_runs([runs])
    for run in measured:
        if run.plain:
            continue
        server = run.manifest.server.model_copy(update={"tree": run.manifest.config.concurrency == 1})
        run.manifest.server = server
    assert speedup_points(measured).keys() == {
        "drafters/toy (AUF, block 4, tree, T=0)", "drafters/toy (AUF, block 4, chain, T=0)"
    }  # fmt: skip
    for run in measured:
        if not run.plain:
            update = {"tree": None, "overlap": run.manifest.config.concurrency == 1}
            run.manifest.server = run.manifest.server.model_copy(update=update)
    assert speedup_points(measured).keys() == {
        "drafters/toy (AUF, block 4, T=0)", "drafters/toy (AUF, block 4, T=0), sweep/auf-c2"
    }  # fmt: skip
    for run in measured:
        if not run.plain:
            update = {"weights": f"{run.manifest.config.concurrency}" * 64, "draft_vocabulary": 9, "tree_nodes": 7}
            run.manifest.server = run.manifest.server.model_copy(update=update | {"tree": True})
    assert speedup_points(measured).keys() == {
        f"drafters/toy (AUF, block 4, tree of 7, 9 tokens drafted, weights {digit * 8}, T=0)" for digit in "12"
    }  # fmt: skip


def test_runs_of_earlier_versions_are_read(runs: Path, tmp_path: Path) -> None:
    for path in runs.glob("*/run.json"):
        content = json.loads(path.read_text())
        for name in ("overlap", "tree", "tree_nodes", "draft_vocabulary", "weights", "swaps"):
            del content["server"][name]
        path.write_text(json.dumps(content))
    assert main(["report", str(runs), "--out", str(tmp_path / "report")]) == 0


def test_every_session_of_a_run_says_where_it_was_made(runs: Path, tmp_path: Path) -> None:
    path = runs / "auf-c1" / "run.json"
    content = json.loads(path.read_text())
    (session,) = content["sessions"]
    content["sessions"] += [session | {"versions": {"sglang": "9.9", "commit": "abc+changes"}}, session]
    path.write_text(json.dumps(content))
    assert main(["report", str(runs / "auf-c1"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    now = ", ".join(f"{name} {version}" for name, version in session["versions"].items() if version)
    assert f"| {now}; sglang 9.9, commit abc+changes |" in text
    assert "3 sessions" in text


def test_steps_that_were_recorded_take_time_and_make_no_speed_up(runs: Path) -> None:
    measured, _ = load_runs([runs])
    for run in measured:
        if run.name == "sweep/auf-c1":
            run.manifest.config = run.manifest.config.model_copy(update={"record_steps": True})
    assert [at for at, _ in next(iter(speedup_points(measured).values()))] == [2]


def test_a_run_that_is_not_finished_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = runs / "auf-c1" / "records.jsonl"
    records.write_text("".join(line + "\n" for line in records.read_text().splitlines()[:4]))
    assert main(["report", str(runs / "auf-c1"), "--out", str(tmp_path / "report")]) == 2
    assert "4 of 18 requests" in capsys.readouterr().err


def test_a_directory_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_directory_that_is_not_there_is_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nope"), "--out", str(tmp_path / "report")]) == 2
    assert f"no directory {tmp_path / 'nope'}; expected" in capsys.readouterr().err


def test_the_runs_of_a_comparison_are_read_from_its_directory(runs: Path, tmp_path: Path) -> None:
    made = tmp_path / "compared"
    for level, name in (("auf-c1", "auf"), ("plain-c1", "plain"), ("auf-c2", "other")):
        shutil.copytree(runs / level, made / name)
    measured, _ = load_runs([made])
    assert [(run.name, run.plain) for run in measured] == [("compared/auf", False), ("compared/plain", True)]


def test_a_run_that_is_named_twice_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "auf-c1"), str(runs / "auf-c1"), "--out", str(tmp_path / "report")]) == 2
    assert "twice" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page(runs: Path, training: Path, tmp_path: Path) -> None:
    """Pictures are decoded and nothing is wider than the window, on a desktop and on a phone."""
    assert CHROMIUM is not None
    out = tmp_path / "report"
    assert main(["report", str(runs), str(training), "--out", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "pictures: [...document.images].map(i => i.naturalWidth),"
        "wide: document.documentElement.scrollWidth - innerWidth}) })</script>"
    )
    (out / "probe.html").write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    for size in ("1200,900", "500,800"):
        shown = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / size}", f"--window-size={size}", "--dump-dom",
                (out / "probe.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", shown)
        assert title is not None
        found = json.loads(title.group(1))
        assert len(found["pictures"]) == 6
        assert min(found["pictures"]) > 300
        assert found["wide"] <= 0
