"""Recordings of real traffic (sglang_auf/recording) as prompts: rows of token ids, which are sent as they are.

Token ids mean something to one target and its tokenizer alone, so a recording of another one is refused where the files
of the server's target can be looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.config import RunConfig
from benchmarks.harness.server_info import ServerFacts, target_files
from benchmarks.harness.sources.prompt import TokenIds
from benchmarks.harness.tasks import Selection
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import HUB_ID, is_held
from sglang_auf.recording.manifest import is_readable_recording, read_manifest, require_target
from sglang_auf.recording.ring import LOCK
from sglang_auf.training.text.chats import CONVERSATION, SYSTEM
from sglang_auf.training.text.rows import BadRow

logger = logging.getLogger(__name__)

TEMPLATE = ("tools", "chat_template_kwargs", *SYSTEM)


def ids_of(fields: Mapping[str, Any]) -> TokenIds | None:
    """The `prompt_ids` of a row that has no conversation; None for any other row. Raises BadRow."""
    given = {name.lower(): value for name, value in fields.items() if value not in (None, "", [], {})}
    if "prompt_ids" not in given or given.keys() & set(CONVERSATION):
        return None
    for name in TEMPLATE:
        if name in given:
            raise BadRow(f"a field {name!r} beside prompt_ids, which no chat template renders")
    ids = given["prompt_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise BadRow("prompt_ids that are no list of token ids")
    return TokenIds(ids)


def recording_of(path: Path) -> Path | None:
    """The directory of the recording that a path is, or that a file lies in. Raises DataError."""
    directory = path if path.is_dir() else path.parent
    if not is_readable_recording(directory):
        return None
    if is_held(directory / LOCK):
        logger.warning(
            "%s: a server records into it now, so that its rows change: to resume this run, ask a copy", directory
        )
    return directory


def check_replay(config: RunConfig, server: ServerFacts, selections: Iterable[Selection]) -> list[str]:
    """Look at prompts of token ids before the server is asked. Returns what could not be checked.

    Raises DataError for a recording of another target, ConfigError for an option that needs chats.
    """
    replayed = [chosen for chosen in selections if chosen.token_ids]
    if not replayed:
        return []
    if config.record_steps:
        raise ConfigError(
            "--record-steps, and --prompts of token ids",
            "chats, whose streams say which tokens were drafted",
            "leave --record-steps out",
        )
    recordings = [chosen.recording for chosen in replayed if chosen.recording is not None]
    target = target_files(server)
    if target is not None:
        require_target(recordings, target)
        return []
    for recording in recordings:
        _require_name(recording, server)
    return [
        f"the files of {server.target or server.model} are not on this machine: whether the token ids of "
        f"{', '.join(chosen.task.name for chosen in replayed)} are its own was not checked"
    ]


def without_unknown_ids(server: ServerFacts, selections: Sequence[Selection]) -> list[Selection]:
    """The selections without prompts of ids outside the vocabulary, where the target's files are on this machine.

    Such rows are logged, and become broken rows of their file for all who hold it. Raises DataError where nothing
    else is asked of a file.
    """
    replayed = any(chosen.token_ids for chosen in selections)
    target = target_files(server) if replayed else None
    if target is None:
        return list(selections)
    facts = TargetFacts.of(target)
    return [_known(chosen, facts) for chosen in selections]


def _known(chosen: Selection, facts: TargetFacts) -> Selection:
    highest = {prompt: max(prompt.continued) for prompt in chosen.prompts if isinstance(prompt.continued, TokenIds)}
    unknown = {prompt: token for prompt, token in highest.items() if token >= facts.vocab_size}
    if chosen.file is None or not unknown:
        return chosen
    expected = f"ids below {facts.vocab_size}, the vocabulary of {facts.name}"
    kept = tuple(prompt for prompt in chosen.prompts if prompt not in unknown)
    if not kept:
        prompt, token = next(iter(unknown.items()))
        raise DataError(
            f"token id {token} in {prompt.place}, and such ids in all that is asked of {chosen.origin}",
            expected,
            "ask a server of the target that the ids are of",
        )
    for prompt, token in unknown.items():
        row = f"{prompt.place}: token id {token}, outside the vocabulary of {facts.vocab_size}"
        if row not in chosen.file.broken:  # each server of a command looks at the same rows
            logger.warning("%s, not asked; expected: %s", row, expected)
            chosen.file.broken.append(row)
    return replace(chosen, prompts=kept)


def _require_name(recording: Path, server: ServerFacts) -> None:
    """By name alone: of two repositories of the hub the ids are not the same."""
    recorded = read_manifest(recording, DataError).target_hub_id
    if recorded and server.target and HUB_ID.fullmatch(server.target) and recorded != server.target:
        raise DataError(
            f"{recording} is a recording of {recorded}",
            f"a recording of {server.target}, which the server serves",
            "give another directory, or ask a server of its target",
        )
