"""PackedWeight: a module around one QuantizedTensor that a kernel of the registry has in its own layout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from hf_quant.errors import FormatError
from hf_quant.grids import DOUBLE_QUANT_BLOCK, Scheme
from hf_quant.kernels import registry
from hf_quant.tensor import DoubleQuant, QuantizedTensor

# Layouts change in place, so only one thread may do it; layers are prepared once, so one lock for all is enough.
_PREPARE = threading.RLock()
_NESTED = ("weight_scale_absmax", "weight_scale_offset", "weight_scale_table")
Answer = TypeVar("Answer")


class Layouts:
    """Counts how often any layer changed its layout: what was derived from layouts asks whether to look again."""

    changes = 0


class Ready(NamedTuple):
    """A weight in the layout of the kernel that runs it."""

    selection: registry.Selection
    spec: registry.LayerSpec
    prepared: registry.Prepared


class PackedWeight(nn.Module):
    """What quantized layers have in common: the packed weight, its kernel, copies, moves and state dicts.

    Parameters (none of them trains), in the canonical packing of :mod:`hf_quant.tensor` until a kernel takes them:
        weight: uint8 ``[out, in]`` (8 bits) or ``[out, ceil(in/2)]`` (4 bits).
        weight_scale: ``[out, in/group]``; uint8 codes when the scales are double-quantized.
        weight_zero_point: uint8 ``[out, in/group]`` (asymmetric grids only).
        weight_scale_absmax, weight_scale_offset, weight_scale_table: float32, double-quantized scales only.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        scheme: grid, bits and group; the group divides ``in_features``.
        scale_dtype: of the stored scales on the int grids.
        device: where the (empty) parameters are made.
        kernel: ``auto`` or a kernel's name (see :mod:`hf_quant.kernels.registry`).
        activations: ``int8`` allows the kernel to round the activations to 8 bits on the fly, ``float`` does not; the
            environment variable HF_QUANT_ACTIVATIONS wins over it.
    """

    FLOATS: ClassVar[tuple[str, ...]] = ()  # parameters beside the weight's, in the dtype of the model
    LOOKS_UP: ClassVar[bool] = False  # rows of the weight are looked up, too

    REORDERS: ClassVar[bool] = False  # the columns of the weight are reordered

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        kernel: str = registry.AUTO,
        activations: str = registry.FLOAT,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.kernel_request = registry.check_name(kernel)
        self.activations_request = registry.check_activations(activations)
        # one attribute, so that a thread never sees the kernel of one call with the layout of another
        self._ready: Ready | None = None
        self._chosen: registry.Selection | None = None  # outlives the layout of an offloaded layer

        groups = scheme.groups(in_features)
        width = in_features if scheme.bits == 8 else (in_features + 1) // 2
        scales = out_features * groups

        def empty(*shape: int, kind: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False)

        self.weight = empty(out_features, width, kind=torch.uint8)
        if scheme.double_quant:
            self.weight_scale = empty(out_features, groups, kind=torch.uint8)
            self.weight_scale_absmax = empty(-(-scales // DOUBLE_QUANT_BLOCK), kind=torch.float32)
            self.weight_scale_offset = empty(kind=torch.float32)
            self.weight_scale_table = empty(256, kind=torch.float32)
        else:
            stored = scale_dtype if scheme.grid == "int" else torch.float32
            self.weight_scale = empty(out_features, groups, kind=stored)
        if scheme.symmetric:
            self.register_parameter("weight_zero_point", None)
        else:
            self.weight_zero_point = empty(out_features, groups, kind=torch.uint8)

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the weight, by name."""
        return {name: p for name, p in self._parameters.items() if p is not None and name not in self.FLOATS}

    def named_tensors(self, tensor: QuantizedTensor) -> dict[str, nn.Parameter]:
        """The parameters that hold ``tensor``, by name; raises FormatError when it belongs to another layer."""
        fits = (tensor.order is not None) == self.REORDERS
        if not fits or tensor.scheme != self.scheme or tensor.shape != (self.out_features, self.in_features):
            raise FormatError(
                f"{tensor.scheme.label} {list(tensor.shape)} does not fit a layer of "
                f"{self.scheme.label} [{self.out_features}, {self.in_features}].",
                "the checkpoint belongs to another model or config.",
            )
        found: dict[str, torch.Tensor | None] = {"weight": tensor.packed, "weight_zero_point": tensor.zero_point}
        if tensor.nested is None:
            found["weight_scale"] = tensor.scale
        else:
            found["weight_scale"] = tensor.nested.codes
            found.update(zip(_NESTED, (tensor.nested.absmax, tensor.nested.offset, tensor.nested.table), strict=True))
        return {k: nn.Parameter(v, requires_grad=False) for k, v in found.items() if v is not None}

    def assign(self, tensor: QuantizedTensor) -> None:
        """Make ``tensor`` the weight of this layer."""
        parameters = self.named_tensors(tensor)  # what does not fit leaves the layer as it is
        self.forget()
        for name, parameter in parameters.items():
            setattr(self, name, parameter)

    def quantized(self) -> QuantizedTensor:
        """The weight in the canonical packing, bit for bit what was loaded or assigned."""
        return self._stored()

    def _stored(self) -> QuantizedTensor:
        """What kernels run: the weight with its columns as they are stored."""
        with _PREPARE:
            found = {name: p.data for name, p in self._parameters.items() if p is not None} | self._canonical()
        nested, scale = None, None
        if self.scheme.double_quant:
            absmax, offset, table = (found[name] for name in _NESTED)
            nested = DoubleQuant(found["weight_scale"], absmax, offset, table)
        else:
            scale = found["weight_scale"]
        zero, shape = found.get("weight_zero_point"), (self.out_features, self.in_features)
        return QuantizedTensor(found["weight"], scale, zero, self.scheme, shape, nested)

    def _canonical(self) -> dict[str, torch.Tensor]:
        """In the canonical packing, by name: the parameters that a kernel has put into a layout of its own."""
        ready = self._ready
        if ready is None:
            return {}
        kernel, prepared, spec = ready.selection.kernel, ready.prepared, ready.spec
        found = {"weight": kernel.restore(prepared, spec)}
        for name, own in (("weight_scale", prepared.scale), ("weight_zero_point", prepared.zero_point)):
            if own is not None:
                found[name] = kernel.restore_rows(own, spec)
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out, in]``: computed in float32, rounded once to ``dtype``."""
        return self.quantized().dequantize(dtype)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def prepare(self, dtype: torch.dtype) -> registry.Selection:
        """Choose the kernel for activations of ``dtype`` and bring the weight into its layout (once).

        Raises:
            KernelError: a kernel was asked for by name that cannot run this layer.
        """
        return self._prepare(dtype).selection

    def _prepare(self, dtype: torch.dtype) -> Ready:
        with _PREPARE:
            activations = registry.activations(self.activations_request)
            device = self.weight.device.type
            spec = registry.LayerSpec(self.scheme, self.out_features, self.in_features, device, dtype, activations)
            ready = self._ready
            if ready is None or ready.spec != spec:
                self._restore()
                relayout = not self._is_offloaded()
                selection = registry.select(spec, self.kernel_request, relayout, self.LOOKS_UP)
                prepared = selection.kernel.prepare(self._stored(), spec)
                self.weight.data = prepared.weight
                if prepared.scale is not None:
                    self.weight_scale.data = prepared.scale
                if prepared.zero_point is not None and self.weight_zero_point is not None:
                    self.weight_zero_point.data = prepared.zero_point
                self._ready = ready = Ready(selection, spec, prepared)
                Layouts.changes += 1
                self._chosen = selection
            return ready

    def release(self) -> None:
        """Bring the weight back into the canonical packing; the next forward pass chooses a kernel again."""
        with _PREPARE:
            self._restore()
            self._chosen = None

    def forget(self) -> None:
        """Drop what a kernel prepared, without restoring it: the parameters are about to be replaced."""
        self._ready = None
        Layouts.changes += 1

    def _restore(self) -> None:
        for name, tensor in self._canonical().items():
            self._parameters[name].data = tensor  # type: ignore[union-attr]
        self.forget()

    def _is_offloaded(self) -> bool:
        # accelerate swaps the parameters of offloaded layers in and out around every call: a new layout would be lost
        hook = self.__dict__.get("_hf_hook")
        return hook is not None and bool(getattr(hook, "offload", False))

    @property
    def kernel_name(self) -> str | None:
        """The kernel that runs this layer, once it is chosen (at load, or at the first call)."""
        return None if self._chosen is None else self._chosen.kernel.name

    @property
    def kernel_reason(self) -> str | None:
        """Why that kernel, in one line."""
        return None if self._chosen is None else self._chosen.reason

    @property
    def kernel_label(self) -> str | None:
        """The kernel's name, and what it does with the activations where it has a choice."""
        return None if self._chosen is None else self._chosen.label

    def ready(self, dtype: torch.dtype) -> Ready:
        """The weight in its kernel's layout, for activations of ``dtype``; raises KernelError as :meth:`prepare`."""
        ready = self._ready
        return ready if ready is not None and ready.spec.dtype == dtype else self._prepare(dtype)

    def _while_here(self, dtype: torch.dtype, call: Callable[[Ready], Answer]) -> Answer:
        """Of an offloaded layer, whose weight is here for this call only: nothing that is made from it may stay."""
        self.forget()
        try:
            return call(self._prepare(dtype))
        finally:
            self.forget()

    # --- copies, moves, state dicts: always in the canonical packing -------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        self.release()
        packed = {id(p) for name, p in self._parameters.items() if p is not None and name not in self.FLOATS}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # .to(dtype) means the activations: the stored scales keep their dtype, and with it their values
            if id(tensor) in packed and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with _PREPARE:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self._canonical().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        with _PREPARE:
            state = self.__dict__.copy()
            canonical = self._canonical()
        state["_parameters"] = dict(self._parameters)
        for name, tensor in canonical.items():
            state["_parameters"][name] = nn.Parameter(tensor, requires_grad=False)
        state["_ready"] = state["_chosen"] = None
        return state
