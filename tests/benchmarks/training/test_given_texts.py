"""Traffic of a kind is distinct and repeatable, and has neither texts nor instructions of the held-out prompts."""

from __future__ import annotations

from benchmarks.harness.tasks import Task, read_prompts
from benchmarks.training.given_texts import (
    FORMS,
    HELD_OUT,
    LONGEST,
    SHORTEST,
    given_text_prompts,
    openings,
    whole_sentences,
)

TEXTS = [f"{opening} nothing more is known of it." for opening in openings(100)]


def test_openings_are_distinct_and_repeatable() -> None:
    found = openings(300)
    assert len(set(found)) == 300
    assert found == openings(300)
    assert found[:50] == openings(50)
    assert not any("{" in opening for opening in found)


def test_each_text_has_a_prompt_of_each_kind_behind_the_other() -> None:
    prompts = given_text_prompts(TEXTS)
    assert len(set(prompts)) == len(prompts) == len(TEXTS) * len(FORMS)
    assert [TEXTS[number // len(FORMS)] in prompt for number, prompt in enumerate(prompts)] == [True] * len(prompts)
    used = {prompt.replace(TEXTS[number // len(FORMS)], "{text}") for number, prompt in enumerate(prompts)}
    assert used == {form for forms in FORMS.values() for form in forms}, "every instruction is used"


def test_a_text_with_braces_stays_as_it_is() -> None:
    assert all("a {strange} text {" in prompt for prompt in given_text_prompts(["a {strange} text {"]))


def test_no_paragraph_of_the_held_out_prompts_is_in_the_traffic() -> None:
    """A held-out prompt is an instruction and a text, in paragraphs of their own."""
    held_out = read_prompts(HELD_OUT, Task(HELD_OUT.name, 24))
    paragraphs = {paragraph for prompt in held_out for paragraph in prompt.text.split("\n\n")}
    assert len(held_out) == 24
    assert len(paragraphs) > 12
    traffic = {paragraph for prompt in given_text_prompts(TEXTS) for paragraph in prompt.split("\n\n")}
    assert not paragraphs & traffic
    sentences = {sentence for paragraph in paragraphs for sentence in paragraph.split(". ") if len(sentence) > 20}
    assert not [prompt for prompt in traffic if any(sentence in prompt for sentence in sentences)]


def test_a_text_ends_with_a_sentence() -> None:
    long = " ".join(["word"] * SHORTEST)
    assert whole_sentences(f" {long} ends here. And this one is torn") == f"{long} ends here."
    assert whole_sentences(f"{long} 3.5 metres! Then\n\nanother paragraph.") == f"{long} 3.5 metres!"
    assert whole_sentences("Too short. And this one is torn") is None
    assert whole_sentences(long) is None
    assert whole_sentences(f"{' '.join(['word'] * LONGEST)} ends too late.") is None
