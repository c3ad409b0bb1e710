"""The cpu kernel: as close to float64 as rounding allows, exact in its layouts, and out of the way where it loses."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hf_quant.errors import KernelError
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.kernels import cpu, int4pack, registry
from hf_quant.kernels.cpu import CpuKernel
from hf_quant.kernels.registry import LayerSpec
from hf_quant.tensor import QuantizedTensor

MakeTensor = Callable[..., QuantizedTensor]
SpecOf = Callable[[QuantizedTensor, torch.dtype], LayerSpec]
AssertClose = Callable[[torch.Tensor, torch.Tensor], None]
Distance = Callable[[torch.Tensor, torch.Tensor, QuantizedTensor], float]
KERNEL = registry.get("cpu")
assert isinstance(KERNEL, CpuKernel)
BF16 = torch.bfloat16
INTS = [Scheme(bits=bits, symmetric=symmetric) for bits in (4, 8) for symmetric in (True, False)]
PER_ROW = Scheme(bits=8, group_size=PER_CHANNEL)
needs_op = pytest.mark.skipif(KERNEL._block is None, reason="torch's int4 op is not vectorized on this processor")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Scheme, int, int]:
    """Int grids in shapes that the ops take and in shapes that they refuse."""
    group = draw(st.sampled_from((8, 16, 32, 33, 64, 96, 128)))
    columns = group * draw(st.integers(1, 6))
    scheme = Scheme(
        bits=draw(st.sampled_from((4, 8))),
        symmetric=draw(st.booleans()),
        group_size=draw(st.sampled_from((group, PER_CHANNEL))),
    )
    return scheme, draw(st.sampled_from((1, 48, 64, 65, 128, 192, 320))), columns


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=layers(),
    rows=st.sampled_from((1, 2, 5, 16, 17, 24, 25, 64, 65, 80)),
    dtype=st.sampled_from((BF16, BF16, torch.float16)),
    scale_dtype=st.sampled_from((BF16, torch.float16, torch.float32)),
    seed=st.integers(0, 1 << 16),
)
def test_close_to_float64_and_exact_in_its_layout(
    make_tensor: MakeTensor,
    distance: Distance,
    case: tuple[Scheme, int, int],
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    scheme, out, columns = case
    spec = LayerSpec(scheme, out, columns, "cpu", dtype)
    if KERNEL.unsupported(spec) is not None:
        assert registry.refusal(KERNEL, spec) is not None
        return
    tensor = make_tensor(scheme, out, columns, scale_dtype=scale_dtype, seed=seed)
    before = tensor.packed.clone()
    prepared = KERNEL.prepare(tensor, spec)
    assert prepared.weight.shape == before.shape
    assert prepared.weight.dtype == torch.uint8
    assert torch.equal(tensor.packed, before)
    assert torch.equal(KERNEL.restore(prepared, spec), before)
    for target in (dtype, torch.float32):
        assert torch.equal(KERNEL.dequantize(prepared, spec, target), tensor.dequantize(target))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = KERNEL.linear(x, prepared, spec)
    assert y.dtype == dtype
    assert y.shape == (rows, out)
    assert distance(y, x, tensor) < 2


@needs_op
@pytest.mark.parametrize("scheme", [*INTS, PER_ROW])
def test_op_and_dequantized_product_agree_on_either_side_of_the_limit(
    scheme: Scheme, make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = make_tensor(scheme, 128, 256)
    spec = spec_of(tensor, BF16)
    prepared, x = KERNEL.prepare(tensor, spec), torch.randn(7, 256).to(BF16)
    results = []
    for limit in (0, 100):
        for name in ("INT4_ROWS", "INT8_ROWS", "NIBBLES_ROWS"):
            monkeypatch.setattr(cpu, name, limit)
        results.append(KERNEL.linear(x, prepared, spec))
        assert distance(results[-1], x, tensor) < 1
    assert not torch.equal(*results), "both calls took the same way"


@needs_op
def test_zero_points_cost_no_more_than_rounding_the_weight(spec_of: SpecOf) -> None:
    """Zero points far from the middle, activations of one sign: what rounding takes from the zeros would add up."""
    torch.manual_seed(0)
    out, columns, group = 256, 1024, 128
    zero = torch.tensor([3, 5, 11, 13], dtype=torch.uint8)[torch.randint(0, 4, (out, columns // group))]
    codes = zero.repeat_interleave(group, 1) + torch.randint(0, 5, (out, columns), dtype=torch.uint8) - 2
    scale = (torch.rand(out, columns // group) + 0.5).to(BF16)
    tensor = QuantizedTensor.from_codes(codes, scale, zero, Scheme(symmetric=False, group_size=group))
    spec = spec_of(tensor, BF16)
    prepared, x = KERNEL.prepare(tensor, spec), torch.rand(4, columns).to(BF16)
    exact = x.double() @ tensor.dequantize().double().t()

    def error(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    reference = error(functional.linear(x, tensor.dequantize(BF16)))
    bare = {name: extra for name, extra in prepared.extras.items() if name != "zero_error"}
    assert error(KERNEL.linear(x, prepared, spec)) < 1.5 * reference
    assert error(KERNEL.linear(x, registry.Prepared(prepared.weight, bare), spec)) > 5 * reference


@needs_op
def test_zero_points_near_the_middle_need_no_correction(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(symmetric=False), 64, 64)
    assert tensor.zero_point is not None
    tensor.zero_point.clamp_(6, 10)
    assert "zero_error" not in KERNEL.prepare(tensor, spec_of(tensor, BF16)).extras


@needs_op
@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (LayerSpec(Scheme(), 112, 64, "cpu", BF16), "output features in blocks of"),
        (LayerSpec(Scheme(group_size=16), 64, 64, "cpu", BF16), "groups that are a multiple of 32, not 16"),
        (LayerSpec(Scheme(group_size=PER_CHANNEL), 64, 48, "cpu", BF16), "a multiple of 32, not 48"),
        (LayerSpec(Scheme(group_size=48), 64, 64, "cpu", BF16), "groups of 48 do not divide"),
        (LayerSpec(Scheme(), 64, 64, "cpu", torch.float32), "slower than a dequantized matmul"),
        (LayerSpec(Scheme(), 64, 64, "cuda", BF16), "runs on cpu, not on cuda"),
    ],
)
def test_refusals_name_the_reason(spec: LayerSpec, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KERNEL, "_widened", ())
    reason = KERNEL.unsupported(spec)
    assert reason is not None
    assert why in reason
    with pytest.raises(KernelError, match="kernel=cpu cannot run") as error:
        registry.select(spec, "cpu")
    assert reason in str(error.value)


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_table_grids_only_where_half_precision_is_not_native(
    grid: str, make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = make_tensor(Scheme(grid, group_size=64), 96, 192, scale_dtype=torch.float32)
    spec = spec_of(tensor, BF16)
    monkeypatch.setattr(KERNEL, "_widened", ())
    assert KERNEL.unsupported(spec) == f"torch has no op for {grid}"
    monkeypatch.setattr(KERNEL, "_widened", (BF16,))
    assert KERNEL.unsupported(spec) is None
    assert KERNEL.describe(spec) == "dequantized float32 matmul"
    prepared, x = KERNEL.prepare(tensor, spec), torch.randn(5, 192).to(BF16)
    assert prepared.weight is tensor.packed
    assert torch.equal(KERNEL.restore(prepared, spec), tensor.packed)
    assert distance(KERNEL.linear(x, prepared, spec), x, tensor) < 1


@needs_op
@pytest.mark.parametrize("scheme", [*INTS, PER_ROW])
def test_widened_product_for_many_rows(
    scheme: Scheme,
    make_tensor: MakeTensor,
    spec_of: SpecOf,
    distance: Distance,
    assert_close: AssertClose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KERNEL, "_widened", (BF16,))
    tensor = make_tensor(scheme, 192, 128)
    spec = spec_of(tensor, BF16)
    assert "dequantized float32 matmul above" in KERNEL.describe(spec)
    prepared, x, bias = KERNEL.prepare(tensor, spec), torch.randn(70, 128).to(BF16), torch.randn(192).to(BF16)
    y = KERNEL.linear(x, prepared, spec)
    assert y.dtype == BF16
    assert distance(y, x, tensor) < 0.5
    assert_close(KERNEL.linear(x, prepared, spec, bias), y + bias)


@needs_op
@pytest.mark.parametrize("scheme", [*INTS, PER_ROW])
def test_leading_dimensions_strides_bias_and_no_rows(
    scheme: Scheme, make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance, assert_close: AssertClose
) -> None:
    tensor = make_tensor(scheme, 128, 96 if scheme.group_size == 32 else 80)
    spec = spec_of(tensor, BF16)
    columns, prepared, bias = spec.in_features, KERNEL.prepare(tensor, spec), torch.randn(128).to(BF16)
    wide = torch.randn(40, 2, 2 * columns).to(BF16)
    views = [
        wide[0, 0, :columns],
        wide[0, 0, 1 : columns + 1],  # one row, contiguous, at an address that no vector load takes
        wide[0, :, columns:],
        wide[:3, :, ::2],
        wide[:3, :, :columns].transpose(0, 1),
        wide[:, :, :columns],
        wide[:0, :, :columns],
    ]
    for x in views:
        y = KERNEL.linear(x, prepared, spec)
        assert y.shape == (*x.shape[:-1], 128)
        if x.numel():
            assert distance(y.reshape(-1, 128), x.reshape(-1, columns), tensor) < 1
        assert_close(KERNEL.linear(x, prepared, spec, bias), y + bias)


@needs_op
def test_weight_at_an_odd_address_does_not_crash(make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance) -> None:
    tensor = make_tensor(PER_ROW, 64, 64)
    spec = spec_of(tensor, BF16)
    prepared = KERNEL.prepare(tensor, spec)
    memory = torch.empty(64 * 64 + 1, dtype=torch.uint8)
    moved = memory[1:].view(64, 64).copy_(prepared.weight)
    x = torch.randn(3, 64).to(BF16)
    assert distance(KERNEL.linear(x, registry.Prepared(moved, prepared.extras), spec), x, tensor) < 1


def test_another_dtype_or_width_is_an_error(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(), 64, 64)
    spec = spec_of(tensor, torch.float16)
    prepared = KERNEL.prepare(tensor, spec)
    with pytest.raises(KernelError, match=r"prepared for float16 activations and got torch\.bfloat16"):
        KERNEL.linear(torch.randn(1, 64).to(BF16), prepared, spec)
    with pytest.raises(KernelError, match="x has 32 columns"):
        KERNEL.linear(torch.randn(2, 32).to(torch.float16), prepared, spec)


@needs_op
@pytest.mark.parametrize("scheme", [*INTS, PER_ROW])
@pytest.mark.parametrize("rows", [3, 70])
def test_gradients_reach_x_and_bias(scheme: Scheme, rows: int, make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(scheme, 128, 96)
    spec = spec_of(tensor, BF16)
    with torch.inference_mode():
        prepared = KERNEL.prepare(tensor, spec)
    x = torch.randn(rows, 96).to(BF16).requires_grad_()
    bias = torch.randn(128).to(BF16).requires_grad_()
    upstream = torch.randn(rows, 128).to(BF16)
    KERNEL.linear(x, prepared, spec, bias).backward(upstream)
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, upstream @ tensor.dequantize(BF16))
    torch.testing.assert_close(bias.grad, upstream.sum(0))


class Layer(torch.nn.Module):
    """The least that a model needs around a kernel."""

    def __init__(self, tensor: QuantizedTensor, spec: LayerSpec) -> None:
        super().__init__()
        self.spec, self.prepared = spec, KERNEL.prepare(tensor, spec)
        self.bias = torch.nn.Parameter(torch.randn(spec.out_features).to(spec.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(KERNEL.linear(x * 2, self.prepared, self.spec, self.bias))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_op
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("scheme", [*INTS, PER_ROW])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(
    scheme: Scheme, training: bool, make_tensor: MakeTensor, spec_of: SpecOf, assert_close: AssertClose
) -> None:
    tensor = make_tensor(scheme, 128, 96)
    layer = Layer(tensor, spec_of(tensor, BF16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 5, 70):
        x = torch.randn(rows, 96).to(BF16).requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        assert_close(y, layer(x))
        if training:
            y.sum().backward()
            (expected,) = torch.autograd.grad(layer(x).sum(), x)
            assert x.grad is not None
            assert_close(x.grad, expected)


@pytest.mark.parametrize("block", int4pack.BLOCKS)
@pytest.mark.parametrize("shape", [(64, 2), (64, 64), (192, 34)])
def test_layout_is_inverted_exactly(block: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = int4pack.pack(codes, block)
    assert packed.is_contiguous()
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(int4pack.unpack(packed, block), codes)
    assert torch.equal(int4pack.columns_first(packed, 4, block), codes.t())


@pytest.mark.parametrize("block", int4pack.BLOCKS)
@pytest.mark.parametrize("shape", [(32, 1), (64, 64), (96, 34)])
def test_bytes_are_laid_out_as_nibbles_of_twice_the_rows(block: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    packed = int4pack.pack_bytes(codes, block)
    assert packed.is_contiguous()
    assert torch.equal(int4pack.unpack_bytes(packed, block), codes)
    assert torch.equal(int4pack.columns_first(packed, 8, block), codes.t())
    if shape[1] % 2:
        return
    nibbles = int4pack.unpack(packed.view(-1, shape[1] // 2), block).t()
    low, high = nibbles.reshape(shape[1], -1, 2, block // 2).unbind(2)
    assert torch.equal((low + high * 16).reshape(shape[1], -1).t(), codes)


@needs_op
def test_layout_is_that_of_torch() -> None:
    codes = torch.randint(0, 16, (256, 64), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert KERNEL._block is not None
    assert torch.equal(int4pack.pack(codes, KERNEL._block), theirs)


_ON_ANOTHER_PROCESSOR = """
import torch
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.tensor import QuantizedTensor
scheme = Scheme(group_size=32, symmetric=False)
zero = torch.randint(0, 16, (96, 3), dtype=torch.uint8)
codes = torch.randint(0, 16, (96, 96), dtype=torch.uint8)
tensor = QuantizedTensor.from_codes(codes, torch.rand(96, 3).to(torch.bfloat16), zero, scheme)
spec = registry.LayerSpec(scheme, 96, 96, "cpu", torch.bfloat16)
selection = registry.select(spec)
prepared = selection.kernel.prepare(tensor, spec)
assert torch.equal(selection.kernel.restore(prepared, spec), tensor.packed)
assert torch.equal(selection.kernel.dequantize(prepared, spec, torch.float32), tensor.dequantize())
for rows in (1, 70):
    x = torch.randn(rows, 96).to(torch.bfloat16)
    exact = x.double() @ tensor.dequantize().double().t()
    error = (selection.kernel.linear(x, prepared, spec).double() - exact).norm() / exact.norm()
    assert error < 0.01, error
print(registry.get("cpu")._block, selection.kernel.name, selection.reason)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these levels are those of x86")
@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("avx2", "32 cpu int4 asym g32, bfloat16 activations: torch int4pack"),
        ("default", "None cpu int4 asym g32, bfloat16 activations: dequantized float32 matmul"),
    ],
)
def test_other_instruction_sets_have_their_own_layout_or_are_refused(level: str, expected: str) -> None:
    environment = {**os.environ, "HF_QUANT_NATIVE": "off", "ATEN_CPU_CAPABILITY": level, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", _ON_ANOTHER_PROCESSOR], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected)
