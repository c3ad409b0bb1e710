"""Memory in huge pages: tensors that do not overlap, reuse, and what happens to the memory of dropped ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch

from hf_quant.kernels import memory

pytestmark = pytest.mark.skipif(not memory.available(), reason="no huge pages on this system")


def flags(address: int) -> list[str]:
    """What the kernel was told of the mapping that holds an address, in its own abbreviations."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return rest
    return []


def test_tensors_do_not_overlap() -> None:
    sizes = [memory.LEAST + 13 * i for i in range(40)]
    tensors = [memory.empty(size).fill_(i) for i, size in enumerate(sizes)]
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,) and tensor.data_ptr() % 64 == 0
        assert int(tensor.min()) == int(tensor.max()) == i


def test_one_larger_than_a_block() -> None:
    tensor = memory.empty(memory.BLOCK + 5)
    tensor[0], tensor[-1] = 1, 2
    assert tensor.numel() == memory.BLOCK + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.uint8])
def test_a_copy_keeps_values_and_dtype(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (3, 5, 16_000)).to(dtype)
    found = memory.kept(tensor)
    assert found.dtype == dtype and torch.equal(found, tensor)
    small = memory.kept(tensor[:, :, :3].contiguous())
    assert torch.equal(small, tensor[:, :, :3])


def test_a_dropped_tensor_is_replaced_at_its_place() -> None:
    keeper = memory.empty(777_777)  # keeps the block
    tensor = memory.empty(555_555)
    address = tensor.data_ptr()
    part = tensor[100:200]
    del tensor
    gc.collect()
    other = memory.empty(555_555)
    assert other.data_ptr() != address, "a view was still there"
    del part
    gc.collect()
    assert memory.empty(555_555).data_ptr() == address
    assert keeper.numel() == 777_777


def test_memory_goes_with_the_last_tensor() -> None:
    tensor = memory.empty(memory.BLOCK + 1)  # a block of its own
    blocks = [weakref.ref(block) for block in memory._blocks if block.end - block.used < memory.PAGE]
    block = next(ref for ref in blocks if ref() is not None)
    size = block().end if block() is not None else 0  # type: ignore[union-attr]
    assert size > memory.BLOCK
    del tensor
    gc.collect()
    assert block() is None


def test_huge_pages_are_asked_for() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages")
    assert "hg" in flags(memory.empty(16 << 20).fill_(1).data_ptr())


def test_copies_are_independent() -> None:
    tensor = memory.empty(100_000).fill_(3)
    deep, pickled = copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))
    tensor.fill_(4)
    assert int(deep.max()) == int(pickled.max()) == 3
    assert len(pickle.dumps(tensor)) < 110_000, "the whole block was written"
