"""The float output head while a model generates: few rows against a large weight, read at the speed of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_quant.kernels import native_decoder, native_library
from hf_quant.nn.forwards import StandIn
from hf_quant.nn.switching import enabled

MAX_ROWS = 8  # more are better done by a matrix product
# in float32 torch's own product of a row reads as fast
_DTYPES = {dtype: code for dtype, code in native_library.DTYPES.items() if dtype != torch.float32}


def head_of(model: Any) -> nn.Linear | None:
    """The float output head of a model, when it is a plain linear layer."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if type(found) is nn.Linear else None


class HeadForward(StandIn):
    """The forward of an ``nn.Linear``: native for a few rows in half precision without gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own forward."""
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and self.before is None:
            found = self._answer(args[0])
            if found is not None:
                return found
        return self.__wrapped__(*args, **kwargs)

    def _answer(self, x: Any) -> torch.Tensor | None:
        """``x [..., in]`` -> ``[..., out]``, or None for a call that is not for the native code."""
        head = self.module()
        if type(x) is not torch.Tensor or head is None or torch.is_grad_enabled() or not enabled():
            return None
        weight, bias, code = head.weight, head.bias, _DTYPES.get(x.dtype)
        if code is None or type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.stride(1) != 1:
            return None
        out, columns = weight.shape
        if (
            x.device.type != "cpu"
            or weight.device.type != "cpu"
            or x.shape[-1] != columns
            or weight.stride(0) < columns
        ):
            return None
        if not 0 < x.numel() <= MAX_ROWS * columns or native_decoder.unavailable() is not None:
            return None
        if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
            return None
        if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
            return None
        rows = x.contiguous()
        y = x.new_empty((*x.shape[:-1], out))
        status = native_decoder.float_linear()(
            weight.data_ptr(),
            weight.stride(0),
            out,
            columns,
            rows.data_ptr(),
            rows.numel() // columns,
            columns,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            out,
            code,
            torch.get_num_threads(),
        )
        native_library.check(status)
        return y
