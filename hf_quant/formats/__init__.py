"""On-disk formats: QuantizedTensor <-> state dict and Plan <-> quantization_config, one module per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from hf_quant.errors import FormatError
from hf_quant.formats import awq, bitsandbytes, compressed_tensors, gptq, int_quantized
from hf_quant.grids import GridName, Scheme
from hf_quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from hf_quant.plan import Plan


class Resolver(Protocol):
    """Module name -> its Scheme, or None when it is stored in float."""

    def __call__(
        self, name: str, in_features: int, out_features: int, kinds: tuple[str, ...] = ("Linear",)
    ) -> Scheme | None: ...


class Format(Protocol):
    """What a format module offers; see :mod:`hf_quant.formats.compressed_tensors` for each function's contract."""

    @property
    def NAME(self) -> str: ...

    @property
    def SUFFIXES(self) -> tuple[str, ...]: ...

    @property
    def SCALE(self) -> str: ...

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]: ...

    def holds(self, scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None: ...

    def encode(self, tensor: QuantizedTensor, *, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]: ...

    def decode(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor: ...

    def quantization_config(self, plan: Plan, *, dtype: torch.dtype | None = None) -> dict[str, Any]: ...

    def read_config(self, config: Mapping[str, Any]) -> Resolver: ...

    def stock_loading(self, plan: Plan) -> str: ...


@runtime_checkable
class Refined(Protocol):
    """A format whose tensors say more about the scheme than the config and the shapes do."""

    @property
    def PEEK(self) -> tuple[str, ...]: ...

    def refine(
        self, scheme: Scheme, read: Callable[[str], torch.Tensor], shape: tuple[int, int], name: str
    ) -> tuple[Scheme, bool]: ...


FORMATS: dict[str, Format] = {
    compressed_tensors.NAME: compressed_tensors,
    bitsandbytes.NAME: bitsandbytes,
    int_quantized.INT.NAME: int_quantized.INT,
    int_quantized.NAIVE.NAME: int_quantized.NAIVE,
    gptq.V1.NAME: gptq.V1,
    gptq.V2.NAME: gptq.V2,
    awq.NAME: awq,
}


def format_for(grid: GridName) -> str:
    """The name of the format that holds a grid."""
    return compressed_tensors.NAME if grid == "int" else bitsandbytes.NAME


def format_of(config: Mapping[str, Any]) -> str:
    """The name of the format that a ``quantization_config`` is written in.

    Raises:
        FormatError: another quantization method.
    """
    # configs written by old versions of transformers have no quant_method for bitsandbytes
    legacy = bitsandbytes.NAME if config.get("load_in_4bit") else None
    method = str(config.get("quant_method", legacy))
    if method == gptq.METHOD:
        method = str(config.get("checkpoint_format") or config.get("format") or gptq.V1.NAME)
        if method not in (gptq.V1.NAME, gptq.V2.NAME):
            raise FormatError(f"gptq is stored as {method!r}; hf-quant reads gptq and gptq_v2.", _OTHER)
    elif method == compressed_tensors.NAME:
        method = int_quantized.stored_as(config) or method
    if method not in FORMATS:
        raise FormatError(
            f"quant_method {method!r} is not a format of hf-quant.",
            "it reads compressed-tensors, bitsandbytes, gptq and awq checkpoints.",
        )
    return method


_OTHER = "load it with stock transformers."
