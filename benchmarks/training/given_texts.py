"""Traffic of a kind for `make adapt-demo`: questions, summaries, lists and translations on texts of the target's own.

The texts are the target's continuations of openings that are made here. Neither a text nor an instruction of the
held-out prompts (HELD_OUT) is among them: only the kind is the same.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

from benchmarks.harness.tasks import SAMPLE_FILE

HELD_OUT = SAMPLE_FILE.with_name("given_text.jsonl")
"""Own prompts of the kind, which are measured and never sent as traffic."""

SHORTEST, LONGEST = 25, 90
"""Words of a text."""

WORDS = {
    "town": ("Arnsby", "Delmora", "Kestrel Bay", "Lindwick", "Orsova", "Porto Selo", "Tamsin", "Ulvik", "Vellano"),
    "person": ("Aino Salo", "Bruno Keller", "Carmen Vidal", "Dilip Rao", "Esther Mensah", "Farid Aziz", "Greta Holm"),
    "place": ("market hall", "school", "harbour", "theatre", "public garden", "railway station", "swimming pool"),
    "thing": ("kettle", "wooden chair", "tent", "guitar", "glass bowl", "raincoat", "clock", "kite", "rug", "lamp"),
    "animal": ("red fox", "sea otter", "barn owl", "tree frog", "mountain goat", "grey seal", "hedgehog", "stork"),
    "season": ("spring", "summer", "autumn", "winter"),
}
OPENINGS = (
    "The {place} of {town} was opened in {year} and",
    "{person} has worked at the {place} in {town} since {year}. Every morning",
    "Every {season} the people of {town} meet at the {place}, where",
    "Before you use the {thing} for the first time,",
    "A good {thing} is made in several steps. First",
    "The {animal} lives in the hills around {town}. In {season}",
    "In {season} the {animal} looks for food near the {place}, because",
    "Dear {person}, thank you for your letter about the {place}. In {year}",
    "The {place} in {town} is open on weekdays. Visitors",
    "In {year} {person} bought a {thing} in {town} and",
)

FORMS = {
    "question": (
        "{text}\n\nWhat is said here about the beginning, and what about the end?",
        "{text}\n\nWho or what is this text about?",
        "Read this text and answer the question after it.\n\n{text}\n\nWhich places, people or things are named?",
        "Answer with words of the text: what happens in it, and why?\n\n{text}",
    ),
    "summary": (
        "Summarise this text in one sentence.\n\n{text}",
        "{text}\n\nGive a short summary of the text above.",
        "Say briefly what the following text tells.\n\n{text}",
    ),
    "list": (
        "Make a list of what this text says.\n\n{text}",
        "{text}\n\nWrite the statements of the text above as bullet points.",
        "Put each fact of this text on a line of its own.\n\n{text}",
    ),
    "translation": (
        "Translate this text into Spanish.\n\n{text}",
        "{text}\n\nTranslate the text above into French.",
        "Write this text in Spanish.\n\n{text}",
        "Translate into German:\n\n{text}",
    ),
}
"""Kind -> instructions of it."""


def openings(count: int, seed: int = 0) -> list[str]:
    """`count` distinct first words of texts."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    forms = itertools.cycle(OPENINGS)
    while len(found) < count:
        words = {name: draw.choice(values) for name, values in WORDS.items()}
        found[next(forms).format(year=draw.randint(1850, 2020), **words)] = None
    return list(found)


def whole_sentences(text: str) -> str | None:
    """The first paragraph, up to its last sentence that ends within LONGEST words; None where that is too short."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split()[:LONGEST])
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", paragraph)]
    kept = paragraph[: ends[-1]] if ends else ""
    return kept if len(kept.split()) >= SHORTEST else None


def given_text_prompts(texts: Sequence[str]) -> list[str]:
    """A prompt of each kind on every text, the kinds in turn and the prompts on one text behind each other.

    The last rows of a recording of them are therefore on texts that the first ones do not have.
    """
    return [
        forms[number % len(forms)].format(text=text) for number, text in enumerate(texts) for forms in FORMS.values()
    ]
