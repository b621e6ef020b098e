"""Rows of chat data, read from where they are; chats.py says what a row means.

Read from JSONL files, from a JSON file that is one list (as ShareGPT comes) or {"data": [...]}, from Parquet files,
from a recording of a server (sglang_auf/recording), from a folder that the `datasets` library understands, or from a
data set of the hub ("owner/name"). A row that cannot be used is never dropped in silence: it comes out as a ChatRow
with a fault.

A folder or data set may be followed by a configuration and a split, and a data set by a revision: "owner/name:config",
"owner/name:config:split", "owner/name::split", "owner/name@revision", "owner/name:config:split@revision".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from sglang_auf.errors import DataError
from sglang_auf.files import HUB_ID
from sglang_auf.recording.manifest import is_recording
from sglang_auf.recording.ring import row_files

if TYPE_CHECKING:
    from hashlib import _Hash

Source: TypeAlias = str | Path
ID_LENGTH = 16
"""Hexadecimal digits of the id of a row that has none."""
NAMED = 10
"""Rows that a message names; the others are counted."""
FILES = (".json", ".jsonl", ".parquet")
NAMED_PARTS = re.compile(r"([^:@]+)(?::(?=[^@])([^:/@]*)(?::([^:@][^@]*))?)?(?:@([^:]*))?")
"""NAME:CONFIG:SPLIT@REVISION. `datasets` allows no ":" in the name of a configuration, Git none in that of a revision.
A split may be a part of one ("train[:10%]")."""
BATCH_ROWS = 1024
"""Rows of a Parquet file in memory at once."""


class BadRow(Exception):
    """Why one row cannot be used, in words that are the same for every row with that fault."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """place: where the row was read ("file.jsonl:17"). fault: why it cannot be used; its fields are empty then.

    position: among the rows of its source, from 0.
    """

    place: str
    id: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None
    position: int = 0

    @property
    def name(self) -> str:
        """What log lines and errors call it."""
        return f"{self.id} ({self.place})" if self.id else self.place


def read_rows(sources: Source | Sequence[Source], digest: _Hash, *, split: str = "train") -> Iterator[ChatRow]:
    """Every row of the sources, in order. digest: updated with all that is read. split: of sources that name none.

    A row without an id gets one from what it says, so that it is the same in a file that is renamed or moved; where
    rows say the same, the later ones are numbered. The second row with an id of its own has a fault. Raises DataError
    when a source cannot be read at all.
    """
    seen: set[str] = set()
    same: Counter[str] = Counter()
    for source in [sources] if isinstance(sources, str | Path) else sources:
        for position, (place, value) in enumerate(_values(source, digest, split)):
            row = _row(place, value)
            if row.fault is None and not row.id:
                id = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:ID_LENGTH]
                same[id] += 1
                while (named_so := id if same[id] == 1 else f"{id}-{same[id]}") in seen:
                    same[id] += 1  # `regenerate` has given it to the row's answer
                row = replace(row, id=named_so)
            elif row.fault is None and row.id in seen:
                row = ChatRow(place, row.id, fault="an id for the second time")
            seen.add(row.id)
            yield replace(row, position=position)


def grouped(faults: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(reason, row) pairs as reason -> rows."""
    groups: dict[str, list[str]] = {}
    for reason, row in faults:
        groups.setdefault(reason, []).append(row)
    return groups


def named(rows: Sequence[str]) -> str:
    """The first rows by name and the count of the others, for messages."""
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(rows[:NAMED]) + more


def _row(place: str, value: Any) -> ChatRow:
    """Its id is empty where the row has none."""
    if isinstance(value, BadRow):
        return ChatRow(place, "", fault=str(value))
    if not isinstance(value, dict):
        return ChatRow(place, "", fault="no JSON object")
    found = value.get("id")
    if found is None:
        return ChatRow(place, "", value)
    if isinstance(found, bool) or not isinstance(found, str | int) or not is_unicode(str(found)) or found == "":
        return ChatRow(place, "", fault="an id that is neither text nor a number")
    return ChatRow(place, str(found), value)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may escape half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _values(source: Source, digest: _Hash, split: str) -> Iterator[tuple[str, Any]]:
    """(place, decoded JSON or BadRow) of one source. Places name lines from 1, or entries from 0."""
    path = Path(source).expanduser()
    try:
        if is_recording(path):
            for file in row_files(path):
                with suppress(FileNotFoundError):  # the server may have removed it since, because it grew too old
                    yield from _lines(file, digest)
        elif path.suffix == ".json" and path.is_file():
            yield from _json_list(path, digest)
        elif path.suffix == ".parquet" and path.is_file():
            yield from _parquet(path, digest)
        elif path.is_file():
            yield from _lines(path, digest)
        else:
            yield from _data_set(str(source), split, digest)
    except OSError as error:
        raise DataError(f"{source}: {error}", "data that can be read") from error


def _lines(path: Path, digest: _Hash) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            digest.update(line)
            if line.strip():
                yield f"{path.name}:{number}", _strict(_decoded(line), line)


def _json_list(path: Path, digest: _Hash) -> Iterator[tuple[str, Any]]:
    content = path.read_bytes()
    digest.update(content)
    rows = _decoded(content)
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(
            f"{path} is no JSON list",
            'one list of rows, or {"data": [rows]}',
            "name it .jsonl if it has one row on each line",
        )
    for number, row in enumerate(rows):
        yield f"{path.name}[{number}]", _strict(row, content)


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return BadRow("broken JSON")


SENT = ("messages", "conversation", "conversations", "turns", "prompt", "completion", "tools", "chat_template_kwargs")
"""Fields of a row that reach a server or a chat template."""


def _strict(row: Any, text: bytes) -> Any:
    """A BadRow for a row that would send numbers which Python reads and no server takes. text: it was decoded from."""
    if isinstance(row, dict) and (b"NaN" in text or b"Infinity" in text):  # so hardly a row is encoded again
        try:
            json.dumps([row.get(name) for name in SENT], allow_nan=False, default=str)
        except ValueError:
            return BadRow("NaN or Infinity, which JSON does not have")
    return row


def _parquet(path: Path, digest: _Hash) -> Iterator[tuple[str, Any]]:
    from datasets import Features
    from pyarrow import ArrowException, parquet

    columns: dict[str, Any] = {}

    def rows() -> Iterator[Any]:
        try:
            with parquet.ParquetFile(path) as file:
                columns.update(Features.from_arrow_schema(file.schema_arrow))
                for batch in file.iter_batches(BATCH_ROWS):
                    yield from batch.to_pylist()
        except (ArrowException, ValueError, OverflowError, OSError) as error:  # text that is no UTF-8, dates too large
            raise DataError(
                f"{path} cannot be read: {_reason(error)}", "a complete Parquet file", "make or copy it again"
            ) from error

    yield from _numbered(path.name, rows(), columns, digest)


def _numbered(name: str, rows: Iterable[Any], columns: Mapping[str, Any], digest: _Hash) -> Iterator[tuple[str, Any]]:
    """columns: the features of the rows' columns, as `datasets` has them."""
    for number, row in enumerate(rows):
        text = json.dumps(row, sort_keys=True, default=str).encode()
        digest.update(text)
        read = _strict(row, text)
        yield f"{name}[{number}]", read if isinstance(read, BadRow) else _as_given(read, columns)


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the `datasets` library loads. name: a folder or a hub id. config, revision: None for its default.

    split: None for that of all sources.
    """

    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, source: str) -> Self:
        """Read "NAME:CONFIG:SPLIT@REVISION", where only NAME is needed. Raises DataError for what is no such source.

        A folder that has the complete text as its name is that folder.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            return cls(str(path))
        found = NAMED_PARTS.fullmatch(source)
        name, config, split, revision = found.groups() if found else (source, None, None, None)
        folder = Path(name).expanduser()
        if folder.is_dir() and not revision:
            name = str(folder)
        elif not found or folder.exists() or not HUB_ID.fullmatch(name) or {folder.suffix, path.suffix} & set(FILES):
            raise DataError(
                f"no file {path.absolute()}",
                "a JSONL, JSON or Parquet file, a recording, a folder of data, or a hub data set (owner/name, "
                "owner/name@revision, owner/name:config:split@revision)",
            )
        return cls(name, config or None, split, revision or None)


def _data_set(source: str, split: str, digest: _Hash) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    wanted = DataSet.of(source)
    split = wanted.split or split
    try:
        rows = load_dataset(wanted.name, wanted.config, split=split, revision=wanted.revision)
    except Exception as error:  # its own errors, the hub's, pyarrow's and the system's
        cause = f" ({_reason(error.__cause__)})" if error.__cause__ else ""
        raise DataError(
            f"data set {source}: {_reason(error)}{cause}",
            f"a data set with the split {split!r} that the datasets library can load{_choices(wanted, error)}",
            "name configuration and split as in owner/name:config:split; without a network give a file",
        ) from error
    yield from _numbered(source, rows, rows.features, digest)


def _choices(wanted: DataSet, error: Exception) -> str:
    """The configurations and splits that there are, if the library can tell them."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, get_dataset_split_names

    said = ""
    if isinstance(error, ValueError):  # of names that it does not know; others come from the network too
        with suppress(Exception):
            configs = get_dataset_config_names(wanted.name, revision=wanted.revision)
            said += f"; configurations: {', '.join(configs)}"
            config = wanted.config or get_dataset_default_config_name(wanted.name, revision=wanted.revision)
            if config in configs:
                splits = get_dataset_split_names(wanted.name, config, revision=wanted.revision)
                said += f"; splits of {config}: {', '.join(splits)}"
    return said


def _reason(error: BaseException) -> str:
    """The type and the first line: what `datasets` adds in further lines is how to call it from Python."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


def _as_given(row: dict[str, Any], columns: Mapping[str, Any]) -> Any:
    """A BadRow for a row of Arrow with a null where a template would print it.

    A struct of Arrow has the fields that any row has, with null for the others: nobody knows which a row had.
    """
    if any(_has_null(row[name], kind, False) for name, kind in columns.items() if name.lower() in SENT):
        return BadRow(
            "a null in a call's arguments or a tool's parameters, which Arrow also writes for a field that is absent: "
            "write them as JSON text, or give a JSONL file"
        )
    return row


def _has_null(value: Any, kind: Any, printed: bool) -> bool:
    """Whether a struct that a template prints as it is has a null. kind: the feature of `value` in the data set."""
    if isinstance(kind, dict) and isinstance(value, dict):
        return any(
            (printed and value[name] is None)
            or _has_null(value[name], inner, printed or name in ("arguments", "parameters"))
            for name, inner in kind.items()
        )
    inner = getattr(kind, "feature", None)
    return inner is not None and any(_has_null(entry, inner, printed) for entry in value or ())
