"""Algorithms that turn a float weight into a QuantizedTensor, one file each.

The package can be called: ``hf_quant.quantize(model, config)`` is :func:`hf_quant.api.quantize`, because that is the
name users expect, and ``hf_quant.quantize.search`` is where its algorithms live.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`hf_quant.api.quantize`."""
        # imported at the call: the algorithms below must not depend on the interface above them
        from hf_quant.api import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
