"""Make a feature cache. The target computes it once, shard by shard; a second call writes the missing shards only."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sglang_auf import provenance
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import locked, remove_unfinished, shown_size
from sglang_auf.recording.manifest import require_target
from sglang_auf.recording.ring import require_at_rest
from sglang_auf.settings import enable_thinking
from sglang_auf.training.data.batching import plan_batches, with_features
from sglang_auf.training.data.feature_cache import (
    MANIFEST,
    CacheManifest,
    Origin,
    check_shape,
    read_manifest,
    require_origin,
    shard_path,
    token_hash,
    write_manifest,
    write_shard,
)
from sglang_auf.training.data.features import OnlineFeatures, find_target
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.rows import Source, named

logger = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
BATCH_TOKENS = 16384
LOCK = ".lock"


def cache_features(
    data: Sequence[Source],
    target: str,
    layer_ids: Sequence[int],
    out: str | Path,
    *,
    max_length: int,
    overlong: Literal["reject", "truncate"] = "reject",
    thinking: str | None = None,
    split: str = "train",
    dtype: str = "bfloat16",
    device: str | None = None,
) -> CacheManifest:
    """Read `data` as a training run does, and write its features under `target` into directory `out`.

    target: a directory, hub id or prepared target. layer_ids, dtype: as for OnlineFeatures. max_length, overlong,
    thinking, split: as in the recipe's data section. device: None for the GPU if there is one.
    Raises ConfigError, TargetError or DataError.
    """
    from transformers import AutoTokenizer

    require_at_rest(data)
    directory = find_target(target)
    require_target(data, directory)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = OnlineFeatures(directory, layer_ids, dtype=dtype, device=device)
    loaded = load_conversations(
        data,
        AutoTokenizer.from_pretrained(directory),
        max_length=max_length,
        min_answer_tokens=1,
        thinking=enable_thinking(thinking),
        overlong=overlong,
        vocab_size=source.vocab_size,
        split=split,
    )
    return write_cache(loaded.conversations, source, out)


def write_cache(
    conversations: Sequence[Conversation],
    source: OnlineFeatures,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    batch_tokens: int = BATCH_TOKENS,
) -> CacheManifest:
    """Compute the features of all conversations and store them in directory `out`, except for what it already holds.

    shard_bytes: about the size of one file, which is also the most work that a kill costs. batch_tokens: padded tokens
    that `source` gets at once. Raises ConfigError when `out` cannot take the cache (too little space, other files,
    another writer), DataError when it holds the cache of something else.
    """
    out = Path(out).expanduser().absolute()
    asked = _plan(conversations, source, shard_bytes)
    try:
        with locked(out / LOCK):
            manifest = _agreed(asked, out)
            missing = _missing(manifest, out)
            _require_space(manifest, missing, out)
            if not (out / MANIFEST).exists():
                write_manifest(out, manifest)
            _write_shards(conversations, source, manifest, missing, out, batch_tokens)
    except BlockingIOError as error:
        raise ConfigError(
            f"{out} is being written by another process", "one writer", "wait for it, or choose another directory"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"writing the feature cache {out} failed ({error.strerror or error})",
            "a directory that can be written, with enough space",
            "run the same command again after that: finished shards stay",
        ) from error
    return manifest


def _plan(conversations: Sequence[Conversation], source: OnlineFeatures, shard_bytes: int) -> CacheManifest:
    """The manifest of these conversations, in their order. Raises DataError for none, or for one id twice."""
    ids = [conversation.id for conversation in conversations]
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise DataError(f"conversations of one id: {named(twice)}", "a different id for each row")
    if not ids:
        raise DataError("no conversations", "at least one")
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
    return CacheManifest(
        origin=origin,
        width=source.width,
        ids=tuple(ids),
        lengths=tuple(map(len, conversations)),
        token_hashes=tuple(token_hash(conversation.input_ids) for conversation in conversations),
        shards=tuple(shards),
        provenance=provenance.of_this_run(),
    )


def _agreed(asked: CacheManifest, out: Path) -> CacheManifest:
    """The manifest in `out`, whose shards may be cut at other rows, or `asked` for a new cache.

    Removes half-written files of a killed writer.
    """
    for name in (MANIFEST, "shard-*.safetensors"):  # of all shards at once, also those of another plan
        remove_unfinished(out / name)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        require_origin(manifest, asked.origin, out)
        _require_rows(manifest, asked, out)
        return manifest
    if others := sorted(path.name for path in out.iterdir() if path.name != LOCK):
        raise ConfigError(f"{out} holds {named(others)}", f"a new directory, or a feature cache with its {MANIFEST}")
    return asked


def _require_rows(manifest: CacheManifest, asked: CacheManifest, out: Path) -> None:
    def rows(of: CacheManifest) -> list[tuple[str, int, str]]:
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


def _missing(manifest: CacheManifest, out: Path) -> list[int]:
    """The shards that are not written yet. Raises DataError for a damaged one."""
    missing = []
    for shard, rows in enumerate(manifest.shard_rows):
        path = shard_path(out, shard)
        if path.exists():
            check_shape(path, manifest, rows)
        else:
            missing.append(shard)
    return missing


def _require_space(manifest: CacheManifest, missing: Sequence[int], out: Path) -> None:
    """Log what is still to be written. Raises ConfigError where it does not fit."""
    rows = manifest.shard_rows
    tokens = sum(manifest.tokens(rows[shard]) for shard in missing)
    needed = tokens * manifest.token_bytes + len(manifest.model_dump_json())
    free = shutil.disk_usage(out).free
    logger.info(
        "features of %d rows, %d of %d shards to write: %d tokens of %d bytes, %s needed, %s free at %s",
        *(len(manifest.ids), len(missing), len(manifest.shards), tokens, manifest.token_bytes),
        *(shown_size(needed), shown_size(free), out),
    )
    if needed > free:
        raise ConfigError(
            f"{shown_size(free)} free at {out}",
            f"{shown_size(needed)} for the features of {tokens} tokens, {manifest.token_bytes} bytes each",
            "free space, choose another directory, tap fewer layers, or train with online features",
        )


def _write_shards(
    conversations: Sequence[Conversation],
    source: OnlineFeatures,
    manifest: CacheManifest,
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
        logger.info("shard %d of %d: %.0f tokens/s, %.0f s left", number, len(missing), speed, (left - done) / speed)


def _computed(conversations: Sequence[Conversation], source: OnlineFeatures, batch_tokens: int) -> Tensor:
    """Features [tokens, T * H] of one conversation after another, on the CPU."""
    lengths = [len(conversation) for conversation in conversations]
    features = torch.empty(sum(lengths), source.width, dtype=source.dtype)
    places = features.split(lengths)
    for batch in plan_batches(lengths, batch_tokens=max(batch_tokens, *lengths), seed=0, epoch=0):
        states = with_features([conversations[row] for row in batch], source).features
        for row, state in zip(batch, states, strict=True):
            places[row].copy_(state[: lengths[row]])
    return features
