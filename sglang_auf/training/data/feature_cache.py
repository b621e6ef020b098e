"""A cache of features on disk, for runs that go over the same text many times: its files, and how they are read.

manifest.json        what the features are of: target, layers, dtype, chat template, and every row; written first
shard-00000.safetensors ...   "features" [tokens, T * H] of the next rows in order, with their SHA-256 as metadata

Every file appears under its name when it is complete. A cache (feature_writer.py makes it) belongs to one target, set
of layers, dtype and chat template, and to the exact tokens of its conversations. Anything else is refused.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import DataError
from sglang_auf.files import read_json, write_whole
from sglang_auf.settings import checked
from sglang_auf.training.data.batching import to_device
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.rows import named

MANIFEST = "manifest.json"
FEATURES = "features"

STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of dtypes."""

SAMPLES, SAMPLE_BYTES = 64, 16384
"""Of each weight file, for its fingerprint."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Record):
    """What features depend on besides the text.

    target_config_hash, chat_template_hash: as TargetFacts has them. target_weights: `weights_fingerprint`.
    layer_ids: 0-based, ascending. target_name is for messages: a target may be moved.
    """

    target_name: str
    target_config_hash: str
    target_weights: str
    chat_template_hash: str | None
    layer_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, target: Path, layer_ids: Sequence[int], dtype: str) -> Self:
        """Raises TargetError."""
        facts = TargetFacts.of(target)
        return cls(
            target_name=facts.name,
            target_config_hash=facts.config_hash,
            target_weights=weights_fingerprint(target),
            chat_template_hash=facts.chat_template_hash,
            layer_ids=tuple(layer_ids),
            dtype=dtype,
        )

    def differences(self, asked: Origin) -> list[str]:
        """["layer_ids: (1, 2) in the cache, (1, 3) asked for", ...]; empty where features are interchangeable."""
        ours, theirs = (origin.model_dump(exclude={"target_name"}) for origin in (self, asked))
        found = [
            f"{key}: {_short(ours[key])} in the cache, {_short(theirs[key])} asked for"
            for key in ours
            if ours[key] != theirs[key]
        ]
        if found and self.target_name != asked.target_name:
            found.insert(0, f"target: {self.target_name} in the cache, {asked.target_name} asked for")
        return found


class CacheManifest(_Record):
    """A cache's contents. ids, lengths, token_hashes: of each row, in order. shards: the number of rows of each.

    width: T * H. provenance: of the run that began the cache.
    """

    format: Literal[1] = 1
    origin: Origin
    width: int = Field(ge=1)
    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    token_hashes: tuple[str, ...]
    shards: tuple[int, ...]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.ids) == len(self.lengths) == len(self.token_hashes) == sum(self.shards):
            raise ValueError("ids, lengths, token_hashes and shards disagree on the number of rows")
        return self

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's features."""
        return self.width * getattr(torch, self.origin.dtype).itemsize  # type: ignore[no-any-return]

    @property
    def shard_rows(self) -> list[range]:
        """For each shard the rows it holds, in order."""
        return [range(end - rows, end) for rows, end in zip(self.shards, accumulate(self.shards), strict=True)]

    def tokens(self, rows: range) -> int:
        return sum(self.lengths[rows.start : rows.stop])


class CachedFeatures:
    """A FeatureSource that reads what `feature_writer.write_cache` wrote.

    Its tensors are bit by bit those that OnlineFeatures gave for the batches of the writer. For other batches
    OnlineFeatures may round differently, as its docstring says. A shard's checksum is verified when it is first read.
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
        """target: directory of the target that is trained for. The cache must hold what these arguments describe.

        Raises DataError for a cache of something else (with the differences), an unfinished one, or a damaged shard.
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
        """Raise DataError where one of them is missing or has other tokens here. Reads no shard."""
        for conversation in conversations:
            self._place(conversation.id, conversation.input_ids)

    def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
        """As FeatureSource. Raises DataError for a conversation that is missing or has other tokens here."""
        features = torch.zeros(*input_ids.shape, self.width, dtype=getattr(torch, self.manifest.origin.dtype))
        input_ids = input_ids.cpu()
        for row, (name, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            place = self._place(name, input_ids[row, :length].tolist())
            path = shard_path(self.directory, place.shard)
            if place.shard not in self._verified:
                check_contents(path)
                self._verified.add(place.shard)
            features[row, :length] = read_tokens(path, place.start, place.start + length)
        return to_device(features, self.device)

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
    """Where a row's features are: in a shard, from its token `start` on."""

    shard: int
    start: int
    token_hash: str


def require_origin(manifest: CacheManifest, asked: Origin, directory: Path) -> None:
    """Raise DataError, with the differences, for a cache of another target, layers, dtype or chat template."""
    if differences := manifest.origin.differences(asked):
        raise DataError(
            f"the feature cache {directory} is of something else: {'; '.join(differences)}",
            "a cache of this target, these layers, this dtype and this chat template",
            "give the cache that belongs to them, or write one into another directory with `sglang-auf features`",
        )


def token_hash(input_ids: Sequence[int]) -> str:
    return hashlib.blake2b(array("q", input_ids).tobytes(), digest_size=8).hexdigest()


def weights_fingerprint(target: Path) -> str:
    """`fingerprint` of every weight file in the directory, loaded or not."""
    return fingerprint(sorted((*target.glob("*.safetensors"), *target.glob("*.bin"))))


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over samples spread evenly over every weight file, so that a model trained further has another one.

    Complete files would take minutes for a large target, and a fine-tune changes every matrix.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_manifest(directory: Path) -> CacheManifest:
    """Raises DataError where there is no cache, or one that this version does not read."""
    return checked(
        CacheManifest,
        read_json(directory / MANIFEST, DataError),
        str(directory / MANIFEST),
        "the manifest of a feature cache, format 1",
        "write the cache again, into an empty directory",
        DataError,
    )


def write_manifest(directory: Path, manifest: CacheManifest) -> None:
    write_whole(directory / MANIFEST, manifest.model_dump_json())


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05}.safetensors"


def write_shard(path: Path, features: Tensor) -> None:
    """features [tokens, T * H]. Raises OSError, and leaves no file then."""
    write_whole(path, save({FEATURES: features}, metadata={"sha256": _sha256(features)}))


def check_shape(path: Path, manifest: CacheManifest, rows: range) -> None:
    """Raise DataError, with the file's name, unless it is complete and has the size and dtype of these rows."""
    expected = [manifest.tokens(rows), manifest.width], STORED_AS[manifest.origin.dtype]
    try:
        with safe_open(path, "pt") as file:
            features = file.get_slice(FEATURES)
            found = features.get_shape(), features.get_dtype()
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if found != expected:
        raise _damaged(path, f"features {found}, where the manifest says {expected}")


def check_contents(path: Path) -> None:
    """Read the complete shard. Raise DataError, with the file's name, if it is not what was written."""
    try:
        with safe_open(path, "pt") as file:
            intact = _sha256(file.get_tensor(FEATURES)) == (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if not intact:
        raise _damaged(path, "its contents do not have its checksum")


def read_tokens(path: Path, start: int, end: int) -> Tensor:
    """Features [end - start, T * H] of some tokens of a shard."""
    with safe_open(path, "pt") as file:
        return file.get_slice(FEATURES)[start:end]


def _sha256(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy()).hexdigest()


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is damaged ({problem})",
        "an intact shard",
        f"delete {path.name} and run `sglang-auf features` again as before: it writes only what is missing",
    )


def _short(value: object) -> object:
    """Hashes by their first characters."""
    return value[:12] if isinstance(value, str) else value


def _places(manifest: CacheManifest) -> Iterator[_Place]:
    for shard, rows in enumerate(manifest.shard_rows):
        start = 0
        for row in rows:
            yield _Place(shard, start, manifest.token_hashes[row])
            start += manifest.lengths[row]
