"""The kernel ``bitsandbytes``: its fused NF4/FP4 products, and on CUDA int4/int8 through its table-driven ops.

What its ops can represent, and the traps guarded against here (read in the source of bitsandbytes 0.50; the first
layer of a kind runs a small product against ``grids.decode``, and scripts/check_cuda.py checks far more on a GPU):

* ``gemm_4bit`` / ``dequantize_4bit``: NF4 and FP4 only. Fused for few rows, dequantize + matmul for many, as
  bitsandbytes itself decides. Blocks must divide the row: with straddling blocks the CPU backend returns garbage.
* ``gemv_4bit``: any 16-entry table, one row of x, *on CUDA only*: elsewhere a custom table is silently read as nf4/fp4.
  Four output rows per thread block, and the scales of rows past the end are read: out_features % 4 == 0.
* ``dequantize_blockwise``: any 256-entry table; blocks of a power of two, else the wrong scales are read silently.
* every index on CUDA is a 32-bit integer; vector loads need 16-byte aligned rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache

import torch
from torch.nn import functional

from hf_quant.errors import KernelError
from hf_quant.grids import Scheme
from hf_quant.kernels.autograd import linear_by_rows
from hf_quant.kernels.registry import Kernel, LayerSpec, Prepared
from hf_quant.tensor import DoubleQuant, QuantizedTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OPS = ("gemm_4bit", "gemv_4bit", "dequantize_4bit", "dequantize_blockwise")
_MIN_BLOCK = 32
# Above 1024 bitsandbytes' CPU backend leaves its native code for a function that torch.compile builds at first use.
_MAX_BLOCK = {"cpu": 1024, "cuda": 4096}
_LARGEST_BLOCK = 1 << 30  # a 32-bit integer's largest power of two: two scales cover whatever passes the next guard
_MAX_ELEMENTS = (1 << 31) - 4096  # the last thread block computes indices past the end
# int4: a row costs one pass over 0.5 bytes per weight, dequantization writes and reads 9 bytes for any number of rows.
# Counted in bytes alone that would be 14 rows; the one-row op does not reach the full bandwidth.
_GEMV_ROWS = 4


class BitsAndBytesKernel(Kernel):
    """See the module's docstring; ``extras`` hold ``scale`` or the four ``nested_*``, ``zero_point``, and derived:

    * ``absmax`` f32 ``[out, in/block]``: the scales as the ops want them, when ``scale`` itself will not do;
    * ``offset`` f32 ``[out, in/group]``: (zero_point - middle) * scale, asymmetric only;
    * ``levels`` f32 ``[16]``, ``high`` / ``low`` / ``bytes`` f32 ``[256]``: tables shared by all layers of a device.
    """

    name = "bitsandbytes"
    relayouts = True  # bitsandbytes wants the even column in the high nibble; 8-bit codes stay as they are

    def unavailable(self) -> str | None:
        return _load()

    def unsupported(self, spec: LayerSpec) -> str | None:
        scheme = spec.scheme
        if spec.device not in _MAX_BLOCK:
            return f"it runs on cpu and cuda, not on {spec.device}"
        if spec.dtype not in _DTYPES:
            return f"it takes float16, bfloat16 and float32 activations, not {spec.dtype_name}"
        if spec.in_features % spec.group:
            return f"groups of {spec.group} do not divide rows of {spec.in_features}, its blocks would straddle rows"
        if _block(spec) < _MIN_BLOCK:
            return (
                f"groups of {spec.group} columns split into blocks of {_block(spec)}, it needs a power of two "
                f"of at least {_MIN_BLOCK}"
            )
        if spec.device == "cpu":
            if scheme.grid == "int":
                return "its CPU backend reads every 4-bit code as nf4 or fp4 and has no product for int grids"
            return _disagreement("cpu", False, spec.dtype)
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if spec.out_features * spec.in_features > _MAX_ELEMENTS:
            return "it counts elements in 32-bit integers and this weight has too many"
        if scheme.grid == "int" and torch.version.hip is not None:
            return "its custom tables are used on CUDA only, not on ROCm"
        return _disagreement("cuda", scheme.grid == "int", spec.dtype)

    def describe(self, spec: LayerSpec) -> str:
        if spec.scheme.grid != "int":
            fused = "dequantize_4bit + matmul" if spec.device == "cpu" else "gemm_4bit"
            return f"bitsandbytes {fused}"
        if _has_gemv(spec):
            return f"bitsandbytes gemv_4bit for <= {_GEMV_ROWS} rows, dequantize_blockwise + matmul above"
        return "bitsandbytes dequantize_blockwise + matmul"

    def prepare(self, tensor: QuantizedTensor, spec: LayerSpec) -> Prepared:
        extras: dict[str, torch.Tensor] = {}
        # The ops read raw memory: whatever they are given must be contiguous (it is, but for views of other tensors).
        if tensor.nested is not None:
            extras["nested_codes"] = tensor.nested.codes.reshape(-1).contiguous()
            extras["nested_absmax"] = tensor.nested.absmax.contiguous()
            extras["nested_table"] = tensor.nested.table.contiguous()
            extras["nested_offset"] = tensor.nested.offset
        if tensor.scale is not None:
            extras["scale"] = tensor.scale.contiguous()
        repeats = spec.group // _block(spec)
        if repeats > 1 or (tensor.scale is not None and tensor.scale.dtype != torch.float32):
            absmax = tensor.scales().to(torch.float32).contiguous()
            extras["absmax"] = absmax.repeat_interleave(repeats, dim=1) if repeats > 1 else absmax
        if spec.scheme.grid == "int":
            extras.update(_tables(spec.scheme.bits, tensor.device))
        if tensor.zero_point is not None:
            extras["zero_point"] = tensor.zero_point
            zero = tensor.zero_point.to(torch.float32) - spec.scheme.implied_zero_point
            extras["offset"] = zero * tensor.scales().to(torch.float32)
        packed = tensor.packed.contiguous()
        return Prepared(packed if spec.scheme.bits == 8 else _swap_nibbles(packed), extras)

    def restore(self, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        return prepared.weight if spec.scheme.bits == 8 else _swap_nibbles(prepared.weight)

    def dequantize(self, prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in _DTYPES:
            return self.dequantize(prepared, spec, torch.float32).to(dtype)
        shape = (spec.out_features, spec.in_features)
        if spec.scheme.grid != "int":
            weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
                prepared.weight, _absmax(prepared), _block(spec), spec.scheme.grid, shape, dtype
            )
            return weight
        if "offset" not in prepared.extras:
            return _merge(_planes(prepared, spec, _absmax(prepared), _block(spec), dtype), shape)
        # Whole numbers below 256 are exact in every dtype: subtract first, then round the product with the scale once.
        ones = prepared.weight.new_ones(2, dtype=torch.float32)
        codes = _merge(_planes(prepared, spec, ones, _LARGEST_BLOCK, dtype), shape)
        grouped = codes.view(shape[0], -1, spec.group)
        zero = prepared.extras["zero_point"].to(dtype) - spec.scheme.implied_zero_point
        scale = prepared.extras["scale"].to(torch.float32)
        return grouped.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(shape)

    def linear(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.dtype not in _DTYPES:
            raise KernelError(
                f"kernel bitsandbytes got {x.dtype} activations.",
                "it takes float16, bfloat16 and float32; kernel=reference takes any dtype.",
            )
        return linear_by_rows(self, self._product, x, prepared, spec, bias)

    def _product(
        self, rows: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not rows.shape[0]:
            return rows.new_zeros(0, spec.out_features)
        rows = _aligned(rows)
        if spec.scheme.grid != "int":
            return _table_product(rows, prepared, spec, bias)
        if _has_gemv(spec) and rows.shape[0] <= _GEMV_ROWS:
            return _gemv(rows, prepared, spec, bias)
        return functional.linear(rows, self.dequantize(prepared, spec, rows.dtype), bias)


@cache
def _load() -> str | None:
    """Import bitsandbytes once; returns why it cannot be used, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "the package bitsandbytes is not installed (pip install bitsandbytes)"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_not_about_optional_kernels)
    try:
        extension = importlib.import_module("bitsandbytes.cextension")
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"the package bitsandbytes does not import ({type(error).__name__}: {error})"
    finally:
        logger.removeFilter(_not_about_optional_kernels)
    if isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary):
        return "the native library of bitsandbytes does not load (see `python -m bitsandbytes`)"
    missing = [op for op in _OPS if not hasattr(torch.ops.bitsandbytes, op)]
    if missing:
        return f"the installed bitsandbytes has no {' and '.join(missing)} (pip install 'bitsandbytes>=0.50')"
    return None


def _not_about_optional_kernels(record: logging.LogRecord) -> bool:
    """Drop one message: that an optional download of a CPU kernel we never call was not possible. Nothing else."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def _block(spec: LayerSpec) -> int:
    """Columns per scale as the ops see it: the largest power of two in the group (then scales repeat)."""
    return min(spec.group & -spec.group, _MAX_BLOCK[spec.device])


def _has_gemv(spec: LayerSpec) -> bool:
    return spec.scheme.bits == 4 and spec.device == "cuda" and spec.out_features % 4 == 0


@cache
def _tables(bits: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Linear tables of the symmetric int grids: what a nibble, or the high or low nibble of a byte, stands for."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    if bits == 8:
        return {"bytes": (byte - 128).to(torch.float32)}
    tables = {"levels": byte[:16] - 8, "high": (byte >> 4) - 8, "low": (byte & 15) - 8}
    return {name: table.to(torch.float32) for name, table in tables.items()}


def _swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibble first <-> high nibble first; its own inverse."""
    return (packed << 4) | (packed >> 4)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous ``rows`` with their memory starting at a multiple of 16 bytes.

    Only one row cut out of a wider one can start elsewhere. torch.compile cannot ask, and its own buffers are aligned.
    """
    if not torch.compiler.is_compiling() and (rows.storage_offset() * rows.element_size()) % 16:
        return rows.clone()
    return rows


def _absmax(prepared: Prepared) -> torch.Tensor:
    """The scales in float32, one per block; nested ones are expanded."""
    extras = prepared.extras
    if "absmax" in extras:
        return extras["absmax"]
    if "scale" in extras:
        return extras["scale"]
    expanded: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        extras["nested_codes"], extras["nested_absmax"], extras["nested_table"], 256, torch.float32
    )
    return expanded + extras["nested_offset"]


def _table_product(rows: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None) -> torch.Tensor:
    """NF4 and FP4: ``rows [M, in]`` -> ``[M, out]``; nested scales go in as they are."""
    extras = prepared.extras
    nested = "nested_codes" in extras and "absmax" not in extras
    y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
        rows,
        prepared.weight,
        (spec.out_features, spec.in_features),
        extras["nested_absmax"] if nested else _absmax(prepared),
        _block(spec),
        spec.scheme.grid,
        bias,
        extras["nested_codes"] if nested else None,
        extras["nested_table"] if nested else None,
        extras["nested_offset"] if nested else None,
    )
    return y


def _planes(
    prepared: Prepared, spec: LayerSpec, absmax: torch.Tensor, block: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """(code - middle) * absmax in ``dtype``: int8 ``[out, in]``; int4 its even and its odd columns, ``[out, in/2]``."""
    expand = torch.ops.bitsandbytes.dequantize_blockwise
    if spec.scheme.bits == 8:
        return (expand(prepared.weight, absmax, prepared.extras["bytes"], block, dtype),)
    even = expand(prepared.weight, absmax, prepared.extras["high"], block // 2, dtype)
    odd = expand(prepared.weight, absmax, prepared.extras["low"], block // 2, dtype)
    return even, odd


def _merge(planes: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    return planes[0] if len(planes) == 1 else torch.stack(planes, dim=-1).view(shape)


def _gemv(rows: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None) -> torch.Tensor:
    """int4, few rows, in float32: in half precision the op would round scales, weights and every single product."""
    shape = (spec.out_features, spec.in_features)
    levels, absmax, block = prepared.extras["levels"], _absmax(prepared), _block(spec)
    gemv = torch.ops.bitsandbytes.gemv_4bit
    wide = rows.to(torch.float32)
    parts = [gemv(row, prepared.weight, shape, absmax, levels, block) for row in wide.split(1)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    if "offset" in prepared.extras:
        y = y - _zero_point_term(wide, prepared, spec)
    if bias is not None:
        y = y + bias
    return y.to(rows.dtype)


def _zero_point_term(rows: torch.Tensor, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
    """What zero points take off a product made without them: group sums of x times (zero_point - middle) * scale."""
    sums = rows.view(rows.shape[0], -1, spec.group).sum(-1)
    return sums @ prepared.extras["offset"].t()


@cache
@torch.no_grad()
def _disagreement(device: str, int_grid: bool, dtype: torch.dtype, run_as: str = "") -> str | None:
    """Run small layers on ``device`` and compare with grids.decode: a reason when this machine gives other numbers.

    bitsandbytes has a backend per device and several code paths per processor; none is trusted unseen. ``run_as``
    takes the path of another device (tests take that of CUDA on the CPU, where it must be caught).
    """
    reason = _load()
    if reason is not None:
        return reason
    kernel, rows, columns = BitsAndBytesKernel(), 64, 192
    for scheme in _INT_SAMPLES if int_grid else _TABLE_SAMPLES:
        tensor = _sample(scheme, rows, columns, device)
        spec = LayerSpec(scheme, rows, columns, run_as or device, dtype)
        expected = tensor.dequantize()
        try:
            prepared = kernel.prepare(tensor, spec)
            weights = kernel.dequantize(prepared, spec, torch.float32)
            worst = float((weights - expected).abs().max() / expected.abs().max())
            for count in (1, 9):
                x = torch.linspace(0, 9, count * columns, dtype=torch.float32, device=device).cos().add(0.5)
                x = x.view(count, columns).to(dtype)
                y = kernel.linear(x, prepared, spec).to(torch.float32)
                exact = x.to(torch.float32) @ expected.t()
                worst = max(worst, float((y - exact).abs().max() / exact.abs().max()))
        except (RuntimeError, NotImplementedError) as error:
            return f"it fails on this machine for {scheme.label} ({type(error).__name__}: {error})".rstrip(".")
        if not worst < 0.05:
            return f"it gives wrong numbers on this machine for {scheme.label} (off by {worst:.0%})"
    return None


_INT_SAMPLES = tuple(
    Scheme(bits=bits, symmetric=symmetric, group_size=64) for bits in (4, 8) for symmetric in (True, False)
)
_TABLE_SAMPLES = (Scheme("nf4", group_size=64), Scheme("nf4", group_size=64, double_quant=True), Scheme("fp4"))


def _sample(scheme: Scheme, rows: int, columns: int, device: str) -> QuantizedTensor:
    """A small layer whose codes, scales (of both signs) and zero points all differ along rows and columns."""
    top, groups = 1 << scheme.bits, scheme.groups(columns)
    codes = (torch.arange(rows * columns, device=device) * 37 % 251 % top).to(torch.uint8).view(rows, columns)
    steps = torch.arange(rows * groups, device=device).view(rows, groups)
    zero = None if scheme.symmetric else (steps * 5 % top).to(torch.uint8)
    if not scheme.double_quant:
        # dtypes are spelled out: models are built under another default dtype and on another default device
        scale = (steps + 1).to(torch.float32) * (1 - 2 * (steps % 3 == 0).to(torch.float32)) / steps.numel()
        return QuantizedTensor.from_codes(codes, scale, zero, scheme)
    nested = DoubleQuant(
        codes=(steps * 53 % 256).to(torch.uint8),
        absmax=torch.arange(1, 2 + steps.numel() // 256, dtype=torch.float32, device=device) * 0.25,
        offset=torch.tensor(0.25, dtype=torch.float32, device=device),
        table=torch.linspace(-1, 1, 256, dtype=torch.float32, device=device),
    )
    return QuantizedTensor.from_codes(codes, nested, zero, scheme)
