"""A server that is started when the first cell needs it. Cells of earlier calls are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks.harness.results import Cell
from benchmarks.harness.server_info import call
from benchmarks.harness.servers import Server, serve
from benchmarks.shapes.config import BLOCK, PROFILE, ServeShapeConfig
from benchmarks.shapes.memory import device_used, pool_tokens
from sglang_auf import provenance
from sglang_auf.errors import ServerError

Found = TypeVar("Found", bound=Cell)


class Visit:
    """One server. used_before: bytes of device memory in use before it started, None on a CPU."""

    def __init__(self, config: ServeShapeConfig, name: str, plain: bool, environment: Mapping[str, str]) -> None:
        self.config = config
        self.name = name
        self.plain = plain
        self.used_before: int | None = None
        self._environment = dict(environment)
        self._server: Server | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def place(self) -> Path:
        return self.config.out / self.name

    def server(self) -> Server:
        if self._server is None:
            self.used_before = device_used(self.config.device)
            starting = serve(
                PROFILE,
                self.plain,
                settings=self.config.server_settings,
                environment=self._environment,
                log_file=self.config.out / f"{self.name}-server.log",
                timeout_s=self.config.start_timeout_s,
            )
            self._server = self._stack.enter_context(starting)
            self._require_room(self._server)
        return self._server

    def _require_room(self, server: Server) -> None:
        """Raises ServerError where not all requests of the largest batch can be decoded at once."""
        need = max(self.config.batches) * (self.config.longest + BLOCK)
        if (room := pool_tokens(call(server.base_url, "/server_info"))) < need:
            raise ServerError(
                f"a KV pool of {room} tokens",
                f"at least {need} for a batch of {max(self.config.batches)}",
                "free memory, or lower --batch, --prompt-tokens or --steps",
            )

    def cell(
        self, kind: type[Found], name: str, asked: Mapping[str, Any], measure: Callable[[dict[str, Any]], Found]
    ) -> Found:
        """The cell `name` of this server: of an earlier call that asked the same on such a machine, else measured now.

        measure: gets all that was asked, for the cell to hold, and calls `server` where it needs one.
        """
        machine = provenance.machine()
        whole = {
            **asked,
            "settings": self.config.server_settings,
            "models": self.config.written,
            "environment": self._environment,
            "machine": {part: machine[part] for part in ("cpu", "cores", "gpus")},
        }
        path = self.place / f"{name}.json"
        cell = kind.kept(path, whole)
        if cell is None:
            cell = measure(whole)
            cell.write(path)
        return cell
