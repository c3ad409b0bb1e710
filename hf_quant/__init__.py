"""hf-quant: int8 and int4 checkpoints for transformers, with scales that adapt and cards that tell the truth.

Importing it registers :class:`HfQuantConfig` with transformers and runs compressed-tensors, bitsandbytes 4-bit, GPTQ
and AWQ checkpoints on hf-quant's kernels (``hf_quant.disable()`` or HF_QUANT_RUNTIME=stock leaves them to their own).
Both happen as soon as transformers' quantizers are imported, and peft learns to train quantized layers as soon as its
LoRA model is; until then nothing heavy is imported, so ``hf-quant --help`` is quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError
from hf_quant.version import __version__

if TYPE_CHECKING:
    from hf_quant.api import LayerReport, inspect_model, load, quantize, save
    from hf_quant.comparison import compare
    from hf_quant.config import HfQuantConfig
    from hf_quant.hub import push, push_model
    from hf_quant.integrations.stock import disable, enable
    from hf_quant.nn.fused import FusedReport, describe_fused, fuse, unfuse
    from hf_quant.verification import verify

__all__ = [
    "FusedReport",
    "HfQuantConfig",
    "HfQuantError",
    "LayerReport",
    "__version__",
    "compare",
    "describe_fused",
    "disable",
    "enable",
    "fuse",
    "inspect_model",
    "load",
    "push",
    "push_model",
    "quantize",
    "save",
    "unfuse",
    "verify",
]

_PLUGIN = "hf_quant.integrations.stock"  # importing it registers and enables
_PLUGINS = {"transformers.quantizers": _PLUGIN, "peft.tuners.lora.model": "hf_quant.integrations.peft"}
_HOMES = {
    "HfQuantConfig": "hf_quant.config",
    "disable": _PLUGIN,
    "enable": _PLUGIN,
    **dict.fromkeys(("push", "push_model"), "hf_quant.hub"),
    "compare": "hf_quant.comparison",
    "verify": "hf_quant.verification",
    **dict.fromkeys(("FusedReport", "describe_fused", "fuse", "unfuse"), "hf_quant.nn.fused"),
    **dict.fromkeys(("LayerReport", "inspect_model", "load", "save"), "hf_quant.api"),
}


def __getattr__(name: str) -> Any:
    if name == "quantize":  # a package that can be called
        return importlib.import_module("hf_quant.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _After(MetaPathFinder):
    """Imports a plug-in right after the module that it plugs into, and leaves ``sys.meta_path``."""

    def __init__(self, trigger: str, plugin: str) -> None:
        self.trigger = trigger
        self.plugin = plugin

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary spec of the trigger, with one step more at the end of its execution."""
        if name != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(self.plugin)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for _trigger, _plugin in _PLUGINS.items():
    if _trigger in sys.modules:
        importlib.import_module(_plugin)
    else:
        sys.meta_path.insert(0, _After(_trigger, _plugin))
