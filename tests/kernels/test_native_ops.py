"""The operators of the native kernel: opcheck, one graph under torch.compile, gradients, several weights at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hf_quant.errors import KernelError
from hf_quant.grids import Scheme
from hf_quant.kernels import native, registry
from hf_quant.kernels.native import NativePrepared
from hf_quant.kernels.registry import LayerSpec
from hf_quant.nn.linear import QuantLinear
from hf_quant.tensor import QuantizedTensor

MakeTensor = Callable[..., QuantizedTensor]
SpecOf = Callable[[QuantizedTensor, torch.dtype], LayerSpec]
KERNEL = registry.get("native")
WHY_NOT = KERNEL.unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SCHEMES = [Scheme(), Scheme(bits=8, symmetric=False), Scheme("nf4", group_size=64)]
COLUMNS = 64
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def operands(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    out, columns = tensor.shape
    spec = LayerSpec(tensor.scheme, out, columns, "cpu", dtype)
    prepared = KERNEL.prepare(tensor, spec)
    extras, scheme = prepared.extras, tensor.scheme
    return (
        prepared.weight,
        extras["scale"],
        extras.get("zero_point"),
        scheme.grid,
        scheme.bits,
        out,
        columns,
        spec.group,
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@schemes
@pytest.mark.parametrize("trains", [False, True])
def test_opcheck(scheme: Scheme, trains: bool, make_tensor: MakeTensor) -> None:
    weight = operands(make_tensor(scheme, 24, COLUMNS, scale_dtype=torch.float32))
    x, bias = torch.randn(2, 3, COLUMNS, requires_grad=trains), torch.randn(24, requires_grad=trains)
    ops = torch.ops.hf_quant
    torch.library.opcheck(ops.linear, (x, *weight, bias, 0))
    codes, scale, zero, grid, bits, out, _, group = weight
    several = (
        [codes] * 2,
        [scale] * 2,
        [torch.empty(0) if zero is None else zero] * 2,
        [bias, torch.empty(0)],
        [grid] * 2,
        [bits] * 2,
        [out] * 2,
        [group] * 2,
    )
    torch.library.opcheck(ops.linears, (x, *several, 0))
    if not trains:
        torch.library.opcheck(ops.linear_inference, (x, *weight, bias, 0))
        torch.library.opcheck(ops.linear, (x.transpose(0, 1), *weight, None, 1))
        torch.library.opcheck(ops.dequantize, (*weight, torch.bfloat16))
        torch.library.opcheck(ops.gather_rows, (torch.tensor([[0, 23], [5, 5]]), *weight, torch.float16))


@schemes
def test_weights_that_share_an_input_give_what_each_gives(
    scheme: Scheme, make_tensor: MakeTensor, spec_of: SpecOf
) -> None:
    tensors = [make_tensor(scheme, out, COLUMNS, seed=out) for out in (16, 40, 7)]
    specs = [spec_of(tensor, torch.bfloat16) for tensor in tensors]
    prepared = [KERNEL.prepare(tensor, spec) for tensor, spec in zip(tensors, specs, strict=True)]
    assert all(isinstance(each, NativePrepared) for each in prepared)
    biases = [torch.randn(16).to(torch.bfloat16), None, torch.randn(7).to(torch.bfloat16)]
    for shape in ((1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)):
        x = torch.randn(shape).to(torch.bfloat16)
        together = native.linears(x, prepared, specs, biases)
        alone = [KERNEL.linear(x, *rest) for rest in zip(prepared, specs, biases, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    with pytest.raises(KernelError, match="x has 8 columns"):
        native.linears(torch.randn(1, 8), prepared, specs, biases)


def test_gradients_of_weights_that_share_an_input(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensors = [make_tensor(Scheme(symmetric=False), 16, COLUMNS), make_tensor(Scheme(bits=8), 8, COLUMNS)]
    specs = [spec_of(tensor, torch.float32) for tensor in tensors]
    prepared = [KERNEL.prepare(tensor, spec) for tensor, spec in zip(tensors, specs, strict=True)]
    bias, x = torch.randn(8, requires_grad=True), torch.randn(3, COLUMNS, requires_grad=True)
    one, two = native.linears(x, prepared, specs, [None, bias])
    (one.sum() + 2 * two.sum()).backward()
    expected = tensors[0].dequantize().sum(0) + 2 * tensors[1].dequantize().sum(0)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, expected.expand(3, COLUMNS))
    torch.testing.assert_close(bias.grad, torch.full((8,), 6.0))


def block(make_tensor: MakeTensor, scheme: Scheme, activations: str = "float") -> nn.Module:
    def layer(out: int, columns: int) -> QuantLinear:
        tensor = make_tensor(scheme, out, columns)
        return QuantLinear.from_quantized(tensor, torch.randn(out), kernel="native", activations=activations)

    model = nn.Sequential(layer(128, COLUMNS), nn.SiLU(), layer(40, 128))
    for module in model:
        if isinstance(module, QuantLinear):
            module.prepare(torch.float32)
    return model


@schemes
@pytest.mark.parametrize("training", [False, True])
def test_layers_compile_as_one_graph(scheme: Scheme, training: bool, make_tensor: MakeTensor) -> None:
    model = block(make_tensor, scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (1, 5, 9):
        x = torch.randn(rows, COLUMNS, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        torch.testing.assert_close(y, model(x))
        if training:
            y.sum().backward()
            (expected,) = torch.autograd.grad(model(x).sum(), x)
            torch.testing.assert_close(x.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_layers_compile_with_inductor(activations: str, make_tensor: MakeTensor) -> None:
    model = block(make_tensor, Scheme(), activations)
    x = torch.randn(1, 3, COLUMNS)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_export_and_fake_tensors_meet_the_operator(make_tensor: MakeTensor) -> None:
    model = block(make_tensor, Scheme())
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
    calls = [node for node in exported.graph.nodes if "hf_quant.linear" in str(node.target)]
    assert len(calls) == 2
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("grid", ["int", "nf4"])
def test_rows_of_a_table_are_gathered(grid: str, make_tensor: MakeTensor) -> None:
    tensor = make_tensor(Scheme(grid, group_size=32), 50, COLUMNS)
    weight = operands(tensor)
    ids = torch.tensor([[3, 49], [0, 3], [17, 16]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.ops.hf_quant.gather_rows(ids, *weight, dtype)
        assert torch.equal(rows, tensor.dequantize(dtype)[ids])
    assert torch.ops.hf_quant.gather_rows(ids[:0], *weight, torch.float32).shape == (0, 2, COLUMNS)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="the table has 50 rows"):
            torch.ops.hf_quant.gather_rows(torch.tensor([wrong]), *weight, torch.float32)
