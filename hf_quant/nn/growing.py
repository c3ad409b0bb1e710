"""A layer of transformers' DynamicCache with room to spare, so that a new token is written and not concatenated."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_STEP = 64  # tokens; capacities are multiples of it
_SPARE = 256  # tokens of room when the storage is made


class Addresses:
    """Where the storages of all layers of one cache lie, for the fused decoder; copies of a cache start without."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None

    def take(self, layers: Sequence[GrowingLayer]) -> None:
        """Note the storages of ``layers``, which then belong to this object."""
        kind = ctypes.c_void_p * len(layers)
        self.keys = kind(*(layer.key_store.data_ptr() for layer in layers))
        self.values = kind(*(layer.value_store.data_ptr() for layer in layers))
        for layer in layers:
            layer.addresses = self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


class GrowingLayer(DynamicLayer):
    """Keys and values ``[batch, heads, length, head_dim]`` as views of storages with a larger third dimension.

    Whatever is assigned to ``keys`` and ``values`` (cropping, reordering and repeating do) takes their place; the fused
    decoder copies it into a storage of its own again. Nobody's tensor is ever written to: what was handed out as
    ``keys`` stays as it was, since only room behind it is filled.
    """

    key_store: torch.Tensor
    value_store: torch.Tensor

    def __init__(self) -> None:
        self.length = 0
        self.addresses: Addresses | None = None
        self.owned = False  # the storages hold `length` tokens; nothing was assigned since
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        super().__init__()

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer with what an initialised ordinary one holds."""
        found = cls()
        found.dtype, found.device = layer.dtype, layer.device
        found.keys, found.values = layer.keys, layer.values
        found.is_initialized = True
        return found

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: torch.dtype) -> GrowingLayer:
        """A layer that holds no tokens yet; ``shape`` is ``[batch, heads, 0, head_dim]``."""
        found = cls()
        found.dtype, found.device = dtype, torch.device("cpu")
        with torch.inference_mode(False):
            found.keys, found.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        found.is_initialized = True
        return found

    def own(self, room: int = 1) -> None:
        """Copy keys and values into storages with room for at least ``room`` more tokens."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        length = keys.shape[-2]
        capacity = -(-max(length + room + _SPARE, length + length // 2) // _STEP) * _STEP
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            stores = [t.new_empty((*t.shape[:2], capacity, t.shape[3])) for t in (keys, values)]
            for store, tensor in zip(stores, (keys, values), strict=True):
                store[:, :, :length].copy_(tensor)
        self.key_store, self.value_store = stores
        self.length, self.owned = length, True
        self.addresses = self._keys = self._values = None

    @property
    def room(self) -> int:
        """Tokens that can be appended to owned storages."""
        return self.key_store.shape[2] - self.length

    def _disown(self) -> None:
        if self.owned:
            self._keys, self._values = self.keys, self.values
            self.owned, self.addresses = False, None
            del self.key_store, self.value_store

    @property
    def keys(self) -> torch.Tensor | None:
        """``[batch, heads, length, head_dim]``."""
        return self.key_store[:, :, : self.length] if self.owned else self._keys

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._disown()
        self._keys = tensor

    @property
    def values(self) -> torch.Tensor | None:
        """``[batch, heads, length, head_dim]``."""
        return self.value_store[:, :, : self.length] if self.owned else self._values

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._disown()
        self._values = tensor

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length if self.owned else int(super().get_seq_length())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new, head_dim]``; all keys and values."""
        if not self._takes(key_states, value_states):
            found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        new = key_states.shape[-2]
        if self.room < new:
            self.own(new)
        end = self.length + new
        self.key_store[:, :, self.length : end].copy_(key_states)
        self.value_store[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.key_store[:, :, :end], self.value_store[:, :, :end]

    def _takes(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these can be written behind the others: same sizes, dtype and device, and no gradients asked for."""
        if not self.owned or (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)):
            return False
        pairs = ((keys, self.key_store), (values, self.value_store))
        return all(
            new.dtype == store.dtype
            and new.device == store.device
            and new.shape[:2] == store.shape[:2]
            and new.shape[3] == store.shape[3]
            for new, store in pairs
        )
