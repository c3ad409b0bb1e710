"""The repeated blocks of a model: what is quantized, recorded and reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Block:
    """One member of the model's list of blocks.

    Attributes:
        name: of its module (``model.layers.3``).
        kind: its class, and the number of layers in it: blocks of one kind run the same code.
        layers: the layers to quantize in it.
    """

    name: str
    kind: str
    layers: tuple[str, ...]


def find_blocks(model: nn.Module, layers: Sequence[str]) -> list[Block]:
    """The outermost members of the model's module lists that hold one of ``layers``, in the model's order."""
    members: dict[str, list[str]] = {}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for layer in layers:
        parts = layer.split(".")
        for depth in range(1, len(parts)):
            if ".".join(parts[:depth]) in lists and depth + 1 < len(parts):
                members.setdefault(".".join(parts[: depth + 1]), []).append(layer)
                break
    blocks = []
    for name, inside in members.items():
        module = model.get_submodule(name)
        shape = ",".join(layer.removeprefix(name) for layer in inside)
        blocks.append(Block(name, f"{type(module).__name__}({shape})", tuple(inside)))
    return blocks
