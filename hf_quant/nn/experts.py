"""Fused experts taken apart: 3-D parameters of one module become a linear layer per expert and projection, and back.

transformers holds the experts of a layer as ``gate_up_proj [experts, 2*inter, hidden]`` (or ``up_proj``) and
``down_proj [experts, hidden, inter]``, some of them transposed, interleaved or with biases, and computes with them
through one interface (``transformers.integrations.moe.use_experts_implementation``). Everything else in hf-quant knows
linear layers, so the experts become linear layers, under the names that checkpoints have (``experts.3.gate_proj``).
The gating function stays the model's own. :mod:`hf_quant.nn.splitting` says which modules can be taken apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

GATED, PLAIN, DOWN = "gate_up_proj", "up_proj", "down_proj"
LEAVES = ("gate_proj", "up_proj", "down_proj")
_ROUTED = "_hf_quant_routed"


@dataclass(frozen=True)
class Layout:
    """How a module holds its experts.

    Attributes:
        gated: the first projection is gate and up in one; else there is no gate.
        transposed: weights are ``[experts, in, out]``.
        interleaved: gate and up alternate row by row, instead of following each other.
        biased: both projections have biases.
        batched: the module is given each expert's tokens (``[experts * tokens, hidden]``) instead of a routing.
        experts, hidden, inter: sizes.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    batched: bool
    experts: int
    hidden: int
    inter: int

    @property
    def first(self) -> str:
        """The parameter of the first projection."""
        return GATED if self.gated else PLAIN

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the fused parameters."""
        names = (self.first, DOWN)
        return (*names, *(f"{name}_bias" for name in names)) if self.biased else names


class Routed(NamedTuple):
    """Which tokens an input of an expert's layer is made of: int64 ``[n]``, of so many."""

    rows: torch.Tensor
    tokens: int

    @staticmethod
    def of(x: torch.Tensor) -> Routed | None:
        """What a layer's input was marked with; None outside of experts."""
        return getattr(x, _ROUTED, None)


class Expert(nn.Module):
    """The linear layers of one expert, under the names that its checkpoint has for gate, up and down."""


class SplitExperts(nn.Module):
    """Stands where fused experts were; same inputs, same outputs, one linear layer per expert and projection.

    Only experts that a token is routed to are computed. Each gets its tokens' rows in their order, and the shares of a
    token are added in the order of its top-k, whatever else is in the batch.

    Args:
        original: the module that it replaces; its parameters move into the linear layers (as views) and leave it.
        layout: of the original.
        leaves: names of gate, up and down within an expert.
    """

    def __init__(self, original: nn.Module, layout: Layout, leaves: Sequence[str] = LEAVES) -> None:
        super().__init__()
        self.layout = layout
        self.leaves = tuple(leaves)
        names = list(inspect.signature(type(original).forward).parameters)
        self._arguments = tuple(names[2:4])  # as the original calls them: the experts of each token, and their weights
        self._original = (original,)  # in a tuple, so that it is no submodule: its gating function is still used
        for name, child in original.named_children():
            self.add_module(name, child)
        values = {name: original.get_parameter(name) for name in layout.parameters}
        grad = any(value.requires_grad for value in values.values())
        pieces = split_fused({name: value.detach() for name, value in values.items()}, layout, self.leaves)
        for index in range(layout.experts):
            expert = Expert()
            for leaf in self.leaves:
                weight = pieces.get(f"{index}.{leaf}.weight")
                if weight is not None:
                    expert.add_module(leaf, _linear(weight, pieces.get(f"{index}.{leaf}.bias"), grad))
            self.add_module(str(index), expert)
        for name in layout.parameters:
            original._parameters[name] = None
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module that was replaced, without its parameters."""
        return self._original[0]

    def linears(self) -> Iterator[tuple[int, int, nn.Module]]:
        """(expert, which of gate, up and down, layer), in the order in which they are computed."""
        for index in range(self.layout.experts):
            for place, leaf in enumerate(self.leaves):
                layer = self.get_submodule(str(index))._modules.get(leaf)
                if layer is not None:
                    yield index, place, layer

    @torch.no_grad()
    def own(self) -> None:
        """Give what is still float memory of its own: views would keep all experts alive, and could not be saved."""
        for _, _, layer in self.linears():
            if type(layer) is nn.Linear and layer.weight.untyped_storage().nbytes() > layer.weight.nbytes:
                layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=layer.weight.requires_grad)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the module that it replaces: ``hidden_states [tokens, hidden]``, experts and weights ``[tokens, k]``."""
        if self.layout.batched:
            return self._batched(hidden_states)
        index, weights = (*args, *(kwargs[name] for name in self._arguments if name in kwargs))
        tokens, k = index.shape
        experts = index.reshape(-1)
        order = experts.argsort(stable=True)
        # what is no expert (another rank's, in expert parallelism) comes last, and gives nothing
        counts = torch.bincount(experts.clamp(max=self.layout.experts), minlength=self.layout.experts + 1).tolist()
        found = hidden_states.new_zeros(tokens * k, self.layout.hidden)
        start = 0
        for expert, count in enumerate(counts[: self.layout.experts]):
            if not count:
                continue
            places = order[start : start + count]
            start += count
            rows = places // k
            output = self._run(expert, hidden_states[rows], Routed(rows, tokens))
            found.index_copy_(0, places, output.to(found.dtype))
        weighted = found * weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _batched(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pieces = hidden_states.reshape(self.layout.experts, -1, self.layout.hidden)
        routed = Routed(torch.arange(pieces.shape[1], device=pieces.device), pieces.shape[1])
        return torch.cat([self._run(expert, piece, routed) for expert, piece in enumerate(pieces.unbind())])

    def _run(self, expert: int, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        layers = self.get_submodule(str(expert))._modules
        gate, up, down = (layers.get(leaf) for leaf in self.leaves)
        assert up is not None and down is not None
        _mark(x, routed)
        if gate is None:
            hidden = self.original.act_fn(up(x))  # type: ignore[operator]
        elif hasattr(self.original, "_apply_gate"):
            halves = gate(x), up(x)
            joined = torch.stack(halves, -1).flatten(-2) if self.layout.interleaved else torch.cat(halves, -1)
            hidden = self.original._apply_gate(joined)  # type: ignore[operator]
        else:
            gated = self.original.act_fn(gate(x))  # type: ignore[operator]
            hidden = gated * up(x)
        _mark(hidden, routed)
        output: torch.Tensor = down(hidden)
        if getattr(self.original, "has_post_expert_norm", False):
            output = self.original.post_expert_norm(output)  # type: ignore[operator]
        return output

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The original module, with parameters made of the linear layers (which must be float)."""
        layers = {(index, place): layer for index, place, layer in self.linears()}

        def stacked(place: int, leaf: str) -> torch.Tensor:
            return torch.stack([layers[index, place].get_parameter(leaf) for index in range(self.layout.experts)])

        def joined(leaf: str) -> torch.Tensor:
            if not self.layout.gated:
                return stacked(1, leaf)
            gate, up = stacked(0, leaf), stacked(1, leaf)
            return torch.stack((gate, up), 2).flatten(1, 2) if self.layout.interleaved else torch.cat((gate, up), 1)

        values = {self.layout.first: joined("weight"), DOWN: stacked(2, "weight")}
        if self.layout.transposed:
            values = {name: value.transpose(1, 2).contiguous() for name, value in values.items()}
        if self.layout.biased:
            values |= {f"{self.layout.first}_bias": joined("bias"), f"{DOWN}_bias": stacked(2, "bias")}
        grad = {p.requires_grad for p in self.parameters() if p.is_floating_point()}
        for name, value in values.items():
            self.original.register_parameter(name, nn.Parameter(value, requires_grad=True in grad))
        return self.original.train(self.training)


def _mark(x: torch.Tensor, routed: Routed) -> None:
    if not torch.compiler.is_compiling():
        setattr(x, _ROUTED, routed)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, grad: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=grad)
    return layer


def split_fused(values: dict[str, torch.Tensor], layout: Layout, leaves: Sequence[str]) -> dict[str, torch.Tensor]:
    """One fused tensor (of a checkpoint) -> the tensors of the experts' layers, by name below the module (views).

    Args:
        values: one of ``layout.parameters`` -> its tensor.
        layout: of the module.
        leaves: names of gate, up and down.
    """
    result: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        base, suffix = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        for index in range(layout.experts):
            piece = value[index].t() if layout.transposed and suffix == "weight" else value[index]
            if base == DOWN or not layout.gated:
                result[f"{index}.{leaves[2 if base == DOWN else 1]}.{suffix}"] = piece
                continue
            halves = (piece[::2], piece[1::2]) if layout.interleaved else piece.split(layout.inter)
            result |= {f"{index}.{leaf}.{suffix}": half for leaf, half in zip(leaves[:2], halves, strict=True)}
    return result
