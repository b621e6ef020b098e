"""The two functions SGLang calls through entry points, and the list of all hooks.

Imports nothing heavy: both functions run in every process of SGLang.
"""

from __future__ import annotations

import logging
import os

from sglang_auf import ALGORITHM, PLATFORM, SAMPLER_NAME
from sglang_auf.compat import Seam, check_seams, check_version
from sglang_auf.env import PLANNED_DEVICE
from sglang_auf.errors import AufError
from sglang_auf.hooks import (
    aborts,
    intake,
    metrics,
    ranges,
    redaction,
    registry,
    replies,
    seeds,
    spans,
    stops,
    validation,
)
from sglang_auf.recording import capture

logger = logging.getLogger(__name__)

# All hooks, in the order in which they are installed; those of speculative/algorithm.py and speculative/swap.py follow,
# and on the CPU platform those of cpu/platform.py. Where several are on one function, the one installed last is the
# outermost: it runs first, as AFTER last. What changes a request or its answer is `on_ours`, or asks `serves_auf`:
# other servers are left alone.
HOOKS = (
    *redaction.HOOKS,  # keys stay out of logs and /server_info
    *replies.HOOKS,  # tau in every OpenAI reply
    # handle_request: validation is outside replies, so that a refused request never begins a reply.
    *validation.HOOKS,  # what speculation cannot honour is refused
    *ranges.HOOKS,  # numbers out of range end no scheduler
    *intake.HOOKS,  # fields of wrong types and shapes end no scheduler, and are the client's fault
    *aborts.HOOKS,  # the end of a request ends no other one, no later one with its grammar, and no engine
    *stops.HOOKS,  # a stop inside a verify step ends an answer where plain decoding would end it
    *seeds.HOOKS,  # the choices of a seeded request differ
    # handle_request: spans is outside validation, and a refused request has no choices whose tokens it could mark.
    # _send_one_request: spans notes the choice before seeds changes its seed; neither reads what the other writes.
    *spans.HOOKS,  # which tokens of a stream were drafted
    # _handle_batch_output: metrics counts before spans reads; neither changes the batch.
    *metrics.HOOKS,  # totals of acceptance, and Prometheus counters
    *capture.HOOKS,  # answers kept for training, where the server records
)

SEAMS = (
    Seam(
        "sglang.srt.speculative.spec_info:SpeculativeAlgorithm.register",
        "plugin",
        ("name", "supports_overlap", "validate_server_args", "spec_class"),
    ),
)


def cpu_platform() -> str | None:
    """Entry point `sglang.srt.platforms: auf_cpu`. The platform's class path, or None on a machine with an accelerator.

    SGLANG_PLATFORM=auf_cpu forces it, any other value keeps SGLang from asking. SGLANG_USE_CPU_ENGINE=1 asks for
    SGLang's own CPU mode, so the answer is None too.
    """
    check_version()
    forced = os.environ.get("SGLANG_PLATFORM") == PLATFORM
    if not forced and (_has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"):
        return None
    return "sglang_auf.cpu.platform.AufCpuPlatform"


def _has_accelerator() -> bool:
    """Or is to be taken for a machine that has one."""
    import torch

    # Covers CUDA, ROCm, XPU, MPS, MTIA and private-use devices (NPU, MUSA) whose package is imported.
    return PLANNED_DEVICE in os.environ or bool(torch.cuda.is_available() or torch.accelerator.is_available())


def register() -> None:
    """Entry point `sglang.srt.plugins: auf`, once per process. Checks SGLang, then registers all that is ours with it.

    SGLang logs what a plugin raises and goes on without it; then "AUF" is an unknown algorithm and the server does not
    start. The log line must say why.
    """
    try:
        check_version()
        check_seams(seams())
        _register()
    except AufError as error:
        logger.error("sglang_auf cannot be used: %s", error)
        raise


def seams() -> tuple[Seam, ...]:
    """The SGLang names that every process relies on: all but the worker's and the CPU platform's.

    They belong to modules that SGLang or our hooks import in every process, so checking them costs nothing.
    """
    from sglang_auf.speculative import seams as speculative

    return (
        *SEAMS,
        *registry.SEAMS,
        *replies.SEAMS,
        *validation.SEAMS,
        *ranges.SEAMS,
        *intake.SEAMS,
        *aborts.SEAMS,
        *stops.SEAMS,
        *seeds.SEAMS,
        *spans.SEAMS,
        *metrics.SEAMS,
        *capture.SEAMS,
        *(hook.seam for hook in HOOKS),
        *speculative.SEAMS,
    )


def all_seams() -> tuple[Seam, ...]:
    """Every SGLang name that is relied on."""
    from sglang_auf.cpu import seams as cpu
    from sglang_auf.speculative import seams as speculative

    return (*seams(), *aborts.SCHEDULER_SEAMS, *cpu.SEAMS, *speculative.WORKER_SEAMS, *speculative.TREE_SEAMS)


def _register() -> None:
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_auf.speculative import algorithm, swap
    from sglang_auf.speculative.sampler_backend import create_sampler

    replies.widen_models()
    registry.install(HOOKS)
    swap.register()
    registry.install((*algorithm.HOOKS, *swap.HOOKS))
    register_sampler_backend(SAMPLER_NAME, create_sampler)
    # SGLang rewrites some arguments (--speculative-adaptive) between this check and AufSpecAlgo.handle_server_args.
    SpeculativeAlgorithm.register(
        ALGORITHM,
        supports_overlap=True,
        validate_server_args=algorithm.refuse_unsupported,
        spec_class=algorithm.AufSpecAlgo,
    )(algorithm.create_worker)
    if registry.on_cpu_platform():
        from sglang_auf.cpu import seams as cpu

        check_seams(cpu.SEAMS)  # before the import that would fail without a word about what moved
        from sglang_auf.cpu import platform

        platform.register()
        registry.install(platform.HOOKS)
