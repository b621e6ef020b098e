"""Training prompts for `make train-demo`, made from templates, so that the demo needs no download.

No prompt of the benchmark or of the bundled sample is among them. Only the kinds of task are alike.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
NAMES = ("Ines", "Tomas", "Wanjiru", "Lars", "Mei", "Pavel", "Aylin", "Diego")
GOODS = ("pencils", "oranges", "stamps", "candles", "marbles", "cookies", "tickets", "postcards")
FUNCTIONS = (
    "returns the sum of the even numbers in a list",
    "counts the vowels of a string",
    "reverses the words of a sentence",
    "finds the largest difference between two neighbours in a list",
    "removes duplicates from a list and keeps the order",
    "checks whether a number is a perfect square",
    "merges two sorted lists into one sorted list",
    "returns the n-th Fibonacci number",
    "turns a number of seconds into hours, minutes and seconds",
    "groups words by their first letter",
)
LANGUAGES = ("Python", "JavaScript")
SUBJECTS = (
    "how bread rises",
    "why the sky is blue",
    "how a bicycle stays upright",
    "what a library catalogue is for",
    "how bees make honey",
    "why leaves change colour in autumn",
    "how a lock on a canal works",
    "what makes a good password",
    "how vaccines protect people",
    "why ships float",
)
FORMS = ("Explain to a child {}.", "Write a short paragraph about {}.", "Give five facts about {}.")


def demo_prompts(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` distinct rows {"id", "turns"}: arithmetic, code and explanation in turn."""
    random_numbers = random.Random(seed)
    makers: list[Callable[[], Iterator[str]]] = [lambda: _sums(random_numbers), _code, _explanations]
    kinds = itertools.cycle([maker() for maker in makers])
    seen: list[str] = []
    while len(seen) < count:
        text = next(next(kinds), None)
        # Code and explanations run out; sums do not.
        if text is None:
            text = next(_sums(random_numbers))
        if text not in seen:
            seen.append(text)
    return [{"id": f"demo/{number}", "turns": [text]} for number, text in enumerate(seen)]


def _sums(numbers: random.Random) -> Iterator[str]:
    while True:
        name, goods = numbers.choice(NAMES), numbers.choice(GOODS)
        packs, size, given = numbers.randint(3, 12), numbers.randint(4, 15), numbers.randint(2, 11)
        yield (
            f"{name} buys {packs} packs of {goods} with {size} {goods} in each pack and gives {given} of them to a "
            f"friend. How many {goods} does {name} have left?\n{BOXED}"
        )


def _code() -> Iterator[str]:
    for language, what in itertools.product(LANGUAGES, FUNCTIONS):
        yield f"Write a {language} function that {what}."


def _explanations() -> Iterator[str]:
    for form, subject in itertools.product(FORMS, SUBJECTS):
        yield form.format(subject)
