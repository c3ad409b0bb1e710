"""QuantEmbedding: an embedding whose table is a QuantizedTensor, and the output head that shares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from hf_quant.errors import KernelError
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.nn.packed import PackedWeight, Ready
from hf_quant.tensor import QuantizedTensor

_SCALED = "ScaledWordEmbedding"  # transformers' embeddings that multiply what they look up by a constant


def is_embedding(module: nn.Module) -> bool:
    """Whether a module only looks rows up, and may multiply them by a constant: what QuantEmbedding can stand for."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    parts = type(module).__module__.split(".")
    scaled = parts[0] == "transformers" and type(module).__name__.endswith(_SCALED)
    return type(module) is nn.Embedding or (scaled and _constant(module) is not None)


def _constant(module: nn.Module) -> tuple[float, bool] | None:
    """What a ScaledWordEmbedding multiplies by, and whether that is first rounded to the dtype of the table."""
    rounded = isinstance(getattr(module, "embed_scale", None), torch.Tensor)
    found = getattr(module, "scalar_embed_scale" if rounded else "embed_scale", None)
    return (float(found), rounded) if isinstance(found, (int, float)) else None


class QuantEmbedding(PackedWeight):
    """``table[ids]`` with a packed table ``[num_embeddings, embedding_dim]``.

    Parameters: those of :class:`PackedWeight` and

        compute: no elements; its dtype is that of what is looked up, and follows ``.to(dtype)``. It comes first, so
            that the dtype of a model that starts with its embedding is not that of the scales. Not in state dicts.

    Args:
        in_features: columns of the table.
        out_features: rows of the table.
        scheme: grid, bits and group; the group divides ``in_features``.
        dtype: of what is looked up (the model's dtype).
        scale_dtype: of the stored scales on the int grids.
        device: where the (empty) parameters are made.
        kernel: ``auto`` or a kernel's name; of kernels that look rows up.
        activations: of a head that shares the table, as for :class:`PackedWeight`.
    """

    FLOATS: ClassVar[tuple[str, ...]] = ("compute",)
    LOOKS_UP: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        kernel: str = registry.AUTO,
        activations: str = registry.FLOAT,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            scheme,
            scale_dtype=scale_dtype,
            device=device,
            kernel=kernel,
            activations=activations,
        )
        # it has no data, so it needs no loader to fill it: never on the meta device, even while a skeleton is made
        self.compute = nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
        self._parameters = {"compute": self._parameters.pop("compute"), **self._parameters}
        self.constant: tuple[float, bool] | None = None  # see _constant
        self.padding_idx: int | None = None
        self.source: type[nn.Embedding] = nn.Embedding  # what it stands for

    @classmethod
    def standing_for(
        cls,
        module: nn.Embedding,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        kernel: str,
        activations: str,
    ) -> QuantEmbedding:
        """An empty one on the meta device in the place of a float embedding (see :func:`is_embedding`)."""
        layer = cls(
            module.embedding_dim,
            module.num_embeddings,
            scheme,
            dtype=module.weight.dtype,
            scale_dtype=scale_dtype,
            device="meta",
            kernel=kernel,
            activations=activations,
        )
        layer.padding_idx = module.padding_idx
        layer.constant = None if type(module) is nn.Embedding else _constant(module)
        layer.source = type(module)
        return layer.train(module.training)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.in_features

    def prepare(self, dtype: torch.dtype | None = None) -> registry.Selection:
        """As :meth:`PackedWeight.prepare`, by default for the dtype that it gives."""
        return super().prepare(dtype or self.compute.dtype)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those with data: accelerate looks each of them up in the files when it offloads the table."""
        return (found for found in super().named_parameters(*args, **kwargs) if found[1] is not self.compute)

    def _prepare(self, dtype: torch.dtype) -> Ready:
        # a loader puts the table on its device tensor by tensor; the device of a model is that of its first parameter
        if self.compute.device != self.weight.device and self.weight.device.type != "meta":
            self.compute.data = self.compute.data.to(self.weight.device)
        return super()._prepare(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` (int32 or int64) -> ``[..., embedding_dim]``; raises IndexError for an id outside."""
        dtype = self.compute.dtype
        ready = self._ready
        if self._is_offloaded():
            found = self._while_here(dtype, lambda here: here.selection.kernel.gather(ids, here.prepared, here.spec))
        else:
            if ready is None or ready.spec.dtype != dtype:
                ready = self._prepare(dtype)
            found = ready.selection.kernel.gather(ids, ready.prepared, ready.spec)
        if self.constant is None:
            return found
        factor, rounded = self.constant
        return found * torch.tensor(factor, dtype=dtype, device=found.device) if rounded else found * factor

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """The float embedding that this stands for, its table rounded once to ``dtype``."""
        factor, rounded = self.constant or (1.0, False)
        extra: dict[str, Any] = {} if self.constant is None else {"embed_scale": factor}
        with torch.device("meta"):
            found = self.source(self.num_embeddings, self.embedding_dim, self.padding_idx, **extra)
        found.weight = nn.Parameter(self.dequantize(dtype))
        if rounded:
            found.register_buffer("embed_scale", torch.tensor(factor, device=found.weight.device), persistent=False)
        return found.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}compute")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}compute": self.compute.data}, prefix, *args)

    def extra_repr(self) -> str:
        kernel = self.kernel_name or self.kernel_request
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.label}, kernel={kernel}"


class SharedHead(nn.Module):
    """``y = x @ dequantize(table).T + bias``, computed with the packed table of a :class:`QuantEmbedding`.

    Parameters:
        weight: that of the embedding, the very same object: to transformers the two are tied, as in the float model.
        bias: ``[out]`` in the model's dtype, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, table: QuantEmbedding, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, as a module may have only one parent
        self.weight = table.weight
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        )

    @property
    def table(self) -> QuantEmbedding:
        """The embedding that owns the weight."""
        return self._table[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.table.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.table.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]`` in ``x.dtype``; raises KernelError where the table is offloaded."""
        table = self.table
        if table.weight.device.type == "meta":
            raise KernelError(
                "the output head shares the table of an embedding that is offloaded.",
                "keep the embedding in memory (device_map), or quantize without naming it.",
            )
        ready = table.ready(x.dtype)
        return ready.selection.kernel.linear(x, ready.prepared, ready.spec, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SharedHead:
        # the embedding moves its table itself, in the canonical packing and without touching the dtype of its codes
        table = self.table
        self._parameters.pop("weight", None)
        super()._apply(fn, recurse)
        self._parameters["weight"] = table._parameters["weight"]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # the embedding hands out its table in another layout: a copy of this finds it there
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters["weight"] = self.table._parameters["weight"]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, shared"


def embedding_of(tensor: QuantizedTensor, module: nn.Embedding, kernel: str, activations: str) -> QuantEmbedding:
    """A QuantEmbedding around an existing tensor (not copied), in the place of a float embedding."""
    scales = tensor.scale.dtype if tensor.scale is not None else torch.float32
    layer = QuantEmbedding.standing_for(module, tensor.scheme, scales, kernel, activations)
    layer.assign(tensor)
    return layer
