"""How much less each layer loses when it is rounded under the Hessian of its inputs: what sensitivities do not know.

Sensitivities are estimated with data-free rounding. Calibrated rounding helps a layer the more, the more its inputs are
correlated, which differs by a factor of ten between layers: an allocation for calibrated models has to count it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_quant.calibration.statistics import token_rows
from hf_quant.grids import Scheme
from hf_quant.quantize.gptq import factorize, round_weight
from hf_quant.quantize.menu import LayerMenu, Menu
from hf_quant.quantize.sensitivity import take_samples
from hf_quant.quantize.sensitivity_record import Sensitivity
from hf_quant.quantize.weight import quantize_weight

ROWS = 64  # of each weight, spread over it
SAMPLES = 8
HELD_BYTES = 1 << 30  # of Hessians held at once; more layers take more passes


@torch.no_grad()
def calibrated_gains(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], menu: Menu, samples: int = SAMPLES
) -> dict[str, float]:
    """Per layer: tr(E H E^T) of Hessian-guided rounding over that of data-free search, both on the same scheme.

    Args:
        model: float, in evaluation mode.
        batches: keyword arguments of its forward; the first ``samples`` sequences are used.
        menu: the layers; each is judged on its narrowest scheme.
        samples: sequences.

    Returns:
        A ratio in (0, 1] for every layer; 1 where no token reached it.
    """
    taken = take_samples(batches, samples)
    gains = {}
    for part in _parts(menu.layers):
        hessians = {layer.name: torch.zeros(layer.shape[1], layer.shape[1]) for layer in part}
        with _watching(model, hessians):
            for sample in taken:
                model(**sample)
        for layer in part:
            gains[layer.name] = _gain(model, layer, hessians.pop(layer.name))
    return gains


def with_gains(sensitivity: Sensitivity, gains: Mapping[str, float]) -> Sensitivity:
    """The sensitivities of calibrated rounding."""
    layers = {
        name: replace(layer, costs={label: cost * gains.get(name, 1.0) for label, cost in layer.costs.items()})
        for name, layer in sensitivity.layers.items()
    }
    return replace(sensitivity, layers=layers)


def _gain(model: nn.Module, layer: LayerMenu, hessian: torch.Tensor) -> float:
    schemes = [choice.scheme for choice in layer.choices if choice.scheme is not None]
    if not schemes or not torch.any(hessian):
        return 1.0
    scheme = replace(_narrowest(schemes), double_quant=False)
    weight = model.get_parameter(f"{layer.name}.weight").detach()
    weight = (weight.t() if layer.kind == "Conv1D" else weight).to("cpu", torch.float32)
    rows = weight[:: max(1, len(weight) // ROWS)].contiguous()
    group = scheme.group(layer.shape[1])
    guided = round_weight(rows, scheme, factorize(hessian, group, layer.name)).tensor.dequantize() - rows
    plain = quantize_weight(rows, scheme, "search", name=layer.name).dequantize() - rows
    lost, before = (float(((error @ hessian) * error).sum()) for error in (guided, plain))
    return min(1.0, max(1e-3, lost / before)) if before > 0 else 1.0


def _narrowest(schemes: Sequence[Scheme]) -> Scheme:
    """The fewest bits, and of these the middle one of the groups (the largest is hardly ever chosen)."""
    narrow = [scheme for scheme in schemes if scheme.bits == min(s.bits for s in schemes)]
    ordered = sorted((s for s in narrow if s.group_size > 0), key=lambda s: s.group_size) or narrow
    return ordered[min(1, len(ordered) - 1)]


def _parts(layers: Sequence[LayerMenu]) -> Iterator[list[LayerMenu]]:
    part: list[LayerMenu] = []
    held = 0
    for layer in layers:
        size = 4 * layer.shape[1] ** 2
        if part and held + size > HELD_BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += size
    if part:
        yield part


@contextmanager
def _watching(model: nn.Module, hessians: Mapping[str, torch.Tensor]) -> Iterator[None]:
    def adding(hessian: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = token_rows(inputs[0], None).cpu()
            hessian.addmm_(rows.t(), rows)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(adding(h)) for name, h in hessians.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
