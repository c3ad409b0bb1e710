"""Memory for prepared weights in huge pages, where Linux grants them.

A generated token reads every weight once. With pages of 4 kB each of them needs an address translation that no cache
of the CPU holds any more, and in a virtual machine two of them nested; with pages of 2 MB there are 512 times fewer.
Weights smaller than a page share one, so they are cut from larger blocks.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict, deque

import torch

PAGE = 2 << 20  # bytes of a huge page on x86-64 and on ARM with 4 kB pages
BLOCK = 64 << 20  # bytes of address space that are reserved at a time; memory is taken page by page as it is used
LEAST = 32 << 10  # smaller tensors are left to torch
_ALIGNMENT = 128


class _Block:
    """One mapping; tensors hold it, and it goes with the last of them."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.map)
        base = torch.frombuffer(self.view, dtype=torch.uint8).data_ptr()
        self.used = -base % PAGE
        self.end = self.used + size
        self.returned: deque[tuple[int, int]] = deque()  # (bytes, offset); appended by whichever thread drops a tensor
        self.free: dict[int, list[int]] = defaultdict(list)
        self.map.madvise(mmap.MADV_HUGEPAGE)

    def take(self, size: int) -> torch.Tensor | None:
        """uint8 ``[size]``, from what tensors of this size left behind or from the end; None when there is no room."""
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        while self.returned:
            left, offset = self.returned.popleft()
            self.free[left].append(offset)
        if self.free[rounded]:
            offset = self.free[rounded].pop()
        elif self.used + rounded <= self.end:
            offset = self.used
            self.used += rounded
        else:
            return None
        part = self.view[offset : offset + size]
        # the storage of the tensor holds `part`, and `part` this block
        weakref.finalize(part, _give_back, self, rounded, offset).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8)


def _give_back(block: _Block, size: int, offset: int) -> None:
    block.returned.append((size, offset))


_blocks: weakref.WeakSet[_Block] = weakref.WeakSet()
_lock = threading.Lock()


def available() -> bool:
    """Whether this system has huge pages to ask for."""
    return hasattr(mmap, "MADV_HUGEPAGE")


def empty(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """An uninitialised CPU tensor ``[size]`` that is meant to be kept and read often; torch's own memory if need be.

    What dropped tensors of the same size left behind is used again, as when a layer changes its layout and back.
    """
    wanted = size * dtype.itemsize
    if wanted < LEAST or not available():
        return torch.empty(size, dtype=dtype, device="cpu")
    with _lock:
        for block in tuple(_blocks):
            found = block.take(wanted)
            if found is not None:
                return found.view(dtype)
        block = _Block(max(BLOCK, -(-wanted // PAGE) * PAGE))
        _blocks.add(block)
        found = block.take(wanted)
    assert found is not None
    return found.view(dtype)


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a CPU tensor in such memory."""
    return empty(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
