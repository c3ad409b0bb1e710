"""The kernel ``cpu``: torch's own CPU ops where they beat a dequantized matmul.

* int4, bfloat16: ``_weight_int4pack_mm_for_cpu`` for few rows of x.
* int8 per channel, symmetric, bfloat16: ``_weight_int8pack_mm`` for few rows.
* int8 otherwise, bfloat16: torch has no op; its int4 product over the nibbles of the codes, twice as many rows.
* many rows: the weight is dequantized piece by piece, straight from the layout of those ops.
* half-precision activations that this processor cannot multiply natively: products in float32, converted back.

In float32 those ops are scalar code and slower than dequantizing the weight (measured: 4-30 times), so it refuses.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hf_quant.errors import KernelError
from hf_quant.kernels import int4pack
from hf_quant.kernels.autograd import linear_by_rows
from hf_quant.kernels.reference import (
    canonical_extras,
    dequantized_product,
    dequantized_weight,
    row_chunks,
    scaled,
)
from hf_quant.kernels.registry import Kernel, LayerSpec, Prepared
from hf_quant.tensor import QuantizedTensor, pack_codes

# Rows of x up to which the op beats dequantizing the weight; scripts/bench_kernels.py --crossover measures them.
INT4_ROWS = 64
INT8_ROWS = 24
NIBBLES_ROWS = 16
# The zero points of an int4 layer are rounded to bfloat16 together with their scale. Where that moves the weight by
# more than this share of its norm (bfloat16 rounding of the weight itself moves it by 1.6e-3), it is corrected.
ZERO_ERROR = 2.0**-10


class CpuKernel(Kernel):
    """See the module's docstring. ``extras``: those of the reference kernel, and

    * ``scales_and_zeros`` bf16 ``[in/op_group, out, 2]`` (int4 op), at 8 bits ``[in/op_group, 2 * out, 2]``;
    * ``zero_error`` bf16 ``[out, in/group]``: what rounding took from the zero points, where it matters;
    * ``channel_scale`` bf16 ``[out]`` (int8 op).
    """

    name = "cpu"
    relayouts = True

    def __init__(self) -> None:
        self._block = int4pack.block_rows() if int4pack.available() else None
        self._widened = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not _multiplies(dtype))

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, spec: LayerSpec) -> str | None:
        if spec.device != "cpu":
            return f"it runs on cpu, not on {spec.device}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"in {spec.dtype_name} torch's int4 and int8 ops are slower than a dequantized matmul"
        if spec.in_features % spec.group:
            return f"groups of {spec.group} do not divide rows of {spec.in_features}"
        if spec.dtype in self._widened:
            return None
        return self._no_op(spec)

    def describe(self, spec: LayerSpec) -> str:
        wide = "float32" if spec.dtype in self._widened else spec.dtype_name
        above = f"dequantized {wide} matmul"
        if self._no_op(spec) is not None:
            return above
        if self._takes_int8pack(spec):
            return f"torch int8pack for <= {INT8_ROWS} rows, {above} above"
        if spec.scheme.bits == 8:
            return f"torch int4pack on the nibbles for <= {NIBBLES_ROWS} rows, {above} above"
        return f"torch int4pack for <= {INT4_ROWS} rows, {above} above"

    def _no_op(self, spec: LayerSpec) -> str | None:
        """Why torch has no op for this layer; None when it has."""
        if spec.scheme.grid != "int":
            return f"torch has no op for {spec.scheme.grid}"
        if spec.dtype != torch.bfloat16:
            return f"torch's int4 and int8 ops are slow in {spec.dtype_name}"
        if self._block is None:
            return "torch's int4 op is missing or uses an unknown layout here, which means that it is not vectorized"
        if self._takes_int8pack(spec):
            return None
        block = self._block if spec.scheme.bits == 4 else self._block // 2
        if spec.out_features % block:
            return f"torch's int4 op wants output features in blocks of {block}, not {spec.out_features}"
        if int4pack.op_group(spec.group) is None:
            return f"torch's int4 op wants groups that are a multiple of 32, not {spec.group}"
        return None

    @staticmethod
    def _takes_int8pack(spec: LayerSpec) -> bool:
        # the op reads 16 columns at a time with no regard for the end of the row
        one_scale = spec.scheme.bits == 8 and spec.scheme.symmetric and spec.group == spec.in_features
        return one_scale and spec.dtype == torch.bfloat16 and spec.in_features % 16 == 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, tensor: QuantizedTensor, spec: LayerSpec) -> Prepared:
        extras = canonical_extras(tensor)
        if self._no_op(spec) is not None or self._block is None:
            return Prepared(tensor.packed, extras)
        if self._takes_int8pack(spec):
            extras["channel_scale"] = tensor.scales().reshape(-1).to(torch.bfloat16)
            return Prepared(tensor.packed ^ 128, extras)
        if spec.scheme.bits == 4:
            extras.update(_int4_extras(tensor, spec))
            return Prepared(int4pack.pack(tensor.codes(), self._block), extras)
        extras["scales_and_zeros"] = _nibble_scales(tensor, spec, self._block)
        return Prepared(int4pack.pack_bytes(tensor.packed, self._block), extras)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        if "channel_scale" in prepared.extras:
            return prepared.weight ^ 128
        if "scales_and_zeros" not in prepared.extras:
            return prepared.weight
        assert self._block is not None
        if spec.scheme.bits == 4:
            return pack_codes(int4pack.unpack(prepared.weight, self._block), 4)
        return int4pack.unpack_bytes(prepared.weight, self._block)

    def dequantize(self, prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
        if "channel_scale" in prepared.extras:
            return _signed_rows(prepared, slice(None), dtype)
        if "scales_and_zeros" not in prepared.extras:
            return dequantized_weight(prepared, spec, dtype)
        return self._dequantize_columns(prepared, spec, slice(0, spec.out_features), dtype).t()

    def linear(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.dtype != spec.dtype:
            raise KernelError(
                f"kernel cpu was prepared for {spec.dtype_name} activations and got {x.dtype}.",
                "prepare the layer again for this dtype.",
            )
        return linear_by_rows(self, self._product, x, prepared, spec, bias)

    def _product(self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None) -> torch.Tensor:
        extras, rows = prepared.extras, x.shape[0]
        if "channel_scale" in extras and 0 < rows <= INT8_ROWS:
            y = _int8pack(x, prepared.weight, extras["channel_scale"])
        elif "scales_and_zeros" in extras and 0 < rows <= (INT4_ROWS if spec.scheme.bits == 4 else NIBBLES_ROWS):
            y = self._int4_product(x, prepared, spec)
        else:
            return self._dequantized_product(x, prepared, spec, bias)
        return y if bias is None else y.add_(bias)

    def _int4_product(self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        extras, size = prepared.extras, int4pack.op_group(spec.group)
        packed = prepared.weight.view(-1, spec.in_features // 2)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, size, extras["scales_and_zeros"])
        if spec.scheme.bits == 8:
            assert self._block is not None
            return int4pack.join_nibbles(y, self._block)
        if "zero_error" in extras:
            sums = x.view(x.shape[0], -1, spec.group).sum(-1)
            y = y.add_(functional.linear(sums, extras["zero_error"]))
        return y

    def _dequantized_product(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = torch.float32 if x.dtype in self._widened else x.dtype
        wide, wide_bias = x.to(dtype), None if bias is None else bias.to(dtype)
        extras = prepared.extras
        if "channel_scale" not in extras and "scales_and_zeros" not in extras:
            return dequantized_product(wide, prepared, spec, wide_bias).to(x.dtype)
        whole = [slice(0, spec.out_features)]
        parts = []
        for rows in whole if torch.compiler.is_compiling() else row_chunks(spec):
            part = None if wide_bias is None else wide_bias[rows]
            if "channel_scale" in extras:
                parts.append(functional.linear(wide, _signed_rows(prepared, rows, dtype), part))
                continue
            columns = self._dequantize_columns(prepared, spec, rows, dtype)
            parts.append(wide @ columns if part is None else torch.addmm(part, wide, columns))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y.to(x.dtype)

    def _dequantize_columns(self, prepared: Prepared, spec: LayerSpec, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Whole blocks of output rows of the weight, as ``[in, rows]`` in ``dtype``."""
        assert self._block is not None
        extras, columns = prepared.extras, spec.in_features
        codes = int4pack.columns_first(prepared.weight[rows], spec.scheme.bits, self._block)
        scale = extras["scale"][rows].t().contiguous().unsqueeze(1)
        zero: torch.Tensor | int = spec.scheme.implied_zero_point
        if not spec.scheme.symmetric:
            zero = extras["zero_point"][rows].t().contiguous().unsqueeze(1)
            zero = zero.view(torch.int8) if spec.scheme.bits == 4 else zero
        grouped = codes.view(-1, spec.group, codes.shape[1])
        return scaled(grouped, zero, scale, dtype).view(columns, -1)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether matmuls in a half-precision dtype run natively here; without oneDNN nobody knows, and torch decides."""
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())


def _signed_rows(prepared: Prepared, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an int8 weight with one scale each, from signed bytes, as ``[rows, in]`` in ``dtype``."""
    values = prepared.weight[rows].view(torch.int8).to(torch.float32)
    return values.mul_(prepared.extras["scale"][rows].to(torch.float32)).to(dtype)


def _interleaved(scale: torch.Tensor, zero: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """``[out, in/group]`` twice -> ``[in/op_group, out, 2]`` in bfloat16, as the op reads them."""
    size = int4pack.op_group(spec.group)
    assert size is not None
    both = torch.stack((scale, zero), dim=-1).to(torch.bfloat16).repeat_interleave(spec.group // size, dim=1)
    return both.transpose(0, 1).contiguous()


def _zeros(tensor: QuantizedTensor, middle: int, scale: torch.Tensor) -> torch.Tensor:
    """(middle - zero_point) * scale in float32: what the ops add to (code - middle) * scale; exact."""
    if tensor.zero_point is None:
        return (middle - tensor.scheme.implied_zero_point) * scale
    return (middle - tensor.zero_point.to(torch.float32)) * scale


def _int4_extras(tensor: QuantizedTensor, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """Scales and zeros of the int4 op, and what rounding the zeros loses where that is not negligible."""
    scale = tensor.scales().to(torch.bfloat16).to(torch.float32)
    zero = _zeros(tensor, 8, scale)
    extras = {"scales_and_zeros": _interleaved(scale, zero, spec)}
    lost = zero - zero.to(torch.bfloat16).to(torch.float32)
    if lost.any():
        some = slice(None, None, max(1, spec.out_features // 64))  # a sample of rows tells how large the weight is
        codes = tensor.codes()[some].to(torch.float32).view(-1, scale.shape[1], spec.group)
        assert tensor.zero_point is not None
        weight = (codes - tensor.zero_point[some].unsqueeze(-1)) * scale[some].unsqueeze(-1)
        if float(lost[some].norm()) * spec.group**0.5 > ZERO_ERROR * float(weight.norm()):
            extras["zero_error"] = lost.to(torch.bfloat16)
    return extras


def _nibble_scales(tensor: QuantizedTensor, spec: LayerSpec, block: int) -> torch.Tensor:
    """code - zero = (low - 8) + 16 * (high - 8) + (136 - zero); what bfloat16 drops of the zeros goes with the low."""
    scale = tensor.scales().to(torch.bfloat16).to(torch.float32)
    zero = _zeros(tensor, 136, scale)
    high = zero.to(torch.bfloat16).to(torch.float32)
    halves = _interleaved(scale, zero - high, spec), _interleaved(scale * 16, high, spec)
    return torch.stack([half.view(half.shape[0], -1, block // 2, 2) for half in halves], dim=2).flatten(1, 3)


def _int8pack(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x [rows, in]``, int8 bytes ``[out, in]`` -> ``[rows, out]``; one op that torch.compile does not look into."""
    if torch.compiler.is_compiling():
        return torch.ops.hf_quant.int8pack_mm(x, weight, scale)
    return _aligned_int8pack(x, weight, scale)


def _aligned_int8pack(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # The op loads whole vectors from addresses that it takes for aligned: a row cut out of a wider one, or a weight
    # mapped from a file, would crash the process.
    x = x if x.data_ptr() % 64 == 0 else x.clone()
    weight = weight if weight.data_ptr() % 64 == 0 else weight.clone()
    y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, weight.view(torch.int8), scale)
    return y


torch.library.custom_op(
    "hf_quant::int8pack_mm",
    _aligned_int8pack,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale) -> Tensor",
).register_fake(lambda x, weight, scale: x.new_empty(x.shape[0], weight.shape[0]))
