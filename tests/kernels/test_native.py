"""The native kernel: as close to float64 as rounding allows on every grid, dtype and shape, and exact in its layout."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_quant.errors import ConfigError, KernelError
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.kernels import registry, tiles
from hf_quant.kernels.registry import LayerSpec, Prepared
from hf_quant.nn.linear import QuantLinear
from hf_quant.tensor import QuantizedTensor

MakeTensor = Callable[..., QuantizedTensor]
SpecOf = Callable[[QuantizedTensor, torch.dtype], LayerSpec]
AssertClose = Callable[[torch.Tensor, torch.Tensor], None]
Distance = Callable[[torch.Tensor, torch.Tensor, QuantizedTensor], float]

KERNEL = registry.get("native")
REFERENCE = registry.get("reference")
WHY_NOT = KERNEL.unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = [
    Scheme(),
    Scheme(symmetric=False, group_size=64),
    Scheme(group_size=PER_CHANNEL),
    Scheme(bits=8, group_size=128),
    Scheme(bits=8, symmetric=False, group_size=32),
    Scheme(bits=8, group_size=PER_CHANNEL),
    Scheme("nf4", group_size=64, double_quant=True),
    Scheme("fp4", group_size=32),
]
COLUMNS = 128
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Scheme, int, int]:
    """Every grid; rows and columns that fill tiles and that do not."""
    grid, bits, symmetric, double_quant = draw(
        st.sampled_from(
            (
                ("int", 4, True, False),
                ("int", 4, False, False),
                ("int", 8, True, False),
                ("int", 8, False, False),
                ("nf4", 4, True, False),
                ("nf4", 4, True, True),
                ("fp4", 4, True, False),
            )
        )
    )
    if draw(st.booleans()):
        group, columns = PER_CHANNEL, draw(st.integers(1, 300))
    else:
        group = draw(st.sampled_from((8, 16, 32, 64, 96, 128, 256)))
        columns = group * draw(st.integers(1, 5))
    return Scheme(grid, bits, symmetric, group, double_quant), draw(st.integers(1, 100)), columns


@settings(
    deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=layers(),
    rows=st.sampled_from((1, 2, 3, 4, 5, 8, 9, 17, 40)),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    with_bias=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@example(
    case=(Scheme(), 16, 32),
    rows=1,
    dtype=torch.bfloat16,
    scale_dtype=torch.bfloat16,
    threads=1,
    with_bias=False,
    seed=0,
)
def test_close_to_float64_and_exact_in_its_layout(
    make_tensor: MakeTensor,
    distance: Distance,
    case: tuple[Scheme, int, int],
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    threads: int,
    with_bias: bool,
    seed: int,
) -> None:
    scheme, out, columns = case
    spec = LayerSpec(scheme, out, columns, "cpu", dtype)
    assert KERNEL.unsupported(spec) is None
    tensor = make_tensor(scheme, out, columns, scale_dtype=scale_dtype, seed=seed)
    before = tensor.packed.clone()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
    saved = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prepared = KERNEL.prepare(tensor, spec)
        assert torch.equal(tensor.packed, before)
        assert torch.equal(KERNEL.restore(prepared, spec), before)
        if tensor.scale is not None:
            assert prepared.scale is not None
            assert torch.equal(KERNEL.restore_rows(prepared.scale, spec), tensor.scale)
        if tensor.zero_point is not None:
            assert prepared.zero_point is not None
            assert torch.equal(KERNEL.restore_rows(prepared.zero_point, spec), tensor.zero_point)
        for target in (dtype, torch.float32):
            assert torch.equal(KERNEL.dequantize(prepared, spec, target), tensor.dequantize(target))
        y = KERNEL.linear(x, prepared, spec)
        with_it = KERNEL.linear(x, prepared, spec, bias)
    finally:
        torch.set_num_threads(saved)
    assert (y.dtype, y.shape) == (dtype, (rows, out))
    assert distance(y, x, tensor) < 2
    if bias is not None:
        expected = y.double() + bias.double()
        limit = 3 * torch.finfo(dtype).eps * (expected.abs() + bias.double().abs() + y.double().abs())
        assert bool(((with_it.double() - expected).abs() <= limit).all())


@schemes
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_reference(
    scheme: Scheme, dtype: torch.dtype, make_tensor: MakeTensor, spec_of: SpecOf, distance: Distance
) -> None:
    tensor = make_tensor(scheme, 80, COLUMNS)
    spec = spec_of(tensor, dtype)
    x = torch.randn(6, COLUMNS).to(dtype)
    ours = KERNEL.linear(x, KERNEL.prepare(tensor, spec), spec)
    theirs = REFERENCE.linear(x, REFERENCE.prepare(tensor, spec), spec)
    assert distance(ours, x, tensor) <= distance(theirs, x, tensor) + 0.5


@schemes
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_strides_and_bias(
    scheme: Scheme,
    dtype: torch.dtype,
    make_tensor: MakeTensor,
    spec_of: SpecOf,
    distance: Distance,
    assert_close: AssertClose,
) -> None:
    tensor = make_tensor(scheme, 70, COLUMNS)
    spec = spec_of(tensor, dtype)
    prepared, bias = KERNEL.prepare(tensor, spec), torch.randn(70).to(dtype)
    wide = torch.randn(10, 2, 2 * COLUMNS).to(dtype)
    views = [
        wide[0, 0, :COLUMNS],
        wide[0, 0, 1 : COLUMNS + 1],  # at an address that no vector load takes
        wide[0, :, COLUMNS:],
        wide[:3, :, ::2],
        wide[:3, :, :COLUMNS].transpose(0, 1),
        wide[:, 1, :COLUMNS],
        wide[:1, :1, :COLUMNS].expand(3, 2, COLUMNS),
        wide[:0, :, :COLUMNS],
    ]
    for x in views:
        y = KERNEL.linear(x, prepared, spec)
        assert y.shape == (*x.shape[:-1], 70)
        assert y.is_contiguous()
        if x.numel():
            assert distance(y.reshape(-1, 70), x.reshape(-1, COLUMNS), tensor) < 2
            assert torch.equal(y, KERNEL.linear(x.contiguous(), prepared, spec))
        assert_close(KERNEL.linear(x, prepared, spec, bias), y + bias)
    strided = torch.stack((bias, bias), dim=1)[:, 0]
    expected = KERNEL.linear(wide[0, 0, :COLUMNS], prepared, spec, bias)
    assert torch.equal(KERNEL.linear(wide[0, 0, :COLUMNS], prepared, spec, strided), expected)


def test_a_weight_at_an_odd_address_is_the_same_weight(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(), 64, COLUMNS)
    spec = spec_of(tensor, torch.bfloat16)
    x, prepared = torch.randn(3, COLUMNS).to(torch.bfloat16), KERNEL.prepare(tensor, spec)
    memory = torch.empty(prepared.weight.numel() + 1, dtype=torch.uint8)
    moved = memory[1:].copy_(prepared.weight)
    operands = (prepared.extras["scale"], None, "int", 4, 64, COLUMNS, 32, None, 0)
    assert torch.equal(torch.ops.hf_quant.linear(x, moved, *operands), KERNEL.linear(x, prepared, spec))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40])
@pytest.mark.parametrize("where", ["x", "scale"])
def test_nan_infinity_and_denormals_reach_the_results_that_they_belong_to(
    value: float, where: str, make_tensor: MakeTensor, spec_of: SpecOf
) -> None:
    tensor = make_tensor(Scheme(symmetric=False), 40, COLUMNS, scale_dtype=torch.float32)
    x = torch.randn(3, COLUMNS)
    assert tensor.scale is not None
    if where == "x":
        x[1, 5] = value
    else:
        tensor.scale[7, 2] = value
    spec = spec_of(tensor, torch.float32)
    y = KERNEL.linear(x, KERNEL.prepare(tensor, spec), spec)
    expected = REFERENCE.linear(x, REFERENCE.prepare(tensor, spec), spec)
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[y.isfinite()], expected[y.isfinite()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, PER_CHANNEL])
def test_int8_activations_cost_what_rounding_them_costs(
    bits: int, symmetric: bool, group: int, make_tensor: MakeTensor
) -> None:
    tensor = make_tensor(Scheme(bits=bits, symmetric=symmetric, group_size=group), 96, 512)
    for dtype in DTYPES:
        spec = LayerSpec(tensor.scheme, 96, 512, "cpu", dtype, registry.INT8)
        selection = registry.select(spec, "native")
        assert selection.label == "native (int8 activations)"
        assert "int8" in selection.reason
        prepared = KERNEL.prepare(tensor, spec)
        for rows in (1, 4, 7, 40):
            x = torch.randn(rows, 512).to(dtype)
            y = KERNEL.linear(x, prepared, spec)
            block = 512 if group == PER_CHANNEL else group
            blocks = x.double().view(rows, -1, min(block, 128))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            rounded = ((blocks / step).round() * step).view(rows, 512)
            exact = rounded @ tensor.dequantize().double().t()
            error = (y.double() - exact).norm() / exact.norm()
            # a few values lie so close to the middle of two steps that float32 rounds them the other way
            assert error < 4 * torch.finfo(dtype).eps + 2e-3
            off = x.double() @ tensor.dequantize().double().t()
            assert (y.double() - off).norm() / off.norm() > 1e-3, "activations were not rounded"


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_levels_that_are_no_whole_numbers_keep_float_activations_and_say_so(
    grid: str, make_tensor: MakeTensor, spec_of: SpecOf
) -> None:
    tensor = make_tensor(Scheme(grid, group_size=64), 32, COLUMNS)
    spec = LayerSpec(tensor.scheme, 32, COLUMNS, "cpu", torch.float32, registry.INT8)
    selection = registry.select(spec, "native")
    assert selection.label == "native (float activations)"
    assert "no whole numbers" in selection.reason
    exact = spec_of(tensor, torch.float32)
    x = torch.randn(2, COLUMNS)
    expected = KERNEL.linear(x, KERNEL.prepare(tensor, exact), exact)
    assert torch.equal(KERNEL.linear(x, KERNEL.prepare(tensor, spec), spec), expected)


def test_other_dtypes_widths_and_groups_are_refused(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(), 64, COLUMNS)
    spec = spec_of(tensor, torch.float32)
    prepared = KERNEL.prepare(tensor, spec)
    with pytest.raises(KernelError, match="x has 32 columns"):
        KERNEL.linear(torch.randn(2, 32), prepared, spec)
    with pytest.raises(KernelError, match=r"got torch\.float64 activations"):
        KERNEL.linear(torch.randn(2, COLUMNS).double(), prepared, spec)
    assert "float64" in str(KERNEL.unsupported(spec_of(tensor, torch.float64)))
    assert "not on cuda" in str(KERNEL.unsupported(LayerSpec(tensor.scheme, 64, COLUMNS, "cuda", torch.float32)))
    assert "groups of 12" in str(KERNEL.unsupported(LayerSpec(Scheme(group_size=12), 8, 24, "cpu", torch.float32)))
    assert KERNEL.unsupported(LayerSpec(Scheme(group_size=12), 8, 12, "cpu", torch.float32)) is None
    assert "do not divide" in str(KERNEL.unsupported(LayerSpec(Scheme(), 8, 40, "cpu", torch.float32)))


@schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_x_and_bias_and_keep_no_float_weight(
    scheme: Scheme, dtype: torch.dtype, make_tensor: MakeTensor, spec_of: SpecOf
) -> None:
    tensor = make_tensor(scheme, 72, COLUMNS)
    spec = spec_of(tensor, dtype)
    with torch.inference_mode():
        prepared = KERNEL.prepare(tensor, spec)
    x = torch.randn(2, 5, COLUMNS).to(dtype).requires_grad_()
    bias = torch.randn(72).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, 72).to(dtype)
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        y = KERNEL.linear(x, prepared, spec, bias)
    assert torch.Size((72, COLUMNS)) not in shapes
    y.backward(upstream)
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, upstream @ tensor.dequantize(dtype))
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    with torch.no_grad():
        assert KERNEL.linear(x, prepared, spec, bias).grad_fn is None


@pytest.mark.parametrize("out", [1, 15, 16, 17, 64])
def test_scales_are_tiled_and_come_back(out: int) -> None:
    rows = torch.randn(out, 5)
    tiled = tiles.rows_to_tiles(rows)
    assert tiled.shape == (-(-out // 16), 5, 16)
    assert torch.equal(tiled[-1, :, (out - 1) % 16], rows[-1])
    assert float(tiled.abs().sum()) == pytest.approx(float(rows.abs().sum())), "rows past the end are zeros"
    assert torch.equal(tiles.tiles_to_rows(tiled, out), rows)


# --- a layer around it -----------------------------------------------------------------------------------------------


@schemes
def test_a_layer_holds_one_copy_of_everything(scheme: Scheme, make_tensor: MakeTensor) -> None:
    tensor = make_tensor(scheme, 75, COLUMNS)
    expected = [t.clone() for t in tensor.tensors()]
    layer = QuantLinear.from_quantized(tensor, kernel="native")
    del tensor
    layer(torch.randn(1, COLUMNS))
    assert layer._ready is not None
    held = [*layer.parameters(), *layer._ready.prepared.extras.values(), layer._ready.prepared.weight]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    groups = scheme.groups(COLUMNS)
    tiled = 80 * COLUMNS * scheme.bits // 8 + (0 if scheme.symmetric else 80 * groups)
    if scheme.double_quant:
        nested = 75 * groups + 4 * -(-75 * groups // 256) + 4 + 256 * 4
        tiled += nested + 80 * groups * 4
    else:
        tiled += 80 * groups * layer.weight_scale.element_size()
    assert sum(storages.values()) <= tiled + 64, "a second copy is kept"
    assert all(torch.equal(a, b) for a, b in zip(layer.quantized().tensors(), expected, strict=True))
    state = layer.state_dict()
    assert [state[name].shape for name in ("weight", "weight_scale")] == [expected[0].shape, expected[1].shape]
    again = copy.deepcopy(layer)
    assert [p.shape for p in again.parameters()] == [
        p.shape for p in QuantLinear.from_quantized(layer.quantized()).parameters()
    ]
    layer.release()
    assert layer.weight.shape == expected[0].shape
    assert torch.equal(layer.weight_scale, expected[1])


def test_a_layer_asks_for_its_activations_and_the_environment_wins(
    make_tensor: MakeTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(registry.ACTIVATIONS_VARIABLE, raising=False)
    tensor, x = make_tensor(Scheme(), 64, COLUMNS), torch.randn(3, COLUMNS)
    exact = QuantLinear.from_quantized(tensor, kernel="native")
    rounded = QuantLinear.from_quantized(tensor, kernel="native", activations="int8")
    assert not torch.equal(exact(x), rounded(x))
    assert (exact.kernel_label, rounded.kernel_label) == ("native (float activations)", "native (int8 activations)")
    monkeypatch.setenv(registry.ACTIVATIONS_VARIABLE, "float")
    other = QuantLinear.from_quantized(tensor, kernel="native", activations="int8")
    assert torch.equal(other(x), exact(x))
    monkeypatch.setenv(registry.ACTIVATIONS_VARIABLE, "int4")
    with pytest.raises(ConfigError, match="HF_QUANT_ACTIVATIONS='int4'"):
        QuantLinear.from_quantized(tensor, kernel="native")(x)
    with pytest.raises(ConfigError, match="activations='fast'"):
        QuantLinear.from_quantized(tensor, activations="fast")


def test_threads_call_one_weight_at_once(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(), 256, 512)
    spec = spec_of(tensor, torch.bfloat16)
    prepared = KERNEL.prepare(tensor, spec)
    inputs = [torch.randn(rows, 512).to(torch.bfloat16) for rows in (1, 3, 8, 20)]
    expected = [KERNEL.linear(x, prepared, spec) for x in inputs]
    failures: list[object] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        try:
            if not all(torch.equal(KERNEL.linear(inputs[i], prepared, spec), expected[i]) for _ in range(50)):
                failures.append(i)
        except Exception as error:  # reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_refused_call_is_a_typed_error(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(), 16, COLUMNS)
    prepared = KERNEL.prepare(tensor, spec_of(tensor, torch.float32))
    operands = (prepared.weight, prepared.extras["scale"], None, "int", 4, 16, COLUMNS, 32, None)
    with pytest.raises(KernelError, match="native CPU kernel refused a call"):
        torch.ops.hf_quant.linear(torch.randn(1, COLUMNS), *operands, 7)


def test_prepared_is_complete_by_itself(make_tensor: MakeTensor, spec_of: SpecOf) -> None:
    tensor = make_tensor(Scheme(symmetric=False), 33, COLUMNS)
    spec = spec_of(tensor, torch.float32)
    prepared = KERNEL.prepare(tensor, spec)
    expected = tensor.dequantize()
    for t in tensor.tensors():
        t.zero_()
    assert torch.equal(KERNEL.dequantize(prepared, spec, torch.float32), expected)
    assert isinstance(prepared, Prepared)
