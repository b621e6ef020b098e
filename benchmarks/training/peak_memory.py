"""Peak memory of one call, as the operating system or the CUDA allocator counts it.

On a CPU: the process's resident high-water mark (reset through /proc/self/clear_refs) minus what was resident before.
Measure in a separate process that is started with ENVIRONMENT: otherwise the C library keeps freed memory, and a call
that reuses it looks smaller than it is. Only the standard library and torch are imported, so that any interpreter can
use this file.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc then maps every larger piece of memory separately, and returns it to the system when it is freed."""

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"


def counted_by(device: str) -> str:
    """What counts the peak, for reports."""
    return "the CUDA allocator's" if device == "cuda" else "resident high-water mark of the process"


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes that `call` needs at its peak beyond what is held before it. On a CPU raises OSError if not on Linux."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = int(torch.cuda.memory_allocated())
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    CLEAR_REFS.write_text(RESET_HIGH_WATER, encoding="ascii")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
