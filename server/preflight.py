"""What is checked before anything loads: the machine, the port, SGLang with its plugins, and both models' files."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from server.profile import Profile
from sglang_auf import ALGORITHM
from sglang_auf.checkpoints.card import CheckedDrafter, check_drafter
from sglang_auf.checkpoints.target_config import is_mrope
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.compat import Seam, check_seams, check_version
from sglang_auf.errors import ConfigError, ServerError, TargetError
from sglang_auf.files import CONFIG, find_model, read_json

_HTTP = "sglang.srt.entrypoints.http_server"
_MANAGER = "sglang.srt.managers.tokenizer_manager"
SEAMS = (
    Seam(
        f"{_HTTP}:launch_server",
        "server.launch",
        (
            "server_args",
            "init_tokenizer_manager_func",
            "run_scheduler_process_func",
            "run_detokenizer_process_func",
            "execute_warmup_func",
            "launch_callback",
        ),
    ),
    Seam(f"{_HTTP}:app", "server.launch"),
    Seam(f"{_HTTP}:app.max_body_size", "server.middleware"),
    Seam(f"{_HTTP}:get_global_state", "server.launch", ()),
    Seam("sglang.srt.entrypoints.engine:init_tokenizer_manager", "server.launch"),
    Seam(f"{_MANAGER}:ServerStatus.Starting", "server.launch"),
    Seam(f"{_MANAGER}:ServerStatus.Up", "server.launch"),
    Seam(f"{_MANAGER}:TokenizerManager.server_status", "server.launch"),
    Seam(f"{_MANAGER}:TokenizerManager.gracefully_exit", "server.launch"),
    Seam(f"{_MANAGER}:TokenizerManager.get_loads", "server.routes", ("self", "include", "dp_rank")),
    Seam("sglang.srt.managers.load_snapshot:LoadSnapshot.timestamp", "server.routes"),
    Seam("sglang.srt.platforms:current_platform.device_type", "server.preflight"),
    Seam("sglang.srt.platforms:current_platform.device_name", "server.preflight"),
    *(
        Seam(f"sglang.srt.environ:envs.{name}", "server.preflight")
        for name in ("SGLANG_RUST_SERVER", "SGLANG_GRPC_PORT")
    ),
    Seam("sglang.srt.plugins:load_plugins", "server.preflight", ()),
    Seam("sglang.srt.arg_groups.overrides:resolved_view", "server.launch", ("server_args",)),
    Seam("sglang.srt.server_args:ServerArgs.resolve_once", "server.arguments", ("self",)),
    Seam("sglang.srt.server_args:ServerArgs.url", "server.launch", ("self", "port")),
    Seam("sglang.srt.speculative.spec_info:SpeculativeAlgorithm.from_string", "server.preflight", ("name",)),
    Seam("sglang.srt.utils:kill_process_tree", "server.launch"),
    Seam("sglang.srt.utils.common:get_device_memory_capacity", "server.plan.device", ("device",)),
    Seam("sglang.srt.utils.auth:AuthLevel.ADMIN_OPTIONAL", "server.routes"),
    Seam("sglang.srt.utils.auth:auth_level", "server.routes", ("level",)),
)


@dataclass(frozen=True, slots=True)
class Speculation:
    """How the drafter is served.

    drafter: its name in the profile. checked: the drafter, found to fit the target. block_size: B as served.
    check: the same check of another drafter, which raises CardError or TargetError. device: "cpu" or "cuda".
    is_mrope: the target's positions have several numbers (target_config.is_mrope).
    weights: SHA-256 of the drafter's weights (weights_sha256), None until they have been read.
    """

    drafter: str
    checked: CheckedDrafter
    block_size: int
    check: Callable[[str], CheckedDrafter]
    device: str
    is_mrope: bool = False
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server serves.

    model: its name for clients. speculation: None when it decodes plainly. named_after_target: the profile gives no
    name, and `model` is the target's.
    """

    model: str
    target: TargetFacts
    speculation: Speculation | None
    named_after_target: bool = False


def check_device(profile: Profile) -> None:
    """Raise ConfigError for a CUDA profile where PyTorch sees no CUDA device."""
    import torch

    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: cuda, and PyTorch sees no CUDA device",
            "a machine with an NVIDIA GPU and its driver",
            "use --profile smollm2-135m here, or fix the driver",
        )


def check_port(host: str, port: int) -> None:
    """Raise ServerError when the port is taken, ConfigError when the address is not one of this machine's.

    SGLang opens its port after the model has loaded. A user should not have to wait that long for this error.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(
            f"host {host!r} ({error})", "a name or address of this machine", "give another --host"
        ) from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the HTTP server does
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                trial.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ServerError(
                        f"port {port} on {host} is in use",
                        "a free port",
                        f"stop what listens there (ss -ltnp 'sport = :{port}' names it) or give another --port",
                    ) from error
                raise ConfigError(
                    f"cannot listen on {host}:{port} ({error.strerror})",
                    "an address of this machine, a port above 1023",
                    "give another --host or --port",
                ) from error


def load_sglang(device: str, needs_algorithm: bool, here: bool = True) -> None:
    """Load SGLang with its plugins, ours among them. device: what the profile serves on, "cpu" or "cuda".
    here: on this machine; else SGLang need not have found the device.

    Raises CompatError for another SGLang, ConfigError for a platform that is not the profile's, and ServerError when
    AUF did not register, which SGLang itself only logs.
    """
    check_version()
    from sglang.srt.environ import envs
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins import load_plugins
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    check_seams(SEAMS)
    for variable in (envs.SGLANG_RUST_SERVER, envs.SGLANG_GRPC_PORT):
        if variable.get():
            raise ConfigError(
                f"{variable.name} is set",
                "SGLang's Python HTTP server alone, which has the routes, the counts and the API key",
                f"unset {variable.name}",
            )
    ours = type(current_platform).__module__.startswith("sglang_auf.")
    if (device == "cpu") != ours or (here and current_platform.device_type != device):
        raise ConfigError(
            f"device: {device}, and SGLang chose its platform {current_platform.device_name!r}",
            "the CPU platform of this plugin" if device == "cpu" else "SGLang's CUDA platform",
            "export SGLANG_PLATFORM=auf_cpu" if device == "cpu" else "unset SGLANG_PLATFORM and SGLANG_USE_CPU_ENGINE",
        )
    load_plugins()
    if not needs_algorithm:
        return
    try:
        SpeculativeAlgorithm.from_string(ALGORITHM)
    except ValueError as error:
        raise ServerError(
            f"SGLang does not know the speculative algorithm {ALGORITHM}: the sglang-auf plugin did not load",
            "the plugin registered (SGLang logs above why it was not)",
            "pip install sglang-auf into this environment (-e . from a checkout); if SGLANG_PLUGINS is set, it must "
            "name the plugin",
        ) from error


def check_models(profile: Profile, target: str, plain: bool) -> ServedModel:
    """Check both models' files without their weights.

    Raises CardError, TargetError or ConfigError.
    """
    directory = find_model(target, ("*.json", "*.jinja"), TargetError, profile.target_revision)
    facts = TargetFacts.of(directory)
    served = ServedModel(profile.served_model_name or facts.name, facts, None, profile.served_model_name is None)
    if plain:
        return served
    if profile.drafter is None:
        raise ConfigError("a profile without a drafter", "a drafter", "--set drafter=PATH, or --plain to serve without")
    check = partial(
        check_drafter,
        target=target,
        target_revision=profile.target_revision,
        block_size=profile.block_size,
        context_length=profile.server_args.get("context_length"),
        thinking=profile.thinking,
    )
    checked = check(profile.drafter, drafter_revision=profile.drafter_revision)
    block_size = profile.block_size or checked.card.block_size
    mrope = is_mrope(read_json(directory / CONFIG, TargetError))
    speculation = Speculation(profile.drafter, checked, block_size, check, profile.device, mrope)
    return replace(served, speculation=speculation)
