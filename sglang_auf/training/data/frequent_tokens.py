"""The tokens that answers hold most often, for a drafter's draft vocabulary (checkpoints/draft_vocabulary.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import load_card
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.weights import config_size
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import read_json
from sglang_auf.recording.manifest import require_target
from sglang_auf.settings import enable_thinking
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.rows import Source


def frequent_tokens(
    drafter: Path, target: str, data: Sequence[Source], count: int, *, split: str = "train"
) -> DraftVocabulary:
    """The `count` most frequent tokens of the answers in `data`, tokenized as the drafter's target does.

    drafter: directory of an exported drafter. target: a directory, hub id or prepared target. split: of a folder or hub
    data set. Raises CardError where the drafter cannot keep to the list, else TargetError, DataError or ConfigError.
    """
    from transformers import AutoTokenizer

    from sglang_auf.training.data.features import find_target

    card, config = load_card(drafter), read_json(drafter / "config.json", CardError)
    directory = find_target(target)
    require_target(data, directory)
    conversations = load_conversations(
        data,
        AutoTokenizer.from_pretrained(directory),
        max_length=config_size(config, "max_position_embeddings"),
        min_answer_tokens=1,
        thinking=enable_thinking(card.thinking),
        vocab_size=config_size(config, "vocab_size"),
        split=split,
    ).conversations
    answers = (compress(conversation.input_ids, conversation.loss_mask) for conversation in conversations)
    vocabulary = most_frequent(answers, count)
    draft_vocabulary.check(vocabulary, config)
    return vocabulary


def most_frequent(answers: Iterable[Iterable[int]], count: int) -> DraftVocabulary:
    """The `count` tokens that the answers hold most often; of equally frequent ones the lower ids.

    Fewer where the answers have fewer. Raises ConfigError where there is nothing to count.
    """
    seen: Counter[int] = Counter()
    for answer in answers:
        seen.update(answer)
    if count < 1 or not seen:
        raise ConfigError(
            f"{count} of {len(seen)} distinct tokens",
            "1 or more, and answers that hold some",
            "give another --size, or other --data",
        )
    chosen = sorted(seen, key=lambda token: (-seen[token], token))[:count]
    return DraftVocabulary(
        coverage=sum(seen[token] for token in chosen) / seen.total(),
        answer_tokens=seen.total(),
        tokens=tuple(sorted(chosen)),
    )
