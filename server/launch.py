"""Start SGLang's server in this process as a profile says, and announce it once it has proved that it speculates."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from server.arguments import build_server_args, check_server_args, sglang_arguments
from server.middleware import add_all
from server.preflight import ServedModel, check_device, check_models, check_port, load_sglang
from server.probe import Probe
from server.profile import Profile
from server.routes import auf_router
from server.unreadable import add_replies
from sglang_auf.checkpoints.prepare import prepare
from sglang_auf.checkpoints.target_sources import TARGET_SOURCES
from sglang_auf.env import BUNDLED, CPU_OVERLAP, DRAFT_VOCABULARY, TREE, TREE_NODES
from sglang_auf.errors import ServerError, TargetError
from sglang_auf.files import find_model
from sglang_auf.process import end_on_sigterm
from sglang_auf.recording import capture
from sglang_auf.recording.recorder import Recorder

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """A profile that passed every check before the start. target: directory or hub id.

    given: arguments for SGLang. server_args: SGLang's record of them, resolved.
    """

    profile: Profile
    target: str
    served: ServedModel
    given: dict[str, Any]
    server_args: ServerArgs

    @property
    def resolved(self) -> Any:
        """What the arguments became, by their names."""
        from sglang.srt.arg_groups.overrides import resolved_view

        return resolved_view(self.server_args)

    @property
    def drafter_warnings(self) -> tuple[str, ...]:
        """What may lower tau; empty for a plain server."""
        if self.served.speculation is None:
            return ()
        notice = self.profile.drafter_notice
        return (*([notice] if notice else []), *self.served.speculation.checked.warnings)


def check(profile: Profile, *, plain: bool = False, api_key: str | None = None, here: bool = True) -> Checked:
    """Check all that can be checked before anything loads, in the cheapest order.

    here: the server will run on this machine; else its device and its port are another one's. Switches of the profile
    are set in the environment. Raises an AufError for what the user can fix.
    """
    if here:
        check_device(profile)
        check_port(profile.host, profile.port)
    load_sglang(profile.device, needs_algorithm=not plain, here=here)
    check_server_args(profile.server_args)
    target = str(prepare(profile.target)) if profile.target in TARGET_SOURCES else os.path.expanduser(profile.target)
    served = check_models(profile, target, plain)
    profile = profile.model_copy(update={"served_model_name": served.model})
    drafter = served.speculation.checked.path if served.speculation else None
    os.environ[BUNDLED] = "1"  # read by the hooks, here and in children of this process
    if not profile.tree:
        TREE.set(False)
    if profile.tree_nodes is not None:
        os.environ[TREE_NODES] = str(profile.tree_nodes)
    if not profile.draft_vocabulary:
        DRAFT_VOCABULARY.set(False)
    if profile.server_args.get("disable_overlap_schedule") is False:
        CPU_OVERLAP.set(True)  # SGLang cannot tell this from a flag that was not given
    given = sglang_arguments(profile, target, drafter, api_key)
    return Checked(profile, target, served, given, build_server_args(given))


def serve(profile: Profile, *, plain: bool = False, api_key: str | None = None) -> None:
    """Serve until SIGTERM. plain: the same target without the drafter.

    Raises an AufError for what the user can fix, if possible before anything loads. Raises ServerError when the engine
    dies or does not speculate.
    """
    checked = check(profile, plain=plain, api_key=api_key)
    for warning in checked.drafter_warnings:
        logger.warning("DRAFTER: %s", warning)
    recorder = None
    if profile.record.directory is not None:
        recorder = Recorder.opened(
            profile.record, find_model(checked.target, ("*.json",), TargetError, profile.target_revision)
        )
    run(checked.server_args, checked.served, api_key, management=profile.management, recorder=recorder)


def run(
    server_args: ServerArgs,
    served: ServedModel,
    api_key: str | None,
    *,
    management: bool = False,
    recorder: Recorder | None = None,
) -> None:
    """Launch SGLang's server in this process. Returns when it has drained after SIGTERM and no child is left.

    management: open the management routes too, SGLang's and ours (middleware.Guard). recorder: keeps answers, once the
    server is announced.
    """
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils import kill_process_tree

    start = Start(server_args, served, api_key, recorder)
    # Not include_router: SGLang's key check looks no deeper than these routes for one that asks for the admin key.
    http_server.app.routes.extend(auf_router(served, closed_because, recorder).routes)
    add_all(http_server.app, closed_because, start.token, management, None if recorder is None else recorder.settings)
    add_replies(http_server.app)
    end_on_sigterm()  # until SGLang installs its draining handler, SIGTERM unwinds this function: no child is left
    try:
        http_server.launch_server(
            server_args,
            init_tokenizer_manager_func=_init_tokenizer_manager,
            execute_warmup_func=start.prove,
            launch_callback=start.announce,
        )
        asked_to_stop = http_server.get_global_state().tokenizer_manager.gracefully_exit
    except SystemExit as stop:
        if start.failure is not None:
            raise start.failure from None
        if stop.code:
            raise
        # SGLang kills its own process when a child dies; process 1 of a container survives that and gets here.
        raise ServerError("the engine died", "a running engine", "look above for its error") from stop
    except RuntimeError as error:  # how SGLang reports a scheduler that died without a signal
        logger.exception("the launch failed")
        raise ServerError(str(error), "a running engine", "look above for its error") from error
    finally:
        if recorder is not None:
            capture.record_with(None)
            recorder.stop()
        kill_process_tree(os.getpid(), include_parent=False)
    if start.failure is not None:
        raise start.failure
    if not asked_to_stop:
        raise ServerError("the HTTP server stopped by itself", "a running server", "look above for its error")


class Start:
    """From an open port to an announced server. SGLang calls both methods in a thread of its own."""

    def __init__(
        self, server_args: ServerArgs, served: ServedModel, api_key: str | None, recorder: Recorder | None = None
    ) -> None:
        self.served = served
        self.url = server_args.url()
        self.token = secrets.token_hex(16)
        self.api_key = api_key
        self.recorder = recorder
        self.failure: Exception | None = None
        self._since = psutil.Process().create_time()
        self._took: dict[str, float] = {}
        self._lap("imports and checks")

    def _lap(self, part: str) -> None:
        """What passed since the last part, or since the process began, belongs to this one."""
        now = time.time()
        self._took[part], self._since = now - self._since, now

    def prove(self, server_args: ServerArgs) -> bool:
        """Replaces SGLang's warm-up, which does not notice plain decoding. False: the server stops."""
        from sglang.srt.entrypoints.http_server import get_global_state
        from sglang.srt.managers.tokenizer_manager import ServerStatus

        self._lap("engine")
        try:
            Probe(self.url, self.token, self.api_key).run(needs_verify_steps=self.served.speculation is not None)
        except Exception as error:  # of any kind: a server without a passed probe must not stay up
            self.failure = error
            os.kill(os.getpid(), signal.SIGTERM)
            return False
        get_global_state().tokenizer_manager.server_status = ServerStatus.Up
        return True

    def announce(self) -> None:
        speculation = self.served.speculation
        how = (
            f"drafter {speculation.drafter}, block size {speculation.block_size}"
            if speculation
            else "no drafter (plain decoding)"
        )
        if self.recorder is not None:
            self.recorder.start()
            capture.record_with(self.recorder)
            logger.info("RECORDING token ids of answers in %s", self.recorder.directory)
        self._lap("first answers")
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._took.items())
        logger.info("up after %.1f s: %s", sum(self._took.values()), parts)
        why = " (the target's name: no served_model_name is given for it)" if self.served.named_after_target else ""
        target = self.served.target.name
        logger.info("READY %s/v1 serves %s%s: target %s, %s", self.url, self.served.model, why, target, how)
        logger.info("live page: %s/auf", self.url)


def closed_because() -> str | None:
    """Why no tokens are given out right now, or None; SGLang's own state decides."""
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    manager = get_global_state().tokenizer_manager
    if manager.gracefully_exit:
        return "the server is stopping; it finishes what it has begun and takes nothing new"
    if manager.server_status == ServerStatus.Starting:
        return "the server is starting; GET /health answers 200 when it is ready"
    return None


def _init_tokenizer_manager(*arguments: Any, **options: Any) -> Any:
    """Calls SGLang's own, after which the schedulers load, and takes over the signal that reports their death."""
    from sglang.srt.entrypoints.engine import init_tokenizer_manager

    signal.signal(signal.SIGQUIT, _engine_died_while_starting)
    return init_tokenizer_manager(*arguments, **options)


def _engine_died_while_starting(signum: int, frame: FrameType | None) -> NoReturn:
    """SGLang's children report their death by SIGQUIT. SGLang's handler would kill this process without a message."""
    raise ServerError("the engine died while it was starting", "a running engine", "look above for its error")
