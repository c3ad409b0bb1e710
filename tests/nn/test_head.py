"""The float output head: the native product of a few rows against torch's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_quant.kernels import native_decoder
from hf_quant.nn.head import HeadForward
from hf_quant.nn.switching import switch

if native_decoder.unavailable():
    pytest.skip(f"no native code here: {native_decoder.unavailable()}", allow_module_level=True)


def _head(columns: int, out: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    head = nn.Linear(columns, out, bias=bias).to(dtype)
    HeadForward.put(head)
    return head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "out"), [(64, 384), (50, 37), (1, 1), (577, 1000)])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_products(dtype: torch.dtype, columns: int, out: int, rows: int, threads: int) -> None:
    head, before = _head(columns, out, dtype, bias=rows == 3), torch.get_num_threads()
    x = torch.randn(rows, 1, columns).to(dtype)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = head.forward._answer(x)
            assert torch.equal(found, head(x))
    finally:
        torch.set_num_threads(before)
    bias = None if head.bias is None else head.bias.double()
    exact = nn.functional.linear(x.double(), head.weight.double(), bias)
    assert found.dtype == dtype and found.shape == exact.shape
    size = float((x.double().abs() @ head.weight.double().abs().t()).max())
    spacing = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * size + torch.finfo(dtype).tiny
    assert bool(((found.double() - exact).abs() <= spacing * 1.01).all())


def test_calls_for_torch() -> None:
    head = _head(64, 48, torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert head(x).requires_grad
    with torch.no_grad():
        for other in (x.float(), x.repeat(5, 1), x[:0], x[:, :32], x.to("meta")):
            assert head.forward._answer(other) is None
        assert head(x.repeat(5, 1)).shape == (10, 48)
        with pytest.raises(RuntimeError):
            head(x[:, :32])
        with switch(False):
            assert head.forward._answer(x) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert head.forward._answer(x) is None


@torch.no_grad()
def test_views_copies_and_new_weights() -> None:
    head = _head(64, 48, torch.bfloat16)
    x = torch.randn(4, 128, dtype=torch.bfloat16)[:, ::2]
    expected = nn.functional.linear(x, head.weight)
    torch.testing.assert_close(head(x), expected)
    twin, again = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    assert float(head(x).abs().max()) == 0
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(again(x), expected)
    HeadForward.take(head)
    assert "forward" not in head.__dict__
