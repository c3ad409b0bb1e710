"""Errors inside the model: of every block on its own stream, of every linear layer on the float model's inputs.

Folding (AWQ, Lin et al. 2023; ours is on by default) moves factors between layers: the function of the model stays, but
a layer's input or output channels are each multiplied by a constant. Such a layer, fed the float model's inputs as they
are, would seem to be wrong by as much as the factors differ from one. So the factors are estimated channel by channel
(least squares over the window's tokens), and the smaller one of the two errors counts: as it is, and with the factors
taken back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.depth_results import LayerDepth, LayerError
from hf_quant.evaluation.stream import LogitStream, states_in
from hf_quant.nn.switching import switch
from hf_quant.quantize.blocks import find_blocks

# What is held, one window at a time: the states behind every block, and in 16 bits what every linear layer got.
WINDOWS = 4
TOKENS = 256
FUSED_NOTE = "fused experts have no linear layers of their own: they are part of their block's error"

Sums = dict[str, list[tuple[float, float]]]


@dataclass
class LayerFinding:
    """(relative error, cosine) per name and window, both means over the window's tokens."""

    blocks: Sums = field(default_factory=lambda: defaultdict(list))
    linears: Sums = field(default_factory=lambda: defaultdict(list))


@torch.no_grad()
def layer_errors(
    reference: LogitStream, model: LogitStream, ids: torch.Tensor, advance: Callable[[], None] | None = None
) -> LayerFinding:
    """Compare a model with the float one inside, on windows ``ids [windows, length]``.

    Modules are found by their names in the float model; those that the other model lacks, or that do not take and give
    one tensor of states, are left out. Both run without fused decoders, so that their modules are called.
    """
    names = [name for name, module in reference.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    blocks = [block.name for block in find_blocks(reference.model, [*names, *_fused_experts(reference.model)])]
    theirs = dict(model.model.named_modules())
    if _width(reference.model) != _width(model.model):
        return LayerFinding()  # another model: nothing inside of it stands for anything inside of this one
    inside = [name for name in names if name in theirs and any(name.startswith(f"{block}.") for block in blocks)]
    blocks = [name for name in blocks if name in theirs]
    found = LayerFinding()
    with switch(False):
        for row in ids:
            _window(reference, model, row.unsqueeze(0), blocks, inside, theirs, found)
            if advance is not None:
                advance()
    return found


def _width(model: nn.Module) -> int | None:
    """Numbers per embedded token."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    return getattr(table, "embedding_dim", None)


def _window(
    reference: LogitStream,
    model: LogitStream,
    ids: torch.Tensor,
    blocks: Sequence[str],
    linears: Sequence[str],
    theirs: dict[str, nn.Module],
    found: LayerFinding,
) -> None:
    theirs_behind: dict[str, torch.Tensor] = {}
    theirs_into: dict[str, torch.Tensor] = {}
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the original too: while it lives, its id is its own
    errors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    dtype: torch.dtype = model.model.dtype  # type: ignore[assignment]

    def keep_behind(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (states := states_in(output)) is not None:
                theirs_behind[name] = states.clone()  # the next module may add in place

        return hook

    def keep_into(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # routed experts see other tokens in each model: nothing to estimate from
            if args and isinstance(args[0], torch.Tensor) and args[0].numel() == ids.numel() * args[0].shape[-1]:
                _, kept = copies.setdefault(id(args[0]), (args[0], args[0].to(torch.bfloat16, copy=True)))
                theirs_into[name] = kept

        return hook

    def against(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                layer, given = theirs[name], args[0].to(model.device, dtype)
                errors[name].append(_own_error(layer, given, theirs_into.get(name), output))

        return hook

    def judge(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = states_in(output)
            if states is not None and name in theirs_behind:
                relative, cosine = _compare(states, theirs_behind.pop(name))
                found.blocks[name].append((float(relative.mean()), float(cosine.mean())))

        return hook

    with _hooked([(theirs[name], keep_behind(name)) for name in blocks] + [(theirs[n], keep_into(n)) for n in linears]):
        model.hidden(ids)
    copies.clear()
    modules = dict(reference.model.named_modules())
    with _hooked([(modules[name], judge(name)) for name in blocks] + [(modules[n], against(n)) for n in linears]):
        reference.hidden(ids)
    for name, parts in errors.items():
        relative, cosine = (torch.cat([part[i] for part in parts]) for i in range(2))
        if len(relative):  # an expert that no token was sent to has none
            found.linears[name].append((float(relative.mean()), float(cosine.mean())))


def _own_error(
    layer: nn.Module, given: torch.Tensor, own: torch.Tensor | None, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative error and cosine per token of a layer on the float model's inputs.

    Args:
        layer: of the other model.
        given: ``[..., in]``, what the float model's layer got.
        own: ``[..., in]``, what the layer got in its own model; None where that cannot be paired with ``given``.
        expected: ``[..., out]``, what the float model's layer gave.
    """
    plain = _compare(expected, layer(given))
    if own is None or own.shape != given.shape or not plain[0].any():
        return plain
    answered = layer(given * _factors(given, own).to(given))
    unfolded = answered.float() / _factors(expected, answered).to(answered.device)
    folded = _compare(expected, unfolded)
    return folded if folded[0].mean() < plain[0].mean() else plain


def _factors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Per channel the factor that comes nearest to making ``theirs`` of ``ours`` (``[..., channels]``); 1 for none."""
    a, b = (x.reshape(-1, x.shape[-1]).float() for x in (ours, theirs.to(ours.device)))
    energy, product = a.square().sum(dim=0), (a * b).sum(dim=0)
    known = (energy > 0) & (product > 0)
    return torch.where(known, product / torch.where(known, energy, 1.0), 1.0)


def layer_result(
    measured: LayerFinding,
    floor: LayerFinding | None,
    text: str,
    ids: torch.Tensor,
    experts: bool,
    samples: int,
    seed: int,
) -> LayerDepth | None:
    """The recorded form; None where nothing inside could be compared.

    Args:
        measured, floor: the candidate, and the float model in another dtype.
        text: the name of the text that ``ids [windows, length]`` come from.
        experts: the model has fused experts.
        samples, seed: of the bootstrap over windows.
    """
    if not measured.blocks and not measured.linears:
        return None
    # equal to the last bit in every window: the same layer
    changed = {name: errors for name, errors in measured.linears.items() if any(relative for relative, _ in errors)}
    below = floor or LayerFinding()
    return LayerDepth(
        text=text,
        windows=ids.shape[0],
        tokens=ids.shape[1],
        blocks=_errors(measured.blocks, below.blocks, samples, seed),
        linears=_errors(changed, below.linears, samples, seed),
        linears_compared=len(measured.linears),
        notes=(FUSED_NOTE,) if experts else (),
    )


def has_fused_experts(model: nn.Module) -> bool:
    """Whether experts of the model lie in tensors of three dimensions instead of linear layers."""
    return bool(_fused_experts(model))


def _fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold the weights of several experts: ``[experts, rows, columns]``."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]


def _errors(errors: Sums, floors: Sums, samples: int, seed: int) -> tuple[LayerError, ...]:
    return tuple(
        LayerError(
            name=name,
            relative=_interval(values, samples, seed),
            cosine=float(np.mean([cosine for _, cosine in values])),
            noise_floor=_interval(floors[name], samples, seed) if len(floors.get(name, ())) > 1 else None,
        )
        for name, values in errors.items()
        if len(values) > 1
    )


def _interval(values: Sequence[tuple[float, float]], samples: int, seed: int) -> Any:
    return Bootstrap(len(values), min(samples, 1000), seed).interval(np.asarray([relative for relative, _ in values]))


def _compare(expected: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative error and cosine per token of ``[..., features]`` tensors, float32 ``[tokens]`` on the CPU."""
    a = expected.reshape(-1, expected.shape[-1]).float().cpu()
    b = actual.reshape(-1, actual.shape[-1]).float().cpu()
    norm, other = a.norm(dim=-1), b.norm(dim=-1)
    silent = norm == 0  # a token that a layer answers with zeros has no direction
    relative = (b - a).norm(dim=-1) / norm
    cosine = (a * b).sum(dim=-1) / (norm * other).clamp_min(torch.finfo(torch.float32).tiny)
    return relative[~silent], cosine[~silent]


@contextmanager
def _hooked(pairs: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
