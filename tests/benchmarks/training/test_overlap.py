"""Training prompts that repeat benchmark prompts are found, and only those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import SAMPLE_FILE
from benchmarks.training.overlap import OverlapConfig, holders_of_runs, task_overlap, training_prompts
from tests.support.tiny_models import write_target
from tests.support.toy_tokenizer import toy_tokenizer

ASKED = "How many clips did Natalia sell altogether in April and May of that year"  # 14 words, 11 runs of four


def found(training: str, *prompts: str, **settings: Any) -> Any:
    config = OverlapConfig.model_validate({"training": ["unused"], "words": 4, **settings})
    asked = [Prompt("toy", f"toy/{number}", (text,)) for number, text in enumerate(prompts)]
    known = {tuple(training.lower().split()): "row/1"}
    return task_overlap("toy", asked, known, holders_of_runs(known, 4), config)


def test_the_same_words_are_identical_whatever_their_case_and_punctuation() -> None:
    result = found(ASKED, ASKED.upper().replace(" IN", ", in") + "?", "Something else that has no word of it")
    assert (result.prompts, result.identical, len(result.near)) == (2, 1, 1)
    assert (result.nearest.prompt, result.nearest.training_row, result.nearest.overlap) == ("toy/0", "row/1", 1.0)


def test_the_overlap_is_the_share_of_runs() -> None:
    """The first eight of the prompt's 14 words are kept: 5 of its 11 runs."""
    training = " ".join(ASKED.split()[:8]) + " for every friend she has"
    result = found(training, ASKED, share=0.4)
    assert result.identical == 0
    assert [near.overlap for near in result.near] == [pytest.approx(5 / 11)]
    assert found(training, ASKED, share=0.5).near == []
    assert found("Nothing of what was asked is in here at all", ASKED).nearest is None


def test_what_all_prompts_of_a_task_say_is_not_theirs() -> None:
    order = "please reason step by step and put the answer within boxed"
    prompts = [f"{word} is a number of its own {order}" for word in ("seven", "eight", "nine", "ten")]
    assert found(f"another question {order}", *prompts).nearest is None


def test_two_training_prompts_do_not_add_up() -> None:
    words = ASKED.lower().split()
    training = {tuple(words[:7]): "row/1", tuple(words[7:]): "row/2"}
    config = OverlapConfig.model_validate({"training": ["unused"], "words": 4})
    result = task_overlap("toy", [Prompt("toy", "toy/0", (ASKED,))], training, holders_of_runs(training, 4), config)
    assert result.nearest.overlap == pytest.approx(4 / 11)  # type: ignore[union-attr]


def test_a_short_prompt_that_is_one_turn_of_a_conversation_is_found(tmp_path: Path) -> None:
    said = ["Hello there!", "Name a prime number.", ASKED]
    messages = [
        each for text in said for each in ({"role": "user", "content": text}, {"role": "assistant", "content": "Yes."})
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"id": "chat", "messages": messages}) + "\n")
    known = training_prompts([str(path)])
    config = OverlapConfig.model_validate({"training": ["unused"], "words": 4})
    asked = [Prompt("toy", "toy/short", ("Name a prime number",)), Prompt("toy", "toy/near", (f"{ASKED} or so",))]
    result = task_overlap("toy", asked, known, holders_of_runs(known, 4), config)
    assert result.identical == 1
    assert result.nearest is not None and (result.nearest.prompt, result.nearest.training_row) == (
        "toy/short",
        "chat (chats.jsonl:1)",
    )
    assert [near.overlap for near in result.near] == [1.0, pytest.approx(11 / 13)]


def test_a_turn_that_is_training_data_word_for_word_is_found_beside_a_long_one() -> None:
    """Also one that nearly is. A follow-up of fewer words than a run is in all training data, and is none."""
    config = OverlapConfig.model_validate({"training": ["unused"], "words": 4})
    others = [" ".join(f"{name}{number}" for number in range(60)) for name in "abc"]
    far = "Which of the planets has the longest day of all that we know"  # 13 words, 10 runs of four
    rows = (ASKED, far, "explain it again")
    known = {tuple(text.lower().split()): f"row/{number}" for number, text in enumerate(rows)}
    asked = [
        Prompt("toy", "toy/first", (ASKED, others[0])),
        Prompt("toy", "toy/second", (others[1], f"{far} or guess")),
        Prompt("toy", "toy/neither", (others[2], "Explain it again.")),
    ]
    result = task_overlap("toy", asked, known, holders_of_runs(known, 4), config)
    assert result.identical == 1
    assert [(near.prompt, near.overlap) for near in result.near] == [
        ("toy/first", 1.0),
        ("toy/second", pytest.approx(10 / 12)),
    ]


def test_a_row_is_counted_once_whatever_other_rows_say(tmp_path: Path) -> None:
    """Rows share a turn, and one of them says it in two places."""
    shared = "please list all the rivers of the north by length"

    def chat(name: str, *said: str) -> str:
        turns = [
            each for text in said for each in ({"role": "user", "content": text}, {"role": "assistant", "content": "a"})
        ]
        return json.dumps({"id": name, "messages": turns}) + "\n"

    path = tmp_path / "chats.jsonl"
    rows = [chat("a", "hello one", shared), chat("c", f"{shared} today"), chat("b", "other two", shared)]
    path.write_text("".join(rows))
    known = training_prompts([str(path)])
    assert len(set(known.values())) == 3
    config = OverlapConfig.model_validate({"training": ["unused"], "words": 4})
    result = task_overlap("toy", [Prompt("toy", "toy/0", (f"{shared} now",))], known, holders_of_runs(known, 4), config)
    assert result.nearest is not None and result.nearest.overlap == pytest.approx(7 / 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Exit code 1 where a prompt was trained on; rows that are no conversations do not hide the others."""
    text = json.loads(SAMPLE_FILE.read_text().splitlines()[0])["turns"][0]
    training = tmp_path / "answers.jsonl"
    rows = [{"id": "bad"}, {"id": "leak", "messages": [{"role": "user", "content": text}]}]
    training.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["overlap", "--tasks", "sample", "--training", str(training), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "leak" in capsys.readouterr().out
    assert "1 rows left out" in caplog.text
    training.write_text(json.dumps({"id": "other", "messages": [{"role": "user", "content": "Hello there"}]}) + "\n")
    assert main(command) == 0
    training.write_text('{"id": "bad"}\n')
    assert main(command) == 2
    assert "no user's words" in capsys.readouterr().err


def test_rows_of_token_ids_are_read_with_the_targets_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = json.loads(SAMPLE_FILE.read_text().splitlines()[0])["turns"][0]
    tokenizer = toy_tokenizer()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    training = tmp_path / "rows.jsonl"
    training.write_text(json.dumps({"id": "leak", "prompt_ids": asked, "response_ids": [1]}) + "\n")
    command = ["overlap", "--tasks", "sample", "--training", str(training), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "token ids alone" in (said := capsys.readouterr().err)
    assert "name the target of the token ids with --target" in said
    target = write_target(tmp_path / "target", vocabulary=len(tokenizer))
    tokenizer.save_pretrained(target)
    caplog.clear()
    assert main([*command, "--target", str(target)]) == 1
    assert "leak (rows.jsonl:1), 1.00" in capsys.readouterr().out
    assert "left out" not in caplog.text
