"""Takes answers off the serving path: a bounded queue, and a thread that writes them.

Serving never waits. What does not fit into the queue or onto the disk is dropped, and counted under its reason.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from sglang_auf.recording.manifest import Manifest
from sglang_auf.recording.ring import Ring, encoded
from sglang_auf.recording.settings import RecordSettings

logger = logging.getLogger(__name__)

DROPPED = {
    "refused": "the request refused to be recorded, or did not ask for it where that is needed",
    "share": "not drawn",
    "unusable": "of no plain conversation: media, a session, an adapter, or ignore_eos",
    "unfinished": "aborted",
    "short": "fewer than two tokens, which no drafter can help with",
    "queue": "the queue was full",
    "duplicate": "an answer to the same prompt that begins alike is kept already",
    "large": "longer than max_bytes",
    "disk": "the disk was full, or the file could not be written",
}
"""Why an answer is not kept."""

QUEUED_TOKENS = 2**22
"""Most tokens that wait to be written: 16 MB."""

PREFIX = 32
"""Two answers to one prompt are the same row if so many of their first tokens are equal."""

IDLE_SECONDS = 60.0
"""How often rows that are too old are looked for while nothing is written."""

STOP_SECONDS = 30.0
THREAD = "auf-recorder"


class Recorder:
    """The recording of one server: made before anything loads, started when answers may be kept, stopped at the end."""

    def __init__(self, settings: RecordSettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        self._ring = Ring(directory, settings.max_bytes, settings.max_age)
        self._queue: queue.SimpleQueue[tuple[array[int], array[int]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._recorded = 0
        self._dropped = dict.fromkeys(DROPPED, 0)
        self._kept: dict[str, Any] = {"rows": 0, "bytes": 0, "oldest": None, "unread": 0}
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def opened(cls, settings: RecordSettings, target: Path) -> Self:
        """For answers of the target in this directory. Raises ConfigError where settings.directory cannot be used."""
        assert settings.path is not None
        recorder = cls(settings, settings.path)
        recorder._ring.open(Manifest.of(target))
        return recorder

    def start(self) -> None:
        """Begin to write. Before, a thread would keep SGLang from forking its processes."""
        self._thread = threading.Thread(target=self._write_all, name=THREAD, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and let go of the directory."""
        if self._thread is None:
            self._ring.close()
            return
        self._queue.put(None)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logger.warning("the recording in %s: %d tokens were not written in time", self.directory, self._waiting)

    def offer(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        """Keep an answer, if there is room. prompt, response: token ids."""
        if len(response) < 2:
            self.drop("short")
            return
        size = len(prompt) + len(response)
        with self._lock:
            full = self._waiting + size > QUEUED_TOKENS
            if full:
                self._dropped["queue"] += 1
            else:
                self._waiting += size
        if not full:
            self._queue.put((array("i", prompt), array("i", response)))

    def drop(self, reason: str) -> None:
        """Count an answer that is not kept. reason: of DROPPED."""
        with self._lock:
            self._dropped[reason] += 1

    def fail(self) -> None:
        """Say that the recording has ended, in the log with the error that is being handled, and in `snapshot`."""
        logger.exception("the recording in %s has ended: answers are served and not kept", self.directory)
        with self._lock:
            self._error = "the recorder failed, the server's log says why"

    def snapshot(self) -> dict[str, Any]:
        """What is kept and what was dropped since the start, ready for JSON."""
        with self._lock:
            return {
                "directory": str(self.directory),
                **self.settings.model_dump(include={"share", "opt_in", "max_bytes", "max_age"}),
                **self._kept,
                "recorded": self._recorded,
                "waiting_tokens": self._waiting,
                "dropped": dict(self._dropped),
                "error": self._error,
            }

    def _write_all(self) -> None:
        try:
            self._attempt(self._ring.load)
            while True:
                try:
                    row = self._queue.get(timeout=IDLE_SECONDS)
                except queue.Empty:
                    self._attempt(self._ring.expire)
                    continue
                if row is None:
                    return
                self._write(*row)
                with self._lock:
                    self._waiting -= sum(map(len, row))
        except Exception:  # a mistake of ours must not end a server
            self.fail()
        finally:
            self._ring.close()

    def _write(self, prompt: array[int], response: array[int]) -> None:
        self._attempt(self._ring.expire)  # also where every answer is a duplicate
        id = digest(prompt, response)
        if self._ring.holds(id):
            self.drop("duplicate")
            return
        line = encoded(id, prompt, response)
        if not self._ring.fits(line):
            self.drop("large")
            return
        if self._attempt(lambda: self._ring.append(id, line)):
            with self._lock:
                self._recorded += 1
                self._error = None  # only a row that was written shows that rows can be written
        else:
            self.drop("disk")

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Whether the disk let `act` be done. If not, the error is kept until a row is written, and logged once."""
        error, done = self._error, False
        try:
            act()
            done = True
        except OSError as problem:
            error = problem.strerror or str(problem)
            if error != self._error:
                logger.warning("%s cannot be written (%s): answers are served and not kept", self.directory, error)
        oldest = self._ring.oldest
        with self._lock:
            self._error = error
            self._kept = {
                "rows": self._ring.rows,
                "bytes": self._ring.size,
                "oldest": None if oldest is None else oldest.isoformat(timespec="seconds"),
                "unread": self._ring.unread,
            }
        return done


def digest(prompt: array[int], response: array[int]) -> int:
    """The id of a row: of its prompt and the beginning of its answer."""
    hashed = hashlib.blake2b(len(prompt).to_bytes(8), digest_size=16)
    hashed.update(prompt.tobytes())
    hashed.update(response[:PREFIX].tobytes())
    return int.from_bytes(hashed.digest())
