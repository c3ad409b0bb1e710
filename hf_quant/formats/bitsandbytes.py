"""bitsandbytes 4-bit (NF4, FP4): QuantizedTensor <-> the tensors of one module, Plan <-> its config.

One module on disk: ``weight`` uint8 ``[out*in/2, 1]``, the first of two codes in the high nibble; ``weight.absmax``
float32 ``[out*groups]``, or uint8 codes with ``weight.nested_absmax`` float32 and ``weight.nested_quant_map`` float32
``[256]``; ``weight.quant_map`` float32 ``[16]``; ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): uint8 bytes of
json with the block size, shape, dtype and, when nested, the float32 offset (exact, as json prints its double).

bitsandbytes cuts the flattened weight into blocks. We only write blocks that divide a row: when they straddle rows its
fused kernels do not apply, and its AVX-512 CPU path returns wrong numbers. ``Conv1D`` is stored ``[out, in]``, as
transformers does when it quantizes GPT-2. The state is per module, so layers may differ in block size, grid and
nesting: stock transformers loads such a mix. One limit of the *stock run time*, not of the file: on x86 CPUs with
AVX512-BF16 its linear layer computes in bfloat16 and asserts that ``out`` is a multiple of 32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.errors import ConfigError, FormatError
from hf_quant.formats import fields
from hf_quant.formats.matching import compact, is_skipped, matches, skip_keys
from hf_quant.grids import DOUBLE_QUANT_BLOCK, GridName, Scheme, levels
from hf_quant.tensor import DoubleQuant, QuantizedTensor

if TYPE_CHECKING:
    from hf_quant.plan import Plan

NAME = "bitsandbytes"
WEIGHT, ABSMAX, MAP = "weight", "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
_STATES: dict[GridName, str] = {grid: f"weight.quant_state.bitsandbytes__{grid}" for grid in ("nf4", "fp4")}
SUFFIXES = (WEIGHT, ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, *_STATES.values())
SCALE = ""  # no tensor tells the dtype that scales were chosen in: they are float32 or codes
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK = 64  # what transformers quantizes with, and the config does not say
VERSION = 1  # of our marker in the config

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CPU_ROWS = 32
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_DAMAGED = "the file is damaged; download or quantize it again."
_OTHER = "load it with stock transformers and bitsandbytes."


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that a module of this scheme has on disk, besides its bias."""
    nested = (NESTED_ABSMAX, NESTED_MAP) if scheme.double_quant else ()
    return (WEIGHT, ABSMAX, MAP, *nested, _STATES[scheme.grid])


def holds(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
    """Why this format cannot hold a layer; None when it can."""
    if scheme.grid not in _STATES:
        return f"{NAME} holds nf4 and fp4, not {scheme.label}; use format compressed-tensors"
    if kind not in ("Linear", "Conv1D"):
        return f"{NAME} quantizes nn.Linear and Conv1D, not {kind}"
    if len(shape) != 2:
        return f"{NAME} packs 2-D weights, not {list(shape)}"
    return _block_reason(scheme.group(shape[1]), shape[1])


def _block_reason(block: int, columns: int) -> str | None:
    if block not in BLOCKS:
        return f"blocks of {block} are not a power of two from {BLOCKS[0]} to {BLOCKS[-1]}"
    if columns % block:
        return f"blocks of {block} straddle its rows of {columns}, which bitsandbytes' own CPU kernel reads wrongly"
    return None


def encode(tensor: QuantizedTensor, *, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one module, byte for byte as bitsandbytes packs the same codes and scales.

    Args:
        tensor: on any device; plain scales in float32. ``Conv1D`` layers as ``[out, in]``.
        dtype: what the stock run time de-quantizes to: the model's dtype.
        name: module name for errors.

    Raises:
        FormatError: a scheme, block or dtype that the format cannot hold.
    """
    reason = holds(tensor.scheme, "Linear", tensor.shape)
    if reason is None and dtype not in _DTYPES.values():
        reason = f"bitsandbytes does not compute in {dtype}"
    if reason is None and tensor.scale is not None and tensor.scale.dtype != torch.float32:
        reason = f"its scales are {tensor.scale.dtype} and absmax is float32"
    if reason is not None:
        raise FormatError(f"{name or 'the weight'} cannot be written: {reason}.", "choose another scheme or format.")
    rows, columns = tensor.shape
    state: dict[str, Any] = {
        "quant_type": tensor.scheme.grid,
        "blocksize": tensor.scheme.group(columns),
        "dtype": _dtype_name(dtype),
        "shape": [rows, columns],
    }
    encoded = {
        WEIGHT: _swap_nibbles(tensor.packed).reshape(-1, 1),
        MAP: _quant_map(tensor.scheme.grid, tensor.device),
    }
    if tensor.nested is None:
        encoded[ABSMAX] = tensor.scales().reshape(-1)
    else:
        offset = float(tensor.nested.offset.item())
        if not math.isfinite(offset):
            raise FormatError(f"{name or 'the weight'}: the mean of its scales is {offset}.", "quantize it again.")
        encoded[ABSMAX] = tensor.nested.codes.reshape(-1)
        encoded[NESTED_ABSMAX] = tensor.nested.absmax
        encoded[NESTED_MAP] = tensor.nested.table
        state |= dict(zip(_NESTED_KEYS, (DOUBLE_QUANT_BLOCK, "float32", offset), strict=True))
    encoded[_STATES[tensor.scheme.grid]] = torch.frombuffer(bytearray(json.dumps(state), "utf-8"), dtype=torch.uint8)
    return encoded


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor:
    """The weight ``[out, in]`` of one module.

    Args:
        tensors: suffix (see ``SUFFIXES``) -> tensor, nothing else.
        scheme: what the module was built for; :func:`scheme_of` reads it from the tensors themselves.
        name: module name for errors.

    Raises:
        FormatError: a tensor is missing, unknown, damaged, or not what the scheme says; blocks that straddle rows.
    """
    state, found = _read_state(tensors, name)
    rows, columns = state["shape"]
    if found != replace(scheme, group_size=scheme.group(columns)):
        raise FormatError(
            f"{fields.label(name, _STATES[found.grid])} holds {found.label}, expected {scheme.label}.",
            "build the layer for the scheme that the file has (formats.bitsandbytes.scheme_of).",
        )
    groups = found.groups(columns)
    weight = fields.take(tensors, WEIGHT, name, (torch.uint8,), (rows * columns // 2, 1))
    quant_map = fields.take(tensors, MAP, name, (torch.float32,), (16,))
    if not torch.equal(quant_map.cpu(), levels(found.grid)):
        raise FormatError(f"{fields.label(name, MAP)} is not the table of {found.grid}.", _OTHER)
    packed = _swap_nibbles(weight).view(rows, columns // 2)
    if not found.double_quant:
        absmax = fields.take(tensors, ABSMAX, name, (torch.float32,), (rows * groups,))
        fields.check_finite(absmax, name, ABSMAX)
        return QuantizedTensor(packed, absmax.view(rows, groups), None, scheme, (rows, columns))
    blocks = -(-rows * groups // DOUBLE_QUANT_BLOCK)
    nested = DoubleQuant(
        codes=fields.take(tensors, ABSMAX, name, (torch.uint8,), (rows * groups,)).view(rows, groups),
        absmax=fields.take(tensors, NESTED_ABSMAX, name, (torch.float32,), (blocks,)),
        offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=weight.device),
        table=fields.take(tensors, NESTED_MAP, name, (torch.float32,), (256,)),
    )
    fields.check_finite(nested.absmax, name, NESTED_ABSMAX)
    fields.check_finite(nested.table, name, NESTED_MAP)
    return QuantizedTensor(packed, None, None, scheme, (rows, columns), nested)


def scheme_of(tensors: Mapping[str, torch.Tensor], *, name: str = "") -> Scheme:
    """The scheme that a module's tensors say they have (bitsandbytes' config does not tell the block size).

    Raises:
        FormatError: as :func:`decode`, for the quant_state.
    """
    return _read_state(tensors, name)[1]


def scheme_from_shapes(
    shapes: Mapping[str, Sequence[int]], in_features: int, out_features: int, *, name: str = ""
) -> Scheme | None:
    """The scheme of a module from the safetensors header alone: suffix -> shape; None when it is stored in float.

    Raises:
        FormatError: the shapes fit no scheme that :func:`decode` reads.
    """
    grids = [grid for grid, suffix in _STATES.items() if suffix in shapes]
    if not grids and ABSMAX not in shapes:
        return None
    if len(grids) != 1 or ABSMAX not in shapes:
        raise FormatError(f"{fields.label(name, WEIGHT)} has an incomplete quantization state.", _DAMAGED)
    count, elements = math.prod(shapes[ABSMAX]), in_features * out_features
    block = -(-elements // count) if count else 0
    reason = _block_reason(block, in_features)
    if reason is not None:
        raise FormatError(f"{name or 'the weight'} cannot be read: {reason}.", _OTHER)
    return Scheme(grids[0], 4, True, block, NESTED_ABSMAX in shapes)


def _read_state(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[dict[str, Any], Scheme]:
    """The parsed and checked quant_state, and the scheme that it stands for."""
    fields.check_suffixes(tensors, SUFFIXES, name, NAME)
    present = [grid for grid, suffix in _STATES.items() if suffix in tensors]
    if len(present) != 1:
        both = "missing" if not present else "there twice, as nf4 and as fp4"
        raise FormatError(f"{fields.label(name, 'weight.quant_state.bitsandbytes__nf4')} is {both}.", _DAMAGED)
    grid = present[0]
    where = fields.label(name, _STATES[grid])
    raw = fields.take(tensors, _STATES[grid], name, (torch.uint8,), (None,))
    try:
        state = json.loads(bytes(raw.cpu().tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not json: {error}.", _DAMAGED) from error
    nested = NESTED_ABSMAX in tensors
    expected = {"quant_type", "blocksize", "dtype", "shape", *(_NESTED_KEYS if nested else ())}
    if not isinstance(state, dict) or set(state) != expected:
        raise FormatError(f"{where} does not have the keys {sorted(expected)}.", _DAMAGED)
    shape, block = state["shape"], state["blocksize"]
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    for key, fits in (
        ("quant_type", state["quant_type"] == grid),
        ("blocksize", type(block) is int),
        ("dtype", isinstance(state["dtype"], str) and state["dtype"] in _DTYPES),
        ("shape", is_shape),
    ):
        if not fits:
            raise FormatError(f"{where} has {key}={state[key]!r}.", _DAMAGED)
    reason = _block_reason(block, shape[1])
    if reason is not None:
        raise FormatError(f"{where}: {reason}.", "quantize the model again with a block that divides its rows.")
    if nested:
        offset = state["nested_offset"]
        fits = isinstance(offset, float) and abs(offset) <= torch.finfo(torch.float32).max
        fits = fits and state["nested_dtype"] == "float32"
        if not fits or state["nested_blocksize"] != DOUBLE_QUANT_BLOCK:
            raise FormatError(f"{where} nests its scales as {[state[key] for key in _NESTED_KEYS]}.", _OTHER)
    return state, Scheme(grid, 4, True, block, nested)


def _swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Our even column is the low nibble, theirs the high one."""
    return (packed << 4) | (packed >> 4)


def _quant_map(grid: GridName, device: torch.device) -> torch.Tensor:
    return levels(grid, device) + 0.0  # their FP4 table has no negative zero


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quantization_config(plan: Plan, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of config.json as transformers' BitsAndBytesConfig saves it.

    Args:
        plan: which linear layers are quantized, and which are left in float (``llm_int8_skip_modules``, checked to skip
            exactly those under transformers' matching rules).
        dtype: the compute dtype, i.e. the model's; by default ``plan.scale_dtype``.

    Raises:
        FormatError: nothing is quantized, or a layer that the format cannot hold.
    """
    members: dict[Scheme, list[str]] = {}
    for layer in plan.quantized:
        assert layer.scheme is not None
        reason = holds(layer.scheme, layer.kind, layer.shape)
        if reason is not None:
            raise FormatError(f"{layer.name} cannot be written: {reason}.", "leave it in float or use another grid.")
        scheme = replace(layer.scheme, group_size=layer.scheme.group(layer.shape[1]))
        members.setdefault(scheme, []).append(layer.name)
    if not members:
        raise FormatError("the plan quantizes nothing.", "loosen skip and overrides.")
    universe = {layer.name for layer in plan.layers}
    ordered = sorted(members, key=lambda scheme: -len(members[scheme]))
    targets = {scheme: ["re:.*"] if len(ordered) == 1 else compact(members[scheme], universe) for scheme in ordered}
    float_linears = [layer.name for layer in plan.kept if layer.kind in ("Linear", "Conv1D")]
    return {
        "quant_method": NAME,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip_keys(float_linears, [layer.name for layer in plan.quantized]),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": ordered[0].grid,
        "bnb_4bit_use_double_quant": ordered[0].double_quant,
        "bnb_4bit_compute_dtype": plan.scale_dtype if dtype is None else _dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "hf_quant": {
            "version": VERSION,
            "schemes": [_scheme_entry(scheme, targets[scheme]) for scheme in ordered],
        },
    }


def _scheme_entry(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "grid": scheme.grid,
        "group_size": scheme.group_size,
        "double_quant": scheme.double_quant,
    }


def stock_loading(plan: Plan) -> str:
    """One sentence for the model card: what stock transformers needs to load this plan's checkpoint."""
    if plan.experts in ("merged", "apart"):
        return (
            "Stock transformers cannot load experts quantized by bitsandbytes (they come out wrong "
            "or not at all): `import hf_quant` before `from_pretrained(...)`."
        )
    sentence = "Stock transformers loads it with `pip install bitsandbytes accelerate` and no other argument."
    ragged = [layer.name for layer in plan.quantized if layer.shape[0] % _CPU_ROWS]
    if not ragged:
        return sentence
    return (
        f"{sentence[:-1]}; on x86 CPUs with AVX512-BF16 bitsandbytes itself refuses to run it, as the rows of "
        f"{ragged[0]} are not a multiple of {_CPU_ROWS}: `import hf_quant` there."
    )


class Resolver:
    """Module name -> Scheme or None, by transformers' rules; see :func:`read_config`."""

    def __init__(self, skips: Sequence[str], schemes: Sequence[tuple[list[str], Scheme]], default: Scheme) -> None:
        self._skips = skips
        self._schemes = schemes
        self._default = default

    def __call__(
        self, name: str, in_features: int, out_features: int, kinds: tuple[str, ...] = ("Linear",)
    ) -> Scheme | None:
        """The scheme of a module, or None when it is stored in float.

        Without our marker the block size is a guess (64): prefer :func:`scheme_from_shapes` or :func:`scheme_of`.

        Raises:
            FormatError: the blocks do not divide its rows.
        """
        if kinds[0] not in ("Linear", "Conv1D") or is_skipped(name, self._skips):
            return None
        named = (scheme for targets, scheme in self._schemes if any(matches(target, name) for target in targets))
        scheme = next(named, self._default)
        reason = holds(scheme, kinds[0], (out_features, in_features))
        if reason is not None:
            raise FormatError(f"the config quantizes {name} as {scheme.label}, but {reason}.", _OTHER)
        return scheme


def read_config(config: Mapping[str, Any], *, default_skips: Sequence[str] = ("lm_head",)) -> Resolver:
    """Parse a ``quantization_config``, ours or anyone's.

    Args:
        config: as in config.json.
        default_skips: what stays in float when the config names nothing: transformers then keeps the output head, tied
            weights and the last layer, which only the model can tell.

    Raises:
        FormatError: not bitsandbytes 4-bit, malformed, or packed in something other than uint8.
    """
    if config.get("quant_method", NAME) != NAME or config.get("load_in_4bit", config.get("_load_in_4bit")) is not True:
        raise FormatError("the config is not bitsandbytes 4-bit.", "hf-quant reads load_in_4bit checkpoints only.")
    grid = config.get("bnb_4bit_quant_type", "fp4")
    if grid not in _STATES:
        raise FormatError(f"bnb_4bit_quant_type is {grid!r}, not nf4 or fp4.", _OTHER)
    if config.get("bnb_4bit_quant_storage", "uint8") not in ("uint8", None):
        raise FormatError(f"bnb_4bit_quant_storage is {config['bnb_4bit_quant_storage']!r}, not uint8.", _OTHER)
    skips = config.get("llm_int8_skip_modules")
    if skips is not None and not (isinstance(skips, list) and all(isinstance(key, str) for key in skips)):
        raise FormatError("llm_int8_skip_modules is not a list of names.", "the config is damaged.")
    default = Scheme(grid, 4, True, DEFAULT_BLOCK, bool(config.get("bnb_4bit_use_double_quant")))
    return Resolver(default_skips if skips is None else skips, _read_marker(config.get("hf_quant")), default)


def _read_marker(marker: object) -> list[tuple[list[str], Scheme]]:
    damaged = FormatError("the hf_quant marker of the config is damaged.", _DAMAGED)
    if marker is None:
        return []
    if not isinstance(marker, Mapping) or "version" not in marker:
        raise damaged
    if marker["version"] != VERSION:
        raise FormatError(f"the config's hf_quant marker has version {marker['version']!r}.", "upgrade hf-quant.")
    try:
        return [
            (list(entry["targets"]), Scheme(entry["grid"], 4, True, entry["group_size"], entry["double_quant"]))
            for entry in marker["schemes"]
        ]
    except (KeyError, TypeError, ConfigError) as error:
        raise damaged from error
