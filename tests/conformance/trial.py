"""One architecture from end to end: plan, quantize on load, save, load again, also by stock transformers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from torch import nn
from transformers import CompressedTensorsConfig

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.formats import FORMATS
from hf_quant.plan import Plan
from hf_quant.skeleton import plan_directory

NEW_TOKENS = 4
ROUNDING = 0.02  # of float32 models, by loaders that round scales or weights to half precision


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        plan: of the directory.
        made: the plan of the model that was quantized on load.
        error: largest difference of the quantized model's output from that of the float model with the dequantized
            weights, relative to its largest value.
        moved: how far the float model's own output is from it, by the same measure.
        reloaded: largest difference of the output after saving and loading; 0 is exact.
        tokens: the same tokens are generated before and after; None where nothing is generated.
        keys: the dequantized model has the parameters that the float model has.
        kept: parameters that should have stayed as they were and did not.
        weights: relative error of the quantized weights.
        stock: what stock transformers does with the checkpoint: ``exact``, ``loads`` (to rounding) or what went wrong.
        promised: what is said of it in the model card.
    """

    plan: Plan
    made: Plan
    error: float
    moved: float
    reloaded: float
    tokens: bool | None
    keys: bool
    kept: tuple[str, ...]
    weights: float
    stock: str
    promised: str

    @property
    def share(self) -> float:
        """Of the parameters, those that are quantized."""
        return sum(q.numel for q in self.plan.quantized) / sum(q.numel for q in self.plan.layers if not _is_tied(q))


def _is_tied(layer: Any) -> bool:
    return layer.scheme is None and layer.note.startswith("tied to")


def outputs(model: nn.Module, case: Architecture) -> torch.Tensor:
    """The floating tensor that the model is for, flat."""
    with torch.no_grad():
        found = model(**case.inputs())
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return found[name].flatten().float()
    raise AssertionError(f"{case.name} gives {list(found)}")


def run(case: Architecture, directory: Path) -> Outcome:
    """Everything that a user does with a model, in float32 and data-free."""
    config = HfQuantConfig(method="absmax", **case.config)
    model = case.build()
    kind = type(model)
    model.save_pretrained(directory / "float")
    plan = plan_directory(directory / "float", config)
    quantized = kind.from_pretrained(directory / "float", quantization_config=config)
    exact = outputs(quantized, case)
    hf_quant.save(quantized, directory / "packed")
    again = kind.from_pretrained(directory / "packed")
    tokens = None
    if case.generates:
        both = [m.generate(**_prompt(case), max_new_tokens=NEW_TOKENS, do_sample=False) for m in (quantized, again)]
        tokens = torch.equal(*both)
    made = quantized.hf_quantizer.plan
    reloaded = float((outputs(again, case) - exact).abs().max())
    reference = quantized.dequantize()
    expected, plain = outputs(reference, case), outputs(model, case)
    size = float(expected.abs().max())
    before, after = dict(model.named_parameters()), dict(reference.named_parameters())
    same = before.keys() == after.keys()
    touched = {n for n in before if same and not torch.equal(before[n], after[n])}
    squares = [(before[n] - after[n]).square().sum() / before[n].square().sum() for n in touched]
    return Outcome(
        plan,
        made,
        float((expected - exact).abs().max()) / size,
        float((expected - plain).abs().max()) / size,
        reloaded,
        tokens,
        same,
        tuple(sorted(n for n in touched if before[n].dim() < 2)),
        max((math.sqrt(float(s)) for s in squares), default=0.0),
        _stock(kind, directory / "packed", case, expected),
        FORMATS[plan.format].stock_loading(plan),
    )


def _prompt(case: Architecture) -> dict[str, torch.Tensor]:
    return {name: value for name, value in case.inputs().items() if not name.startswith("decoder_")}


def _stock(kind: Any, directory: Path, case: Architecture, expected: torch.Tensor, **options: Any) -> str:
    hf_quant.disable()
    try:
        model, info = kind.from_pretrained(directory, output_loading_info=True, **options)
        lost = sorted(info["missing_keys"])
        if lost:
            return f"leaves {lost[0]} at random values"
        difference = float((outputs(model, case) - expected).abs().max() / expected.abs().max())
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if not options and is_packed_int(directory):
            found = _stock(
                kind, directory, case, expected, quantization_config=CompressedTensorsConfig(dequantize=True)
            )
            return f"{found} with dequantize=True" if found in ("exact", "loads") else found
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        hf_quant.enable()
    return "exact" if difference == 0 else "loads" if difference < ROUNDING else f"is off by {difference:.0%}"


def is_packed_int(directory: Path) -> bool:
    """Whether a checkpoint is in compressed-tensors' format."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return bool(config["quant_method"] == "compressed-tensors")
