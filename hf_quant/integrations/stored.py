"""What the safetensors headers of a checkpoint say about the modules of a model, before a tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_quant.errors import FormatError
from hf_quant.nn.splitting import is_fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass
class StoredModule:
    """The tensors of one module on disk.

    Attributes:
        name: in the file; another class of model, or another version of it, may call the module otherwise.
        shapes: suffix (``weight``, ``weight_packed``, ...) -> shape.
        dtypes: suffix -> safetensors dtype.
        files: suffix -> the file that holds it.
    """

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        """Whether it is quantized: it has more than a plain weight."""
        return bool(self.shapes.keys() - {"weight"})

    def read(self, suffix: str) -> torch.Tensor:
        """One of its tensors; raises FormatError when it has no such tensor."""
        if suffix not in self.files:
            raise FormatError(f"{self.name}.{suffix} is missing.", "the checkpoint is of another format, or damaged.")
        with safe_open(self.files[suffix], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(f"{self.name}.{suffix}")
        return found


def stored_modules(
    model: PreTrainedModel, files: Iterable[str] | None, suffixes: Iterable[str]
) -> dict[str, StoredModule] | None:
    """Module name of ``model`` -> its tensors on disk, renamed as transformers' loader will rename them.

    Args:
        model: the float skeleton, before any module is replaced.
        files: safetensors files; None when a state dict is loaded instead (the result is None then).
        suffixes: of the format's tensors.
    """
    if files is None:
        return None
    known = sorted({*suffixes, "weight"}, key=len, reverse=True)
    found: dict[str, StoredModule] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                suffix = next((s for s in known if key.endswith(f".{s}")), None)
                if suffix is None:
                    continue
                name = key.removesuffix(f".{suffix}")
                module = found.setdefault(name, StoredModule(name))
                header = file.get_slice(key)
                module.shapes[suffix], module.dtypes[suffix] = tuple(header.get_shape()), str(header.get_dtype())
                module.files[suffix] = str(path)
    return _renamed(model, found)


def missing_weights(model: PreTrainedModel, keys: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` (modules) whose weight is not among the ``keys`` of a checkpoint, renamed as when loading.

    Nothing is missed where the model's loader also splits or merges tensors, nor of experts that are fused in the files
    (under whatever name): then the keys alone do not tell.
    """
    found = {key.removesuffix(".weight"): StoredModule("") for key in keys if key.endswith(".weight")}
    if any(isinstance(conversion, WeightConverter) for conversion in get_model_conversion_mapping(model)):
        return []
    present = _renamed(model, found)
    fused = (f"{name}." for name, module in model.named_modules() if is_fused(module))
    names = list(names)
    inside = {prefix: [name for name in names if name.startswith(prefix)] for prefix in fused}
    whole = tuple(prefix for prefix, below in inside.items() if not any(name in present for name in below))
    return [name for name in names if name not in present and not name.startswith(whole)]


def scale_dtype(modules: Iterable[StoredModule], suffix: str) -> torch.dtype | None:
    """The dtype that most scales are stored in; None when there are none, or they are no floats."""
    counts = Counter(module.dtypes[suffix] for module in modules if suffix in module.dtypes)
    name = _DTYPES.get(counts.most_common(1)[0][0]) if counts else None
    return getattr(torch, name) if name else None


def _renamed(model: PreTrainedModel, found: Mapping[str, StoredModule]) -> dict[str, StoredModule]:
    parameters = model.state_dict()
    if all(f"{name}.weight" in parameters for name in found):
        return dict(found)
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    result = {}
    for name, module in found.items():
        key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, parameters)
        result[key.removesuffix(".weight")] = module
    return result
