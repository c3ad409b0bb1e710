"""The reference kernel: bit for bit grids.decode, rounded once, on every grid, shape and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hf_quant.errors import KernelError
from hf_quant.grids import PER_CHANNEL, Scheme, decode
from hf_quant.kernels import reference, registry
from hf_quant.kernels.registry import LayerSpec
from hf_quant.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = (
    ("int", 4, True, False),
    ("int", 4, False, False),
    ("int", 8, True, False),
    ("int", 8, False, False),
    ("nf4", 4, True, False),
    ("fp4", 4, True, False),
    ("nf4", 4, True, True),
)
MakeTensor = Callable[..., QuantizedTensor]
SpecOf = Callable[[QuantizedTensor, torch.dtype], LayerSpec]
AssertClose = Callable[[torch.Tensor, torch.Tensor], None]
Distance = Callable[[torch.Tensor, torch.Tensor, QuantizedTensor], float]
KERNEL = registry.get("reference")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Scheme, int, int, torch.dtype]:
    """Any grid; groups that divide the row, odd ones included; any row count."""
    grid, bits, symmetric, double_quant = draw(st.sampled_from(GRIDS))
    group = draw(st.sampled_from((1, 3, 16, 32, 64, 96, 128)))
    columns = group * draw(st.integers(1, 4))
    group = draw(st.sampled_from((group, PER_CHANNEL)))
    scheme = Scheme(grid, bits, symmetric, group, double_quant)
    return scheme, draw(st.integers(1, 200)), columns, draw(st.sampled_from(SCALES))


@settings(
    deadline=None, max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=layers(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 16))
def test_weight_is_bit_for_bit_the_definition(
    make_tensor: MakeTensor, case: tuple[Scheme, int, int, torch.dtype], dtype: torch.dtype, seed: int
) -> None:
    scheme, out, columns, scale_dtype = case
    tensor = make_tensor(scheme, out, columns, scale_dtype=scale_dtype, seed=seed)
    spec = LayerSpec(scheme, out, columns, "cpu", dtype)
    before = tensor.packed.clone()
    prepared = KERNEL.prepare(tensor, spec)
    expected = decode(tensor.codes(), tensor.scales(), tensor.zero_point, scheme).to(dtype)
    assert torch.equal(KERNEL.dequantize(prepared, spec, dtype), expected)
    x = torch.randn(3, columns).to(dtype)
    y = KERNEL.linear(x, prepared, spec)
    assert y.dtype == dtype
    # the same weight in the same matmul, but in pieces: only the order of summation may differ
    whole = functional.linear(x, expected)
    typical = float(x.double().norm() * expected.double().norm()) / columns**0.5
    assert float((y - whole).double().norm()) <= 2 * torch.finfo(dtype).eps * typical
    assert prepared.weight is tensor.packed
    assert torch.equal(KERNEL.restore(prepared, spec), before)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_of_many_chunks_is_the_same_weight(
    compiled: bool, make_tensor: MakeTensor, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK", 64 * 96)
    tensor = make_tensor(Scheme(group_size=32), 321, 96)
    spec = spec_of(tensor, torch.float32)
    assert len(reference.row_chunks(spec)) == 6
    prepared, x, bias = KERNEL.prepare(tensor, spec), torch.randn(5, 96), torch.randn(321)
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(KERNEL.dequantize(prepared, spec, torch.float32), tensor.dequantize())
    expected = functional.linear(x, tensor.dequantize(), bias)
    torch.testing.assert_close(KERNEL.linear(x, prepared, spec, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_strides_and_bias(
    dtype: torch.dtype, make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance, assert_close: AssertClose
) -> None:
    tensor = make_tensor(Scheme(bits=8, group_size=32, symmetric=False), 70, 96)
    spec = spec_of(tensor, dtype)
    prepared = KERNEL.prepare(tensor, spec)
    bias = torch.randn(70).to(dtype)
    wide = torch.randn(4, 2, 192).to(dtype)
    for x in (wide[0, 0, :96], wide[0, :, 96:], wide[:, :, ::2], wide[:, :, :96].transpose(0, 1), wide[:0, :, :96]):
        y = KERNEL.linear(x, prepared, spec)
        assert y.shape == (*x.shape[:-1], 70)
        if x.numel():
            assert distance(y.reshape(-1, 70), x.reshape(-1, 96), tensor) < 2
        expected = functional.linear(x, tensor.dequantize(dtype), bias)
        assert_close(KERNEL.linear(x, prepared, spec, bias), expected)


def test_wrong_width_is_an_error_and_not_another_shape(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(group_size=32), 64, 64)
    spec = spec_of(tensor, torch.float32)
    with pytest.raises(KernelError, match="x has 128 columns"):
        KERNEL.linear(torch.randn(2, 128), KERNEL.prepare(tensor, spec), spec)


def test_integer_activations_are_refused() -> None:
    spec = LayerSpec(Scheme(group_size=32), 64, 64, "cpu", torch.int32)
    assert KERNEL.unsupported(spec) == "int32 activations are not floating point"


@pytest.mark.parametrize("scheme", [Scheme(group_size=32), Scheme(bits=8, symmetric=False), Scheme("nf4")])
def test_gradients_reach_x_and_bias_and_keep_no_float_weight(
    scheme: Scheme, make_tensor: MakeTensor, spec_of: SpecOf
) -> None:
    tensor = make_tensor(scheme, 65, 64, scale_dtype=torch.float32)
    spec = spec_of(tensor, torch.float32)
    prepared = KERNEL.prepare(tensor, spec)
    x = torch.randn(2, 3, 64, requires_grad=True)
    bias = torch.randn(65, requires_grad=True)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = KERNEL.linear(x, prepared, spec, bias)
    assert torch.Size((65, 64)) not in saved
    y.square().sum().backward()
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    functional.linear(x2, tensor.dequantize(), bias2).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(bias.grad, bias2.grad)


def test_prepared_in_inference_mode_trains_later(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    reference._pairs.cache_clear()
    tensor = make_tensor(Scheme("nf4", group_size=32), 64, 64)
    spec = spec_of(tensor, torch.float32)
    with torch.inference_mode():
        prepared = KERNEL.prepare(tensor, spec)
        KERNEL.linear(torch.randn(1, 64), prepared, spec)
    x = torch.randn(2, 64, requires_grad=True)
    KERNEL.linear(x, prepared, spec).sum().backward()
    torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(2, 64))


class Layer(torch.nn.Module):
    """The least that a model needs around a kernel."""

    def __init__(self, tensor: QuantizedTensor, spec: LayerSpec) -> None:
        super().__init__()
        self.spec, self.prepared = spec, KERNEL.prepare(tensor, spec)
        self.bias = torch.nn.Parameter(torch.randn(spec.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(KERNEL.linear(x, self.prepared, self.spec, self.bias))


@pytest.mark.parametrize("scheme", [Scheme(group_size=32), Scheme(symmetric=False), Scheme(bits=8), Scheme("fp4")])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(scheme: Scheme, training: bool, make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    torch._dynamo.reset()
    tensor = make_tensor(scheme, 64, 64)
    layer = Layer(tensor, spec_of(tensor, torch.float32))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 3):
        x = torch.randn(rows, 64, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        if training:
            y.sum().backward()
            (expected,) = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(x.grad, expected)
