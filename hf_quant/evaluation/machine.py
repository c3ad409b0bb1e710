"""What a machine gives a model: its read bandwidth, and the memory that a model takes of it at its peak."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_quant.kernels import memory

BANDWIDTH_BYTES = 768 << 20  # much more than any cache
_READS = 5
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_bandwidth() -> float:
    """GB/s of reading memory once with torch's threads (a sum over 768 MB, in huge pages where there are any), best
    of five."""
    block = memory.empty(BANDWIDTH_BYTES // 8, torch.int64).fill_(1)
    times = []
    for _ in range(_READS):
        before = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - before)
    return BANDWIDTH_BYTES / min(times) / 1e9


@dataclass
class Peak:
    """What :func:`peak_growth` found; None where it cannot be told."""

    nbytes: int | None = None


@contextmanager
def peak_growth(device: str) -> Iterator[Peak]:
    """How far memory grows at most while the block runs: the device's, or on a CPU what of this process is resident.

    What the C library keeps of memory that was freed before is given back first, so that it does not hide the growth.
    On systems without ``/proc`` (or where the high-water mark may not be reset) nothing is known of a CPU.
    """
    found = Peak()
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.nbytes = torch.cuda.max_memory_allocated(device) - before
        return
    start = _fresh_mark()
    yield found
    if start is not None:
        found.nbytes = max(0, _status("VmHWM") - start)


def _fresh_mark() -> int | None:
    """Bytes resident now, from where the high-water mark starts again; None where that cannot be had."""
    if not _STATUS.is_file():
        return None
    with suppress(AttributeError, OSError):  # another C library: freed memory stays counted
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")  # Linux: the peak becomes what is resident now
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
