"""The files of a feature cache.

manifest.json        what the features are of: target, layers, dtype, chat template, and every row; written first
shard-00000.safetensors ...   "features" [tokens, T * H] of the rows next in line, with their SHA-256 as metadata

Every file appears complete, under its final name, or not at all.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import DataError
from sglang_auf.files import read_json

MANIFEST = "manifest.json"
FEATURES = "features"
DRAFT_SUFFIX = ".writing"

STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of dtypes"""

SAMPLES, SAMPLE_BYTES = 64, 16384
"""of each weight file, for its fingerprint"""


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
        """["layer_ids: (1, 2) in the cache, (1, 3) asked for", ...], empty where features are interchangeable."""
        ours, theirs = (origin.model_dump(exclude={"target_name"}) for origin in (self, asked))
        found = [
            f"{key}: {_short(ours[key])} in the cache, {_short(theirs[key])} asked for"
            for key in ours
            if ours[key] != theirs[key]
        ]
        if found and self.target_name != asked.target_name:
            found.insert(0, f"target: {self.target_name} in the cache, {asked.target_name} asked for")
        return found


class Manifest(_Record):
    """A cache's contents. ids, lengths, token_hashes: of each row, in order. shards: how many rows each one has.

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


def token_hash(input_ids: Sequence[int]) -> str:
    return hashlib.blake2b(array("q", input_ids).tobytes(), digest_size=8).hexdigest()


def weights_fingerprint(target: Path) -> str:
    """SHA-256 over samples spread evenly over every weight file: a model trained further has another one.

    Whole files would take minutes for a large target, and a fine-tune touches every matrix.
    """
    digest = hashlib.sha256()
    for path in sorted((*target.glob("*.safetensors"), *target.glob("*.bin"))):
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Raises DataError where there is no cache, or one that this version does not read."""
    content = read_json(directory / MANIFEST, DataError)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(
            f"{directory / MANIFEST}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            "the manifest of a feature cache, format 1",
            "write the cache again, into an empty directory",
        ) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_whole(directory / MANIFEST, manifest.model_dump_json().encode())


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05}.safetensors"


def write_shard(path: Path, features: Tensor) -> None:
    """features [tokens, T * H]. Raises OSError, and leaves nothing then."""
    write_whole(path, save({FEATURES: features}, metadata={"sha256": _sha256(features)}))


def check_shape(path: Path, manifest: Manifest, rows: range) -> None:
    """Raise DataError, with the file's name, unless it is whole and of the size and dtype of these rows."""
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
    """Read the whole shard. Raise DataError, with the file's name, if it is not what was written."""
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


def write_whole(path: Path, content: bytes) -> None:
    """The whole file or none of it, whenever the process or the machine stops. Raises OSError."""
    draft = path.with_name(path.name + DRAFT_SUFFIX)
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    names = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)


def _sha256(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy()).hexdigest()


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is damaged ({problem})",
        "a shard as it was written",
        f"delete {path.name} and run `sglang-auf features` again as before: it writes only what is missing",
    )


def _short(value: object) -> object:
    """Hashes by their first characters."""
    return value[:12] if isinstance(value, str) else value
