"""Which kernels exist, what each must be able to do, and which one runs a layer and why.

Adding a kernel (native code included) takes one file with a :class:`Kernel` in it and one line in ``_ENTRIES`` below;
its module is imported only when a layer first asks for it. Everything else (forcing it by name or by environment
variable, listing it, falling through to the next one with the reason written down) follows from those two.

How a layer uses a kernel::

    selection = select(LayerSpec(scheme, out, in_, "cpu", torch.bfloat16))
    prepared = selection.kernel.prepare(tensor, spec)       # tensor.packed may now be dropped
    y = selection.kernel.linear(x, prepared, spec, bias)
    codes = selection.kernel.restore(prepared, spec)        # canonical bytes again, to save or to move the layer
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch

from hf_quant.errors import ConfigError, KernelError
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor

logger = logging.getLogger("hf_quant")
ENVIRONMENT_VARIABLE = "HF_QUANT_KERNEL"
ACTIVATIONS_VARIABLE = "HF_QUANT_ACTIVATIONS"
AUTO = "auto"
FLOAT, INT8 = "float", "int8"
ACTIVATIONS = (FLOAT, INT8)


@dataclass(frozen=True)
class LayerSpec:
    """Everything but the tensors that decides whether and how a kernel runs a layer.

    Attributes:
        scheme: grid, bits, group size.
        out_features: rows of the weight.
        in_features: columns of the weight.
        device: the device type: ``cpu``, ``cuda``, ...
        dtype: of the activations, hence of the output.
        activations: ``int8`` allows a kernel to round them to 8 bits on the fly; ``float`` does not.
    """

    scheme: Scheme
    out_features: int
    in_features: int
    device: str
    dtype: torch.dtype
    activations: str = FLOAT

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.scheme.group(self.in_features)

    @property
    def dtype_name(self) -> str:
        """``bfloat16`` for ``torch.bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """One phrase for messages: ``int4 sym g64 [2048, 576], bfloat16 activations on cpu``."""
        shape = f"[{self.out_features}, {self.in_features}]"
        return f"{self.scheme.label} {shape}, {self.dtype_name} activations on {self.device}"


@dataclass(frozen=True)
class Prepared:
    """What a kernel keeps of a weight: complete by itself, so that a forward pass needs nothing else.

    Attributes:
        weight: uint8, the codes in the layout of the kernel, which replace the canonical ones: kernels permute bytes
            and bits, they never hold a second copy of the codes. A tiled layout is padded to whole tiles, so the shape
            may differ from the canonical one.
        extras: everything else that the kernel reads, by a name of its own. The canonical ``scale`` and ``zero_point``
            are the tensor's own objects, not copies; derived tensors (scales in another dtype) are small.
        scale: scales in the layout of the kernel, when they replace the canonical ones; None leaves those alone.
        zero_point: likewise.

    It describes tensors where they are: a layer that moves to another device or dtype restores the codes, moves its
    canonical tensors and prepares again.
    """

    weight: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None


class Kernel(ABC):
    """One way to compute ``x @ dequantized(weight).T + bias``.

    Implementations hold no state of a layer. :meth:`linear` and :meth:`dequantize` are called inside torch.compile
    and under torch.inference_mode, and gradients must flow to ``x`` (see :mod:`hf_quant.kernels.autograd`).
    """

    name: ClassVar[str]
    relayouts: ClassVar[bool]  # prepare() changes the layout of the codes; when False, Prepared.weight IS tensor.packed
    activation_modes: ClassVar[tuple[str, ...]] = (FLOAT,)
    looks_up: ClassVar[bool] = False  # gather() reads single rows out of its layout

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all (package or instruction set missing); None when it can."""
        return None

    def missed(self) -> bool:
        """Whether layers that it would run should say once that it is not available."""
        return False

    @abstractmethod
    def unsupported(self, spec: LayerSpec) -> str | None:
        """Why it cannot run this layer, in one clause without a full stop; None when it can."""

    def activations(self, spec: LayerSpec) -> str:
        """What it will do with the activations of this layer: ``int8`` only where the layer allows it."""
        return FLOAT

    @abstractmethod
    def describe(self, spec: LayerSpec) -> str:
        """How it will run this layer, in one clause: ``torch int4pack for <= 8 rows, dequantized matmul above``."""

    @abstractmethod
    def prepare(self, tensor: QuantizedTensor, spec: LayerSpec) -> Prepared:
        """Bring a weight into the layout of this kernel; ``tensor`` is not changed."""

    @abstractmethod
    def restore(self, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        """The canonical packed codes, bit for bit those that :meth:`prepare` was given."""

    def restore_rows(self, tiled: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        """Scales or zero points ``[out, in/group]`` again, from this kernel's ``Prepared.scale`` or ``.zero_point``."""
        return tiled

    @abstractmethod
    def dequantize(self, prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]`` in ``dtype``: computed in float32 as ``grids.decode``, rounded once."""

    @abstractmethod
    def linear(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., in]`` (any leading dims, strided or not, no rows at all) -> ``[..., out]`` in ``x.dtype``."""

    def gather(self, ids: torch.Tensor, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        """Rows ``ids [...]`` of the weight -> ``[..., in]`` in the dtype of ``spec``, bit for bit :meth:`dequantize`.

        Raises:
            KernelError: this kernel does not look rows up (``looks_up`` is False).
            IndexError: an id outside of the weight.
        """
        raise KernelError(f"kernel {self.name} does not look rows up.", "kernel=auto takes one that does.")


@dataclass(frozen=True)
class Selection:
    """The kernel that runs a layer, one line that says why, and what the kernel does with the activations."""

    kernel: Kernel
    reason: str
    activations: str = FLOAT

    @property
    def label(self) -> str:
        """The kernel's name; where a kernel has a choice, what it does with the activations too."""
        name = self.kernel.name
        return name if len(self.kernel.activation_modes) == 1 else f"{name} ({self.activations} activations)"


@dataclass(frozen=True)
class _Entry:
    """A kernel by name.

    Attributes:
        name: what users type.
        target: ``module:class``, imported at first use.
        auto: whether automatic selection considers it for a layer, decided without importing it.
    """

    name: str
    target: str
    auto: Callable[[LayerSpec], bool]


# In order of preference: automatic selection takes the first one that wants the layer and can run it.
_ENTRIES: tuple[_Entry, ...] = (
    _Entry("native", "hf_quant.kernels.native:NativeKernel", lambda spec: spec.device == "cpu"),
    _Entry("cpu", "hf_quant.kernels.cpu:CpuKernel", lambda spec: spec.device == "cpu"),
    # on CPU its NF4/FP4 dequantization is native code, 1.3 to 4 times faster than the reference for few rows
    _Entry(
        "bitsandbytes",
        "hf_quant.kernels.bitsandbytes:BitsAndBytesKernel",
        lambda spec: spec.device == "cuda" or (spec.device == "cpu" and spec.scheme.grid != "int"),
    ),
    _Entry("reference", "hf_quant.kernels.reference:ReferenceKernel", lambda spec: True),
)


def names() -> tuple[str, ...]:
    """Every kernel that can be asked for, without ``auto``."""
    return tuple(entry.name for entry in _ENTRIES)


def check_name(name: str, where: str = "kernel") -> str:
    """``name`` when it is ``auto`` or a kernel; raises ConfigError with the nearest names otherwise."""
    known = (AUTO, *names())
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{where}={name!r} is not a kernel.", f"{hint}choose one of {', '.join(known)}.")


def check_activations(mode: str, where: str = "activations") -> str:
    """``mode`` when it is ``float`` or ``int8``; raises ConfigError otherwise."""
    if mode in ACTIVATIONS:
        return mode
    raise ConfigError(f"{where}={mode!r} is not a way to hold activations.", f"choose {' or '.join(ACTIVATIONS)}.")


def activations(requested: str) -> str:
    """What a layer asks for: the environment variable HF_QUANT_ACTIVATIONS where it is set, else ``requested``."""
    return check_activations(os.environ.get(ACTIVATIONS_VARIABLE) or requested, ACTIVATIONS_VARIABLE)


@cache
def get(name: str) -> Kernel:
    """The one instance of a kernel, imported on the first call; raises ConfigError for an unknown name."""
    check_name(name)
    entry = next((entry for entry in _ENTRIES if entry.name == name), None)
    if entry is None:
        raise ConfigError("kernel='auto' is a rule, not a kernel.", "call select() with a layer.")
    module, _, attribute = entry.target.partition(":")
    kernel: Kernel = getattr(importlib.import_module(module), attribute)()
    return kernel


def refusal(kernel: Kernel, spec: LayerSpec, allow_relayout: bool = True, looks_up: bool = False) -> str | None:
    """Why ``kernel`` cannot run a layer here; None when it can."""
    if kernel.relayouts and not allow_relayout:
        return "it changes the layout of the codes, which this layer does not allow"
    if looks_up and not kernel.looks_up:
        return "it does not look rows up, which an embedding needs"
    return kernel.unavailable() or kernel.unsupported(spec)


def select(spec: LayerSpec, requested: str = AUTO, allow_relayout: bool = True, looks_up: bool = False) -> Selection:
    """Choose the kernel of a layer.

    An explicit ``requested`` name wins over the environment variable HF_QUANT_KERNEL, which wins over ``auto``.

    Args:
        spec: the layer.
        requested: ``auto`` or one of :func:`names`.
        allow_relayout: whether the layout of the codes may change in memory.
        looks_up: whether rows of the weight are looked up (an embedding).

    Raises:
        ConfigError: an unknown name.
        KernelError: a kernel was asked for by name that cannot run this layer.
    """
    choice, origin = check_name(requested), "requested"
    if choice == AUTO:
        choice, origin = check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE), "environment"
    if choice != AUTO:
        return _forced(choice, origin, spec, allow_relayout, looks_up)
    declined: list[str] = []
    for entry in _ENTRIES:
        if not entry.auto(spec):
            continue
        kernel = get(entry.name)
        why_not = refusal(kernel, spec, allow_relayout, looks_up)
        if why_not is None:
            return _selection(kernel, spec, declined)
        declined.append(f"not {entry.name}: {why_not}")
        if kernel.missed() and allow_relayout and kernel.unsupported(spec) is None:
            _say_once(entry.name, why_not)
    raise KernelError(f"no kernel runs {spec.label}: {'; '.join(declined)}.", "leave this layer in float.")


def _forced(name: str, origin: str, spec: LayerSpec, allow_relayout: bool, looks_up: bool) -> Selection:
    kernel = get(name)
    why_not = refusal(kernel, spec, allow_relayout, looks_up)
    if spec.activations not in kernel.activation_modes:
        why_not = why_not or f"it computes with {FLOAT} activations only, and activations={spec.activations}"
    if why_not is None:
        how = f"{ENVIRONMENT_VARIABLE}={name}" if origin == "environment" else "asked for"
        return _selection(kernel, spec, [how])
    others = [o for o in names() if o != name and refusal(get(o), spec, allow_relayout, looks_up) is None]
    works = f"{' and '.join(others)} can run it" if others else "no other kernel can run it either"
    where = f"{ENVIRONMENT_VARIABLE}=" if origin == "environment" else "kernel="
    raise KernelError(f"{where}{name} cannot run {spec.label}: {why_not}.", f"{works}; kernel=auto chooses by itself.")


def _selection(kernel: Kernel, spec: LayerSpec, notes: list[str]) -> Selection:
    line = f"{spec.scheme.label}, {spec.dtype_name} activations: {kernel.describe(spec)}"
    if spec.activations not in kernel.activation_modes:
        notes = [*notes, f"activations={spec.activations} not used: this kernel computes with {FLOAT} ones"]
    return Selection(kernel, f"{line} ({'; '.join(notes)})" if notes else line, kernel.activations(spec))


@cache
def _say_once(name: str, why_not: str) -> None:
    logger.warning("hf-quant: slower kernels run instead of %s, because %s.", name, why_not)
