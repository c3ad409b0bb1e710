"""Whether fused native code stands in for modules of transformers: an environment variable, and a switch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "HF_QUANT_FUSED"
_switch: ContextVar[bool | None] = ContextVar("hf_quant_fused", default=None)


@contextmanager
def switch(enabled: bool) -> Iterator[None]:
    """Inside, fused decoders run natively or not, whatever HF_QUANT_FUSED says."""
    token = _switch.set(enabled)
    try:
        yield
    finally:
        _switch.reset(token)


def enabled() -> bool:
    """Whether fused decoders run natively: unless HF_QUANT_FUSED is 0 or :func:`switch` says no."""
    chosen = _switch.get()
    return os.environ.get(VARIABLE) != "0" if chosen is None else chosen
