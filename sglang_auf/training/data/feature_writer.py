"""Making a feature cache: computed once by the target, written shard by shard, resumed at the first missing one."""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sglang_auf import provenance
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.data.batching import plan_batches, with_features
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.feature_cache import require_origin
from sglang_auf.training.data.feature_files import (
    DRAFT_SUFFIX,
    MANIFEST,
    Manifest,
    Origin,
    check_shape,
    read_manifest,
    shard_path,
    token_hash,
    write_manifest,
    write_shard,
)
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.data.rows import named

log = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
BATCH_TOKENS = 16384
LOCK = ".lock"


def write_cache(
    conversations: Sequence[Conversation],
    source: OnlineFeatures,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    batch_tokens: int = BATCH_TOKENS,
) -> Manifest:
    """Compute and store the features of all conversations in directory `out`, or what of them is not there yet.

    shard_bytes: about the size of one file, which is also the most that a kill costs. batch_tokens: padded tokens that
    are given to `source` at once. Raises ConfigError when `out` cannot take the cache (too little space, other files,
    another writer), DataError when it holds the cache of something else.
    """
    out = Path(out).expanduser().absolute()
    asked = _plan(conversations, source, shard_bytes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            manifest = _agreed(asked, out)
            missing = _missing(manifest, out)
            _require_space(manifest, missing, out)
            if not (out / MANIFEST).exists():
                write_manifest(out, manifest)
            _write_shards(conversations, source, manifest, missing, out, batch_tokens)
    except OSError as error:
        raise ConfigError(
            f"writing the feature cache {out} failed ({error.strerror or error})",
            "a directory that can be written, with enough space",
            "mend that and run the same command again: finished shards stay",
        ) from error
    return manifest


def _plan(conversations: Sequence[Conversation], source: OnlineFeatures, shard_bytes: int) -> Manifest:
    """The manifest of these conversations, in their order. Raises DataError for none, or for one id twice."""
    ids = [conversation.id for conversation in conversations]
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise DataError(f"conversations of one id: {named(twice)}", "an id for each", "make the ids of the rows unique")
    if not ids:
        raise DataError("no conversations", "at least one", "give data")
    origin = Origin.of(source.directory, source.layer_ids, str(source.dtype).removeprefix("torch."))
    shard_tokens = shard_bytes // (source.width * source.dtype.itemsize)
    shards: list[int] = []
    filled = 0
    for conversation in conversations:
        if not shards or filled + len(conversation) > shard_tokens:
            shards.append(0)
            filled = 0
        shards[-1] += 1
        filled += len(conversation)
    return Manifest(
        origin=origin,
        width=source.width,
        ids=tuple(ids),
        lengths=tuple(map(len, conversations)),
        token_hashes=tuple(token_hash(conversation.input_ids) for conversation in conversations),
        shards=tuple(shards),
        provenance=provenance.of_this_run(),
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out} is being written by another process", "one writer", "wait for it, or choose another directory"
            ) from None
        yield


def _agreed(asked: Manifest, out: Path) -> Manifest:
    """The manifest that `out` goes by: its own if it has one (its shards may be cut otherwise), else the one asked for.

    Leaves nothing of a writer that was killed but finished shards.
    """
    for name in (MANIFEST, "shard-*.safetensors"):
        for draft in out.glob(name + DRAFT_SUFFIX):
            draft.unlink()
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        require_origin(manifest, asked.origin, out)
        _require_rows(manifest, asked, out)
        return manifest
    if others := sorted(path.name for path in out.iterdir() if path.name != LOCK):
        raise ConfigError(
            f"{out} holds {named(others)}",
            f"a new directory, or a feature cache with its {MANIFEST}",
            "choose another directory",
        )
    return asked


def _require_rows(manifest: Manifest, asked: Manifest, out: Path) -> None:
    def rows(of: Manifest) -> list[tuple[str, int, str]]:
        return list(zip(of.ids, of.lengths, of.token_hashes, strict=True))

    if rows(manifest) == rows(asked):
        return
    changed = [name for name, *_ in sorted(set(rows(asked)) ^ set(rows(manifest)))]
    raise DataError(
        f"the feature cache {out} is of other data: {len(manifest.ids)} rows there, {len(asked.ids)} asked for; "
        + (f"not the same in both: {named(list(dict.fromkeys(changed)))}" if changed else "in another order"),
        "the same rows, with the same tokens, in the same order",
        "give the same data and limits, or choose another directory",
    )


def _missing(manifest: Manifest, out: Path) -> list[int]:
    """The shards that are not written yet. Raises DataError for one that is damaged."""
    missing = []
    for shard, rows in enumerate(manifest.shard_rows):
        path = shard_path(out, shard)
        if path.exists():
            check_shape(path, manifest, rows)
        else:
            missing.append(shard)
    return missing


def _require_space(manifest: Manifest, missing: Sequence[int], out: Path) -> None:
    """Say what is still to be written, and raise ConfigError where it does not fit."""
    rows = manifest.shard_rows
    tokens = sum(manifest.tokens(rows[shard]) for shard in missing)
    needed = tokens * manifest.token_bytes + len(manifest.model_dump_json())
    free = shutil.disk_usage(out).free
    log.info(
        "features of %d rows, %d of %d shards to write: %d tokens of %d bytes, %s needed, %s free at %s",
        *(len(manifest.ids), len(missing), len(manifest.shards), tokens, manifest.token_bytes),
        *(_size(needed), _size(free), out),
    )
    if needed > free:
        raise ConfigError(
            f"{_size(free)} free at {out}",
            f"{_size(needed)} for the features of {tokens} tokens, {manifest.token_bytes} bytes each",
            "free space, choose another directory, tap fewer layers, or train with online features",
        )


def _write_shards(
    conversations: Sequence[Conversation],
    source: OnlineFeatures,
    manifest: Manifest,
    missing: Sequence[int],
    out: Path,
    batch_tokens: int,
) -> None:
    rows = manifest.shard_rows
    left = sum(manifest.tokens(rows[shard]) for shard in missing)
    started, done = time.monotonic(), 0
    for number, shard in enumerate(missing, 1):
        part = conversations[rows[shard].start : rows[shard].stop]
        write_shard(shard_path(out, shard), _computed(part, source, batch_tokens))
        done += manifest.tokens(rows[shard])
        speed = done / (time.monotonic() - started)
        log.info("shard %d of %d: %.0f tokens/s, %.0f s left", number, len(missing), speed, (left - done) / speed)


def _computed(conversations: Sequence[Conversation], source: OnlineFeatures, batch_tokens: int) -> Tensor:
    """Features [tokens, T * H] on the CPU, of one conversation after the other."""
    lengths = [len(conversation) for conversation in conversations]
    features = torch.empty(sum(lengths), source.width, dtype=source.dtype)
    places = features.split(lengths)
    for batch in plan_batches(lengths, batch_tokens=max(batch_tokens, *lengths), seed=0, epoch=0):
        states = with_features([conversations[row] for row in batch], source).features
        for row, state in zip(batch, states, strict=True):
            places[row].copy_(state[: lengths[row]])
    return features


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3f} MB"
