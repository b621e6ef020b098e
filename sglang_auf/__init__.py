"""SGLang plugin that serves any target losslessly with an AUF-trained block drafter (arXiv 2607.01893)."""

__version__ = "0.1.0"

ALGORITHM = "AUF"
"""Our value of SGLang's --speculative-algorithm."""

SAMPLER_NAME = "auf"
"""Our value of SGLang's --sampling-backend."""

PLATFORM = "auf_cpu"
"""Our CPU platform: the value of SGLANG_PLATFORM, and the name of its attention backend and operators in SGLang."""
