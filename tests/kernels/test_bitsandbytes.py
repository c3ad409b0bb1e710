"""The bitsandbytes kernel: exact where it runs, a reason where it must not, quiet about what is not our business."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_quant.errors import KernelError
from hf_quant.grids import DOUBLE_QUANT_BLOCK, PER_CHANNEL, Scheme
from hf_quant.kernels import bitsandbytes as module
from hf_quant.kernels import registry
from hf_quant.tensor import DoubleQuant, QuantizedTensor

pytest.importorskip("bitsandbytes")
SCRIPT = Path(__file__).parents[2] / "scripts" / "check_cuda.py"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TABLES = ("nf4", "fp4")
INTS = [Scheme(bits=bits, symmetric=symmetric) for bits in (4, 8) for symmetric in (True, False)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def kernel() -> registry.Kernel:
    kernel = registry.get("bitsandbytes")
    assert kernel.unavailable() is None
    return kernel


def make(scheme: Scheme, out: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Random codes with scales of both signs."""
    torch.manual_seed(columns + out)
    groups = scheme.groups(columns)
    codes = torch.randint(0, 1 << scheme.bits, (out, columns), dtype=torch.uint8)
    zero = None if scheme.symmetric else torch.randint(0, 1 << scheme.bits, (out, groups), dtype=torch.uint8)
    scale: torch.Tensor | DoubleQuant = (torch.randn(out, groups) * 0.02).to(scale_dtype)
    if scheme.double_quant:
        blocks = -(-out * groups // DOUBLE_QUANT_BLOCK)
        nested_codes = torch.randint(0, 256, (out, groups), dtype=torch.uint8)
        scale = DoubleQuant(nested_codes, torch.rand(blocks) * 0.02, torch.tensor(0.003), torch.linspace(-1, 1, 256))
    return QuantizedTensor.from_codes(codes, scale, zero, scheme)


def spec_of(tensor: QuantizedTensor, device: str = "cpu", dtype: torch.dtype = torch.float32) -> registry.LayerSpec:
    return registry.LayerSpec(tensor.scheme, tensor.shape[0], tensor.shape[1], device, dtype)


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


# ---- the CPU backend: NF4 and FP4


@pytest.mark.parametrize("grid", TABLES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(32, 32), (576, 32), (576, 64), (576, PER_CHANNEL), (2880, 64), (4096, 128), (4096, PER_CHANNEL), (96, 96)],
)
def test_weight_is_bit_for_bit_the_reference(
    kernel: registry.Kernel, grid: str, double_quant: bool, columns: int, group: int
) -> None:
    tensor = make(Scheme(grid=grid, group_size=group, double_quant=double_quant), 33, columns)
    spec = spec_of(tensor)
    assert kernel.unsupported(spec) is None
    prepared = kernel.prepare(tensor, spec)
    assert prepared.weight.shape == tensor.packed.shape
    assert torch.equal(kernel.restore(prepared, spec), tensor.packed)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(kernel.dequantize(prepared, spec, dtype), tensor.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_product_is_the_matmul_with_the_weight(kernel: registry.Kernel, dtype: torch.dtype, double_quant: bool) -> None:
    tensor = make(Scheme("nf4", group_size=64, double_quant=double_quant), 50, 576)
    spec = spec_of(tensor, dtype=dtype)
    prepared = kernel.prepare(tensor, spec)
    bias = torch.randn(50, dtype=dtype)
    wide = torch.randn(6, 3 * 576, dtype=dtype)
    for x in (wide[:, :576], wide[:, ::3], wide[:1, 3:579], wide.view(2, 9, 576), wide[0, :576], wide[:0, :576]):
        y = kernel.linear(x, prepared, spec, bias)
        assert y.shape == (*x.shape[:-1], 50) and y.dtype == dtype
        if y.numel():
            expected = x.double() @ tensor.dequantize(dtype).double().t() + bias.double()
            assert relative(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("grid", TABLES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_own_codes_give_its_own_result(kernel: registry.Kernel, grid: str, double_quant: bool) -> None:
    """The layout is theirs: what bitsandbytes quantized, brought into our packing, multiplies to the same bits."""
    import bitsandbytes as bnb

    weight = torch.randn(64, 576)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type=grid, compress_statistics=double_quant
    )
    codes = torch.stack((packed.view(64, -1) >> 4, packed.view(64, -1) & 15), -1).view(64, 576)
    scale: torch.Tensor | DoubleQuant = state.absmax.view(64, -1)
    if double_quant:
        scale = DoubleQuant(scale, state.state2.absmax, state.offset, state.state2.code)
    tensor = QuantizedTensor.from_codes(codes, scale, None, Scheme(grid=grid, group_size=64, double_quant=double_quant))
    spec = spec_of(tensor)
    prepared = kernel.prepare(tensor, spec)
    assert torch.equal(prepared.weight.view(-1, 1), packed)
    x = torch.randn(5, 576)
    assert torch.equal(kernel.linear(x, prepared, spec), bnb.matmul_4bit(x, packed, state))


def test_scales_that_the_ops_take_as_they_are_are_not_copied(kernel: registry.Kernel) -> None:
    plain = make(Scheme("nf4", group_size=64), 8, 128)
    extras = kernel.prepare(plain, spec_of(plain)).extras
    assert extras["scale"] is plain.scale and "absmax" not in extras
    nested = make(Scheme("nf4", group_size=64, double_quant=True), 8, 128)
    assert nested.nested is not None
    extras = kernel.prepare(nested, spec_of(nested)).extras
    assert "absmax" not in extras and "scale" not in extras
    assert extras["nested_codes"].data_ptr() == nested.nested.codes.data_ptr()


def test_gradients_reach_x_and_bias_but_no_weight(kernel: registry.Kernel) -> None:
    tensor = make(Scheme("nf4", group_size=64), 40, 576)
    spec = spec_of(tensor)
    prepared = kernel.prepare(tensor, spec)
    x, bias = torch.randn(2, 3, 576, requires_grad=True), torch.randn(40, requires_grad=True)
    upstream = torch.randn(2, 3, 40)
    kernel.linear(x, prepared, spec, bias).backward(upstream)
    assert x.grad is not None and bias.grad is not None
    assert relative(x.grad, upstream.double() @ tensor.dequantize().double()) < 1e-6
    assert relative(bias.grad, upstream.double().sum((0, 1))) < 1e-6
    frozen = torch.randn(40, requires_grad=True)
    kernel.linear(x.detach(), prepared, spec, frozen).sum().backward()
    assert frozen.grad is not None and torch.equal(frozen.grad, torch.full((40,), 6.0))


def test_compiles_into_one_graph(kernel: registry.Kernel) -> None:
    tensor = make(Scheme("nf4", group_size=64, double_quant=True), 40, 576)
    spec = spec_of(tensor)
    prepared = kernel.prepare(tensor, spec)
    run = torch.compile(lambda x: kernel.linear(x, prepared, spec), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 2, 7):
        x = torch.randn(rows, 576)
        assert torch.equal(run(x), kernel.linear(x, prepared, spec))


# ---- what it must refuse


def refusal(kernel: registry.Kernel, scheme: Scheme, columns: int, device: str = "cpu", **kwargs: object) -> str:
    dtype = kwargs.get("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype)
    reason = kernel.unsupported(registry.LayerSpec(scheme, 64, columns, device, dtype))
    assert reason is not None and not reason.endswith(".")
    return reason


def test_layouts_that_it_would_silently_get_wrong_are_refused(kernel: registry.Kernel) -> None:
    assert "straddle" in refusal(kernel, Scheme("nf4", group_size=128), 576)
    assert "power of two" in refusal(kernel, Scheme("nf4", group_size=16), 576)
    assert "power of two" in refusal(kernel, Scheme("nf4", group_size=72), 576)
    assert "float64" in refusal(kernel, Scheme("nf4", group_size=64), 576, dtype=torch.float64)
    assert "mps" in refusal(kernel, Scheme("nf4", group_size=64), 576, device="mps")


def test_straddling_blocks_are_wrong_in_bitsandbytes_itself() -> None:
    """Why they are refused; when this fails, bitsandbytes has repaired its CPU backend and the guard may go."""
    if "avx512" not in torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("only its AVX-512 code indexes the scales by row")
    codes = torch.randint(0, 16, (64 * 576,), dtype=torch.uint8)
    absmax = torch.rand(64 * 576 // 128) + 0.5
    values = module.QuantizedTensor.from_codes(
        codes.view(-1, 128), absmax.view(-1, 1), None, Scheme("nf4", group_size=128)
    ).dequantize()
    packed = (codes[0::2] << 4) | codes[1::2]
    got = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 128, "nf4", (64, 576), torch.float32)
    assert relative(got.flatten(), values.flatten().double()) > 0.1


@pytest.mark.parametrize("scheme", INTS)
def test_int_grids_are_refused_off_cuda_and_forcing_names_what_works(kernel: registry.Kernel, scheme: Scheme) -> None:
    assert "int grids" in refusal(kernel, scheme, 576)
    spec = registry.LayerSpec(scheme, 64, 576, "cpu", torch.float32)
    with pytest.raises(KernelError, match=r"bitsandbytes cannot run int.*reference can run it"):
        registry.select(spec, "bitsandbytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_layers_need_a_gpu(kernel: registry.Kernel) -> None:
    assert refusal(kernel, Scheme("nf4", group_size=64), 576, device="cuda") == "there is no CUDA device"


def test_views_are_copied_before_the_ops_read_their_memory(kernel: registry.Kernel) -> None:
    """Columns of a larger tensor, as a row-parallel shard is: the ops know pointers, not strides."""
    for scheme in (Scheme("nf4", group_size=64), Scheme(group_size=64), Scheme(bits=8, group_size=64)):
        whole = make(scheme, 32, 256)
        assert whole.scale is not None
        packed, scale = whole.packed[:, : whole.packed.shape[1] // 2], whole.scale[:, :2]
        tensor = QuantizedTensor(packed, scale, None, scheme, (32, 128))
        prepared = kernel.prepare(tensor, spec_of(tensor))
        assert torch.equal(kernel.dequantize(prepared, spec_of(tensor), torch.float32), tensor.dequantize())
        transposed = QuantizedTensor(packed.t().contiguous().t(), scale, None, scheme, (32, 128))
        prepared = kernel.prepare(transposed, spec_of(tensor))
        assert torch.equal(kernel.dequantize(prepared, spec_of(tensor), torch.float32), tensor.dequantize())


def test_a_row_of_the_wrong_width_raises(kernel: registry.Kernel) -> None:
    tensor = make(Scheme("nf4", group_size=64), 8, 128)
    with pytest.raises(KernelError, match="64 columns"):
        kernel.linear(torch.randn(2, 64), kernel.prepare(tensor, spec_of(tensor)), spec_of(tensor))


def test_other_activation_dtypes_raise(kernel: registry.Kernel) -> None:
    tensor = make(Scheme("nf4", group_size=64), 8, 128)
    prepared = kernel.prepare(tensor, spec_of(tensor))
    with pytest.raises(KernelError, match="float64 activations"):
        kernel.linear(torch.randn(1, 128, dtype=torch.float64), prepared, spec_of(tensor))


# ---- int grids: the layout and the tables here, the CUDA ops where there is a GPU


@pytest.mark.parametrize("scheme", INTS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group"), [(576, 32), (576, 64), (576, PER_CHANNEL), (2880, 192)])
def test_int_weights_decode_exactly(
    kernel: registry.Kernel, scheme: Scheme, scale_dtype: torch.dtype, columns: int, group: int
) -> None:
    """dequantize_blockwise is table-driven on the CPU too, so tables, planes and zero points are checked here."""
    grouped = Scheme(bits=scheme.bits, symmetric=scheme.symmetric, group_size=group)
    tensor = make(grouped, 33, columns, scale_dtype)
    spec = spec_of(tensor)
    prepared = kernel.prepare(tensor, spec)
    assert torch.equal(kernel.restore(prepared, spec), tensor.packed)
    for dtype in DTYPES:
        assert torch.equal(kernel.dequantize(prepared, spec, dtype), tensor.dequantize(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_can_be_taken_off_afterwards(kernel: registry.Kernel, bits: int) -> None:
    tensor = make(Scheme(bits=bits, symmetric=False, group_size=64), 33, 576)
    centred = QuantizedTensor(tensor.packed, tensor.scale, None, Scheme(bits=bits, group_size=64), tensor.shape)
    spec = spec_of(tensor)
    x = torch.randn(9, 576) + 0.5
    term = module._zero_point_term(x, kernel.prepare(tensor, spec), spec)
    wide = x.double()
    expected = wide @ centred.dequantize().double().t() - wide @ tensor.dequantize().double().t()
    assert relative(term, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_check_passes_where_the_numbers_are_right(dtype: torch.dtype) -> None:
    assert module._disagreement("cpu", False, dtype) is None
    assert module._disagreement("cpu", True, dtype) is None  # by table-driven dequantization, without gemv_4bit


def test_self_check_catches_a_table_that_is_silently_ignored() -> None:
    """gemv_4bit with a linear table on the CPU computes nf4 products: the check that guards CUDA must see that."""
    reason = module._disagreement("cpu", True, torch.float32, run_as="cuda")
    assert reason is not None and "wrong numbers on this machine for int4 sym" in reason


@pytest.mark.parametrize("scheme", [*INTS, Scheme("nf4"), Scheme("nf4", double_quant=True)])
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("out", [64, 65])
def test_shapes_and_dtypes_on_cuda_without_a_gpu(kernel: registry.Kernel, scheme: Scheme, rows: int, out: int) -> None:
    """Meta tensors walk every op of the CUDA path and its shape checks."""
    spec = registry.LayerSpec(scheme, out, 576, "cuda", torch.bfloat16)
    prepared = kernel.prepare(make(scheme, out, 576), spec)
    extras = {name: tensor.to("meta") for name, tensor in prepared.extras.items()}
    x = torch.empty(rows, 576, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(out, dtype=torch.bfloat16, device="meta")
    y = kernel.linear(x, registry.Prepared(prepared.weight.to("meta"), extras), spec, bias)
    assert y.shape == (rows, out) and y.dtype == torch.bfloat16


@needs_cuda
@pytest.mark.parametrize("scheme", [*INTS, Scheme("nf4"), Scheme("nf4", double_quant=True), Scheme("fp4")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "columns", "group"), [(260, 2880, 32), (261, 576, 64), (64, 2880, PER_CHANNEL)])
def test_on_a_gpu(
    kernel: registry.Kernel, scheme: Scheme, dtype: torch.dtype, out: int, columns: int, group: int
) -> None:
    """scripts/check_cuda.py does the same over many more cases."""
    grouped = Scheme(scheme.grid, scheme.bits, scheme.symmetric, group, scheme.double_quant)
    tensor = make(grouped, out, columns).to("cuda")
    spec = spec_of(tensor, "cuda", dtype)
    chosen = registry.select(spec)
    assert chosen.kernel is kernel, chosen.reason
    prepared = kernel.prepare(tensor, spec)
    assert torch.equal(kernel.restore(prepared, spec), tensor.packed)
    assert torch.equal(kernel.dequantize(prepared, spec, dtype), tensor.dequantize(dtype))
    for rows in (1, 3, 40):
        x = torch.randn(rows, columns, device="cuda", dtype=dtype, requires_grad=True)
        y = kernel.linear(x, prepared, spec)
        weight = tensor.dequantize().double()
        assert relative(y, x.double() @ weight.t()) < TOLERANCE[dtype]
        y.sum().backward()
        assert x.grad is not None
        assert relative(x.grad, torch.ones_like(y).double() @ weight) < TOLERANCE[dtype]


# ---- importing


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def test_import_is_lazy_and_quiet() -> None:
    result = run_python(
        "import sys; from hf_quant.kernels import registry; import hf_quant.kernels.bitsandbytes\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "print(registry.get('bitsandbytes').unavailable(), 'bitsandbytes' in sys.modules)"
    )
    assert result.stdout.split() == ["None", "True"]
    assert "kernels-community" not in result.stderr


def test_missing_package_is_a_reason() -> None:
    result = run_python(
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from hf_quant.kernels import registry; print(registry.get('bitsandbytes').unavailable())"
    )
    assert "not installed (pip install bitsandbytes)" in result.stdout


def test_only_the_known_message_is_dropped() -> None:
    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("bitsandbytes.backends.cpu.ops", logging.WARNING, "", 0, text, None, None)

    known = "Failed to load CPU gemm_4bit_forward from kernels-community: no"
    assert not module._not_about_optional_kernels(record(known))
    assert module._not_about_optional_kernels(record("bitsandbytes library load error"))
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").filters


# ---- scripts/check_cuda.py, which a user with a GPU runs


def load_script() -> ModuleType:
    found = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    sys.modules["check_cuda"] = script  # dataclasses look their module up
    found.loader.exec_module(script)
    return script


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_script_says_that_there_is_no_gpu() -> None:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.returncode == 2
    assert "There is no CUDA GPU" in result.stderr and "nothing was checked" in result.stderr


def test_script_tells_right_ops_from_wrong_ones(kernel: registry.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU every op of the script is exact but gemv_4bit, which ignores its table: the script must see that."""
    script = load_script()
    for name, value in {"DEVICE": "cpu", "OUT": 64, "WIDTHS": (64,), "BLOCKS": (32,), "ROWS": (1, 3)}.items():
        monkeypatch.setattr(script, name, value)
    contracts = {contract.claim: contract for contract in script.check_ops()}
    broken = [claim for claim, contract in contracts.items() if not contract.holds]
    assert broken == ["gemv_4bit reads a linear 16-entry table (1 row)"]
    assert all(contract.cases for contract in contracts.values())


def test_script_cannot_be_fooled() -> None:
    script = load_script()
    right = torch.randn(100, 100, dtype=torch.float64)
    one_wrong = right.clone()
    one_wrong[3, 5] += 1
    assert script.distance(right.float(), right) < 1e-6
    assert script.distance(one_wrong, right) == float("inf")
    assert script.distance(torch.full_like(right, float("nan")), right) == float("inf")
    contract = script.Contract("nothing was checked")
    assert not contract.holds
    contract.record("fine", 0.0, 0.0)
    assert contract.holds
    contract.record("not a number", float("nan"), 1.0)
    assert not contract.holds and contract.worst_case == "not a number"
