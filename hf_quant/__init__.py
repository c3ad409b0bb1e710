"""hf-quant: int8 and int4 checkpoints for transformers, with scales that adapt and cards that tell the truth.

Importing it registers :class:`HfQuantConfig` with transformers and runs compressed-tensors and bitsandbytes 4-bit
checkpoints on hf-quant's kernels (``hf_quant.disable()`` or HF_QUANT_RUNTIME=stock leaves them to their own).
"""

from hf_quant.api import LayerReport, inspect_model, load, quantize, save
from hf_quant.config import HfQuantConfig
from hf_quant.errors import HfQuantError
from hf_quant.integrations.transformers import disable, enable, enable_by_default
from hf_quant.version import __version__

enable_by_default()

__all__ = [
    "HfQuantConfig",
    "HfQuantError",
    "LayerReport",
    "__version__",
    "disable",
    "enable",
    "inspect_model",
    "load",
    "quantize",
    "save",
]
