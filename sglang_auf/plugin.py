"""The two functions SGLang calls through entry points. Imports nothing heavy: they run in every process."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

ALGORITHM = "AUF"
PLATFORM = "auf_cpu"


def cpu_platform() -> str | None:
    """Entry point `sglang.srt.platforms: auf_cpu`. The platform's class path, or None on a machine with an accelerator.

    SGLANG_PLATFORM=auf_cpu forces it, any other value keeps SGLang from asking; so does SGLANG_USE_CPU_ENGINE=1, which
    asks for SGLang's own CPU mode.
    """
    from sglang_auf.compat import check_version

    check_version()
    forced = os.environ.get("SGLANG_PLATFORM") == PLATFORM
    if not forced and (_has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"):
        return None
    return "sglang_auf.cpu.platform.AufCpuPlatform"


def _has_accelerator() -> bool:
    import torch

    # Covers CUDA, ROCm, XPU, MPS, MTIA and private-use devices (NPU, MUSA) whose package is imported.
    return bool(torch.cuda.is_available() or torch.accelerator.is_available())


def register() -> None:
    """Entry point `sglang.srt.plugins: auf`, once per process. Registers the algorithm, the sampler, tau in replies.

    SGLang logs what a plugin raises and goes on without it; then "AUF" is an unknown algorithm and the server does not
    start. The log line must say why.
    """
    from sglang_auf import compat
    from sglang_auf.errors import AufError

    try:
        compat.check_version()
        compat.check_seams(compat.REGISTRATION_SEAMS)
        _register()
    except AufError as error:
        logger.error("sglang_auf cannot be used: %s", error)
        raise


def _register() -> None:
    from sglang.srt.platforms import current_platform
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_auf.hooks import metrics, redaction, replies, spans, validation
    from sglang_auf.speculative import sampler_backend
    from sglang_auf.speculative.algorithm import AufSpecAlgo, create_worker

    redaction.install()
    replies.install()
    validation.install()
    sampler_backend.install()
    spans.install()
    metrics.install()
    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=AufSpecAlgo)(create_worker)
    if current_platform.is_out_of_tree() and type(current_platform).__module__ == "sglang_auf.cpu.platform":
        from sglang_auf.cpu import platform

        platform.register()
