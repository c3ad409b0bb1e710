"""QuantLinear: the same weight through every copy, move and store, whatever layout a kernel has put it in."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.errors import ConfigError, FormatError
from hf_quant.grids import Scheme
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import put_empty, put_float, put_quantized, quantized_modules
from hf_quant.quantize.weight import quantize_weight

SCHEMES = [
    Scheme(),
    Scheme(symmetric=False, group_size=64),
    Scheme(bits=8, group_size=-1),
    Scheme(bits=8, symmetric=False),
    Scheme("nf4", group_size=64, double_quant=True),
    Scheme("fp4", group_size=32),
]
ROWS, COLUMNS = 96, 128


def _same(one: QuantLinear, other: QuantLinear) -> bool:
    pairs = zip(one.quantized().tensors(), other.quantized().tensors(), strict=True)
    return one.scheme == other.scheme and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture(params=["auto", "reference"])
def kernel(request) -> str:
    return request.param


@pytest.fixture(params=SCHEMES, ids=lambda scheme: scheme.label)
def layer(request, kernel) -> QuantLinear:
    tensor = quantize_weight(torch.randn(ROWS, COLUMNS), request.param, "absmax")
    return QuantLinear.from_quantized(tensor, nn.Parameter(torch.randn(ROWS)), kernel)


def _forward(layer: QuantLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layer(torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).to(dtype)).detach()


def test_it_computes_what_its_weight_says(layer) -> None:
    x = torch.randn(2, 5, COLUMNS)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1), rtol=1e-4, atol=1e-4)
    assert layer(x[:0]).shape == (0, 5, ROWS)


def test_copies_hold_the_same_weight(layer) -> None:
    before = copy.deepcopy(layer)
    expected = _forward(layer)
    assert layer.kernel_name is not None and layer.kernel_reason
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (before, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.kernel_name is None, "a layout was copied without its kernel"
        assert _same(other, layer)
        assert torch.equal(_forward(other), expected)
    assert torch.equal(_forward(layer), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_restores_the_weight(layer, assign) -> None:
    expected = _forward(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear.from_quantized(
        quantize_weight(torch.randn(ROWS, COLUMNS), layer.scheme, "absmax"), torch.zeros(ROWS), layer.kernel_request
    )
    _forward(other)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert _same(other, layer)
    assert torch.equal(_forward(other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_for_activations_and_bias(layer, dtype) -> None:
    _forward(layer)
    other = copy.deepcopy(layer).to(dtype)
    assert other.bias.dtype == dtype
    assert _same(other, layer), "stored scales changed"
    result = _forward(other, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), _forward(layer), rtol=2e-2, atol=0.2)


def test_it_moves_to_meta_and_is_filled_again(layer) -> None:
    _forward(layer)
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight.device.type == "meta"
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(_forward(filled), _forward(layer))


def test_gradients_reach_the_input_and_the_bias_only(layer) -> None:
    x = torch.randn(4, COLUMNS, requires_grad=True)
    layer(x).square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    nn.functional.linear(reference, layer.dequantize(), layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-2)
    assert layer.bias.grad is not None
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_threads_may_make_the_first_call_and_ask_for_other_dtypes(layer) -> None:
    expected = {dtype: _forward(copy.deepcopy(layer), dtype) for dtype in (torch.float32, torch.bfloat16)}
    failures: list[object] = []
    start = threading.Barrier(6)

    def work(dtype: torch.dtype) -> None:
        start.wait()
        try:
            if not all(torch.equal(_forward(layer, dtype), expected[dtype]) for _ in range(10)):
                failures.append(dtype)
        except Exception as error:  # reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in [*expected] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_tensor_of_another_layer_is_refused(layer) -> None:
    other = Scheme(group_size=16)
    with pytest.raises(FormatError, match="does not fit"):
        layer.assign(quantize_weight(torch.randn(ROWS, COLUMNS), other, "absmax"))
    with pytest.raises(FormatError, match="does not fit"):
        layer.assign(quantize_weight(torch.randn(8, COLUMNS), layer.scheme, "absmax"))


def test_a_new_weight_replaces_the_prepared_one(layer) -> None:
    _forward(layer)
    tensor = quantize_weight(torch.randn(ROWS, COLUMNS), layer.scheme, "absmax")
    layer.assign(tensor)
    fresh = QuantLinear.from_quantized(tensor, layer.bias, layer.kernel_request)
    assert torch.equal(_forward(layer), _forward(fresh))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fast' is not a kernel"):
        QuantLinear(32, 8, Scheme(), kernel="fast")


@pytest.mark.parametrize("bias", [True, False])
def test_swapping_there_and_back(bias) -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, 32, bias=bias), Conv1D(COLUMNS, 32))
    shapes = [(m.weight.shape, type(m)) for m in model]
    originals = [model[0].weight.detach().clone(), model[1].weight.detach().t().clone()]
    for name, weight in zip("01", originals, strict=True):
        put_quantized(model, name, quantize_weight(weight.contiguous(), Scheme(bits=8), "absmax"), "auto")
    assert [name for name, _ in quantized_modules(model)] == ["0", "1"]
    assert (model[0].bias is not None) is bias
    expected = model(torch.ones(1, COLUMNS))
    put_float(model, torch.float32)
    assert [(m.weight.shape, type(m)) for m in model] == shapes
    torch.testing.assert_close(model[0].weight, originals[0], atol=0.01, rtol=0)
    torch.testing.assert_close(model(torch.ones(1, COLUMNS)), expected)


def test_empty_layers_are_on_meta_and_keep_the_bias_dtype() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, 32, dtype=torch.bfloat16))
    put_empty(model, {"0": Scheme("nf4", group_size=64, double_quant=True)}, torch.bfloat16, "auto")
    layer = model[0]
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.uint8
    assert "nf4 g64 dq" in repr(layer)
