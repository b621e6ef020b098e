"""Recordings and rows of token ids as prompts: what is sent, what is kept, and what is refused."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import Record, read_records
from benchmarks.harness.sources.files import select_from_files
from benchmarks.harness.sources.prompt import TokenIds
from benchmarks.harness.sources.recordings import ids_of
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import locked
from sglang_auf.recording.manifest import MANIFEST, Manifest
from sglang_auf.recording.ring import LOCK, Ring, encoded
from sglang_auf.training.text.rows import BadRow
from tests.benchmarks.conftest import write_rows
from tests.support.tiny_models import write_target
from tests.support.toy_tokenizer import toy_tokenizer

Start = Callable[..., Any]

ROWS = [([5, 6, 7], [8, 9]), ([5, 6, 7, 1], [2, 3, 4]), ([11], [12, 13])]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_target(tmp_path_factory.mktemp("models") / "target", vocabulary=264)
    toy_tokenizer().save_pretrained(made)
    return made


def record(directory: Path, target: Path, rows: list[tuple[list[int], list[int]]] = ROWS) -> Path:
    """As a server writes it."""
    ring = Ring(directory, 2**20, 30.0)
    ring.open(Manifest.of(target))
    ring.load()
    for number, (prompt, response) in enumerate(rows):
        ring.append(number, encoded(number, array("i", prompt), array("i", response)))
    ring.close()
    return directory


def run(url: str, prompts: Path, out: Path, *more: str) -> int:
    return main(["run", "--base-url", url, "--prompts", str(prompts), "--out", str(out), "--max-tokens", "32", *more])


def records_of(out: Path) -> dict[str, Record]:
    return {record.prompt_id: record for record in read_records(out / "records.jsonl")}


def test_ids_are_those_of_rows_without_a_conversation() -> None:
    assert ids_of({"prompt_ids": [1, 2], "response_ids": [3], "id": "a"}) == TokenIds([1, 2])
    assert ids_of({"prompt_ids": [1, 2], "messages": [{"role": "user", "content": "x"}]}) is None
    assert ids_of({"prompt_ids": [1, 2], "prompt": "x"}) is None
    assert ids_of({"prompt": "x", "prompt_ids": None}) is None


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt_ids": ["a"]}, "no list of token ids"),
        ({"prompt_ids": [1, -2]}, "no list of token ids"),
        ({"prompt_ids": [True]}, "no list of token ids"),
        ({"prompt_ids": "1 2"}, "no list of token ids"),
        ({"prompt_ids": [1], "system": "Be brief."}, "'system' beside prompt_ids"),
        ({"prompt_ids": [1], "tools": [{"type": "function"}]}, "'tools' beside prompt_ids"),
        ({"prompt_ids": [1], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' beside prompt_ids"),
    ],
)
def test_ids_that_cannot_be_sent_as_they_are_make_a_broken_row(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadRow, match=fault):
        ids_of(row)


def test_ids_and_the_same_words_are_other_questions(tmp_path: Path) -> None:
    write_rows(tmp_path / "ids.jsonl", [{"id": "a", "prompt_ids": [1]}])
    write_rows(tmp_path / "text.jsonl", [{"id": "a", "prompt": "[1]"}])
    digests = {select_from_files([tmp_path / name])[0].sha256 for name in ("ids.jsonl", "text.jsonl")}
    digests.add(select_from_files([tmp_path / "text.jsonl"], raw=True)[0].sha256)
    assert len(digests) == 3


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_recording_is_sent_as_token_ids_and_recorded_nowhere_as_text(
    fake: Start, target: Path, tmp_path: Path, stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(target=str(target)), tmp_path / "run"
    rows = record(tmp_path / "rows", target)
    assert run(server.url, rows, out, stream) == 0
    warm_up, *asked = server.engine.continued
    assert isinstance(warm_up["prompt"], str), "a base model needs no chat template"
    assert sorted(body["prompt"] for body in asked) == sorted(prompt for prompt, _ in ROWS)
    assert server.engine.unrecorded == ["off"] * 4
    assert not server.engine.requests
    kept = records_of(out)
    assert {id: record.prompt_ids for id, record in kept.items()} == {
        f"{number:032x}": prompt for number, (prompt, _) in enumerate(ROWS)
    }
    for one in kept.values():
        assert one.output_ids is not None and one.completion_tokens == len(one.output_ids)
        assert (one.output_text, one.error) == ("", None)
    assert "t" + str(one.output_ids[0]) not in (out / "records.jsonl").read_text()
    assert (out / "records.jsonl").stat().st_mode & 0o077 == 0
    origin = json.loads((out / "run.json").read_text())["tasks"]["rows"]
    assert (origin["prompts"], origin["token_ids"], origin["file"]["rows"]) == (3, 3, 3)
    assert "warning" not in capsys.readouterr().out
    assert run(server.url, rows, out, stream, "--resume") == 0
    assert len(server.engine.continued) == 4


def test_rows_of_ids_and_conversations_may_stand_in_one_file(fake: Start, tmp_path: Path) -> None:
    server, out, path = fake(), tmp_path / "run", tmp_path / "mine.jsonl"
    write_rows(path, [{"id": "i", "prompt_ids": [1, 2]}, {"id": "c", "turns": ["How?"], "prompt_ids": [3]}])
    assert run(server.url, path, out) == 0
    assert [body["prompt"] for body in server.engine.continued] == [[1, 2]]
    assert server.asked() == {"How?": 1}
    assert {id: bool(record.output_text) for id, record in records_of(out).items()} == {"i": False, "c": True}


def test_a_file_of_a_recording_is_of_its_target(fake: Start, target: Path, tmp_path: Path) -> None:
    rows = record(tmp_path / "rows", target)
    (file,) = rows.glob("*.jsonl")
    assert run(fake(target=str(target)).url, file, tmp_path / "run") == 0
    other = write_target(tmp_path / "other", head_dim=32, vocabulary=264)
    assert run(fake(target=str(other)).url, file, tmp_path / "again") == 2


def test_a_recording_of_another_target_is_refused(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_target(tmp_path / "other", head_dim=32, vocabulary=264)
    server = fake(target=str(target))
    assert run(server.url, record(tmp_path / "rows", other), tmp_path / "run") == 2
    assert "rows is a recording of other" in capsys.readouterr().err
    assert not server.engine.continued
    assert not (tmp_path / "run").exists()


def test_of_a_target_that_is_elsewhere_names_are_compared_and_the_rest_is_said(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = record(tmp_path / "rows", target)
    assert run(fake().url, rows, tmp_path / "run") == 0
    assert "warning: the files of /models/toy are not on this machine" in capsys.readouterr().out
    manifest = json.loads((rows / MANIFEST).read_text())
    (rows / MANIFEST).write_text(json.dumps(manifest | {"target_hub_id": "owner/one"}))
    assert run(fake(target="owner/no-such-model").url, rows, tmp_path / "again") == 2
    assert "rows is a recording of owner/one" in capsys.readouterr().err


def test_a_row_with_an_id_outside_the_vocabulary_is_broken_and_the_others_are_asked(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out, path = fake(target=str(target)), tmp_path / "run", tmp_path / "mine.jsonl"
    write_rows(path, [{"id": "a", "prompt_ids": [263]}, {"id": "b", "prompt_ids": [1, 264]}])
    assert run(server.url, path, out) == 1
    assert [body["prompt"] for body in server.engine.continued[1:]] == [[263]]
    broken = "mine.jsonl:2: token id 264, outside the vocabulary of 264"
    assert f"- {broken}" in capsys.readouterr().out
    origin = json.loads((out / "run.json").read_text())["tasks"]["mine.jsonl"]
    assert (origin["prompts"], origin["file"]["rows"], origin["file"]["broken"]) == (1, 2, [broken])
    assert run(server.url, path, out, "--resume") == 1
    flags = ["--concurrency", "1", "--max-tokens", "32", "--out", str(tmp_path / "sweep")]
    assert main(["sweep", "--base-url", server.url, "--prompts", str(path), *flags]) == 1
    assert broken in (tmp_path / "sweep" / "sweep.json").read_text()


def test_a_file_with_ids_outside_the_vocabulary_alone_is_refused(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"prompt_ids": [264]}, {"prompt_ids": [1, 999]}])
    assert run(fake(target=str(target)).url, tmp_path / "mine.jsonl", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "such ids in all that is asked of mine.jsonl; expected: ids below 264" in said
    assert "mine.jsonl:" in said and "ask a server of the target that the ids are of" in said


@pytest.mark.usefixtures("fake_server_program")
@pytest.mark.parametrize("command", ["compare", "speed"])
def test_commands_that_start_servers_name_rows_with_ids_outside_the_vocabulary(
    command: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.sources.recordings.target_files", lambda server: target)
    write_rows(tmp_path / "mine.jsonl", [{"prompt_ids": [5]}, {"prompt_ids": [1, 264]}])
    flags = ["--prompts", str(tmp_path / "mine.jsonl"), "--max-tokens", "32", "--rounds", "1", "--concurrency", "1"]
    assert main([command, "--profile", "toy", *flags, "--out", str(tmp_path / "out")]) == 1
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert "mine.jsonl:2: token id 264, outside the vocabulary of 264" in written


def test_an_empty_recording_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(DataError, match=r"no prompt in .*rows \(no rows\)"):
        select_from_files([record(tmp_path / "rows", target, [])])


def test_a_directory_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="or the directory of a recording"):
        select_from_files([tmp_path])


def test_options_that_need_text_or_chats_are_refused(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = record(tmp_path / "rows", target)
    for how in ({"raw": True}, {"thinking": "on"}):
        with pytest.raises(ConfigError, match="and token ids in"):
            select_from_files([rows], **how)  # type: ignore[arg-type]
    assert run(fake(target=str(target)).url, rows, tmp_path / "run", "--record-steps") == 2
    assert "--record-steps, and --prompts of token ids" in capsys.readouterr().err


def test_a_recording_that_grows_meanwhile_is_asked_with_a_warning(
    target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = record(tmp_path / "rows", target)
    with locked(rows / LOCK):
        assert len(select_from_files([rows])[0].prompts) == 3
    assert "a server records into it now" in caplog.text


def test_nothing_is_said_of_thinking_where_nothing_is_rendered(
    fake: Start, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = {"card": {"thinking": "on", "max_length": 4096}, "warnings": [], "swap": {"path": "/d", "generation": 0}}
    assert run(fake(target=str(target), card=card).url, record(tmp_path / "rows", target), tmp_path / "run") == 0
    assert "thinking" not in capsys.readouterr().out


def test_replayed_answers_are_checked_for_losslessness(fake: Start, target: Path, tmp_path: Path) -> None:
    rows = record(tmp_path / "rows", target)
    servers = {"auf": fake(target=str(target)), "plain": fake(target=str(target), speculative=False)}
    for name, server in servers.items():
        assert run(server.url, rows, tmp_path / name, *["--plain"] * (name == "plain")) == 0
    assert main(["lossless", str(tmp_path / "auf"), str(tmp_path / "plain")]) == 0
    result = json.loads((tmp_path / "auf" / "lossless.json").read_text())
    assert (result["identical"], result["missing"]) == (3, 0)
    forked = servers["auf"].engine
    tokens = type(forked).tokens
    forked.tokens = lambda messages, limit: [1, *tokens(forked, messages, limit)[1:]]
    assert run(servers["auf"].url, rows, tmp_path / "other") == 0
    flags = [str(tmp_path / "other"), str(tmp_path / "plain"), "--base-url", servers["plain"].url]
    assert main(["lossless", *flags]) in (0, 1)
    judged = [body["input_ids"] for body in servers["plain"].engine.generated]
    assert sorted(judged) == sorted(prompt for prompt, _ in ROWS), "the ids of the recording, at the first token"


def test_a_sweep_replays(fake: Start, target: Path, tmp_path: Path) -> None:
    server, out = fake(target=str(target)), tmp_path / "sweep"
    flags = ["--prompts", str(record(tmp_path / "rows", target)), "--concurrency", "1,3", "--max-tokens", "32"]
    assert main(["sweep", "--base-url", server.url, "--out", str(out), *flags]) == 0
    assert "| 3 | 3 |" in (out / "sweep.md").read_text()
    assert server.engine.unrecorded == ["off"] * (6 + 4), "warm-up too"


@pytest.mark.usefixtures("fake_server_program")
@pytest.mark.parametrize("command", ["compare", "speed"])
def test_commands_that_start_servers_replay(command: str, target: Path, tmp_path: Path) -> None:
    flags = ["--prompts", str(record(tmp_path / "rows", target)), "--max-tokens", "32", "--rounds", "1"]
    flags += ["--concurrency", "1"]
    assert main([command, "--profile", "toy", *flags, "--out", str(tmp_path / "out")]) == 0
    if command == "compare":
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["lossless"]["identical"] == summary["tasks"]["rows"]["requests"] == 3
