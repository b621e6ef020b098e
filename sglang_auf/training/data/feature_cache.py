"""Features read from disk, for runs that go over the same text many times.

A cache (feature_writer.py makes it) belongs to one target, set of layers, dtype and chat template, and to the exact
tokens of its conversations. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_auf.errors import DataError
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.feature_files import (
    Manifest,
    Origin,
    check_contents,
    check_shape,
    read_manifest,
    read_tokens,
    shard_path,
    token_hash,
)
from sglang_auf.training.data.rows import named


class CachedFeatures:
    """A FeatureSource that reads what `feature_writer.write_cache` wrote.

    Its tensors are, bit by bit, those that OnlineFeatures gave for the batches the writer formed. For other batches
    OnlineFeatures may round otherwise, as its docstring says.
    A shard's checksum is verified when it is first read.
    """

    def __init__(
        self,
        directory: str | Path,
        target: str | Path,
        layer_ids: Sequence[int],
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        """target: directory of the target that is trained for; what is asked for must be what the cache holds.

        Raises DataError for a cache of something else (saying what differs), an unfinished one, or a damaged shard.
        """
        self.directory = Path(directory)
        self.device = torch.device(device)
        self.manifest = read_manifest(self.directory)
        require_origin(self.manifest, Origin.of(Path(target), layer_ids, dtype), self.directory)
        self._require_shards()
        self._verified: set[int] = set()
        self._places = dict(zip(self.manifest.ids, _places(self.manifest), strict=True))

    @property
    def width(self) -> int:
        """T * H."""
        return self.manifest.width

    def require(self, conversations: Sequence[Conversation]) -> None:
        """Raise DataError unless every one of them is here, with these tokens. Reads no shard."""
        for conversation in conversations:
            self._place(conversation.id, conversation.input_ids)

    def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
        """As FeatureSource. Raises DataError for a conversation that is not here, or not with these tokens."""
        features = torch.zeros(*input_ids.shape, self.width, dtype=getattr(torch, self.manifest.origin.dtype))
        input_ids = input_ids.cpu()
        for row, (name, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            place = self._place(name, input_ids[row, :length].tolist())
            path = shard_path(self.directory, place.shard)
            if place.shard not in self._verified:
                check_contents(path)
                self._verified.add(place.shard)
            features[row, :length] = read_tokens(path, place.start, place.start + length)
        return features.to(self.device)

    def _place(self, name: str, tokens: Sequence[int]) -> _Place:
        place = self._places.get(name)
        if place is None or place.token_hash != token_hash(tokens):
            raise DataError(
                f"conversation {name} "
                + ("is not in" if place is None else "has other tokens than in")
                + f" the feature cache {self.directory}",
                "the conversations that the cache was written for",
                "write a cache for this data with `sglang-auf features`, or train with online features",
            )
        return place

    def _require_shards(self) -> None:
        paths = [shard_path(self.directory, shard) for shard in range(len(self.manifest.shards))]
        if missing := [path.name for path in paths if not path.exists()]:
            raise DataError(
                f"the feature cache {self.directory} lacks {len(missing)} of {len(paths)} shards: {named(missing)}",
                "a finished cache",
                "run `sglang-auf features` again as before: it writes only what is missing",
            )
        for path, rows in zip(paths, self.manifest.shard_rows, strict=True):
            check_shape(path, self.manifest, rows)


class _Place(NamedTuple):
    """Where a row's features lie: from token `start` of a shard on."""

    shard: int
    start: int
    token_hash: str


def require_origin(manifest: Manifest, asked: Origin, directory: Path) -> None:
    """Raise DataError, saying what differs, for a cache of another target, layers, dtype or chat template."""
    if differences := manifest.origin.differences(asked):
        raise DataError(
            f"the feature cache {directory} is of something else: {'; '.join(differences)}",
            "a cache of this target, these layers, this dtype and this chat template",
            "give the cache that belongs to them, or write one into another directory with `sglang-auf features`",
        )


def _places(manifest: Manifest) -> Iterator[_Place]:
    for shard, rows in enumerate(manifest.shard_rows):
        start = 0
        for row in rows:
            yield _Place(shard, start, manifest.token_hashes[row])
            start += manifest.lengths[row]
