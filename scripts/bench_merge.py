"""What merging LoRA into quantized weights costs: a short fine-tuning, merged by nearest and by stochastic rounding.

usage: python scripts/bench_merge.py [--model DIR] [--steps 24] [--rank 8] [--bits 4] [--group-size 32] [--tokens 128]

The model is quantized without data, LoRA of all its linear layers learns a few windows of the built-in texts, and the
updates are put into the weights, layer by layer. Printed: how much of the update survives (<merged - base, update> /
|update|^2) and how far the merged weights are from base + update (|merged - base - update| / |base + update|), both
averaged over the layers, when codes are rounded to the nearest and as hf-quant merges.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import built_in_windows, default_model, label_of  # type: ignore[import-not-found]
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.integrations.peft import LoraQuantLinear, merge_cost
from hf_quant.quantize.merge import MergeCost, MergeReport
from hf_quant.quantize.rounding import nearest_codes
from hf_quant.tensor import QuantizedTensor, pack_codes


def train(model: Any, ids: torch.Tensor, steps: int, rate: float) -> tuple[float, float]:
    """One window ``[1, tokens]`` per step, in turns; first and last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        window = ids[step % len(ids)].unsqueeze(0)
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses[0], losses[-1]


def nearest(base: QuantizedTensor, delta: torch.Tensor) -> MergeCost:
    """``base + delta`` on the scales of ``base``, every weight on its nearest code."""
    before = base.dequantize()
    target = before + delta
    group = base.scheme.group(base.shape[1])
    zero = None if base.zero_point is None else base.zero_point.reshape(-1).to(torch.float32)
    scale = base.scales().reshape(-1).to(torch.float32)
    codes = nearest_codes(target.reshape(-1, group), scale, zero, base.scheme).view(base.shape)
    after = replace(base, packed=pack_codes(codes, base.scheme.bits)).dequantize()
    kept = float(((after - before) * delta).sum() / delta.square().sum())
    return MergeCost("", base.scheme.label, float((after - target).norm() / target.norm()), kept)


def main() -> None:
    """Quantize, train, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path: Path = arguments.model or default_model()
    torch.manual_seed(0)
    config = HfQuantConfig(bits=arguments.bits, group_size=arguments.group_size)
    with quiet_loading():
        base = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    cuts = built_in_windows(AutoTokenizer.from_pretrained(path), 4, arguments.tokens, 0)
    ids = torch.cat([cut.ids for cut in cuts.values()])
    settings: dict[str, Any] = {"r": arguments.rank, "lora_alpha": 2 * arguments.rank, "lora_dropout": 0.0}
    model = get_peft_model(base, LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM"))
    first, last = train(model, ids, arguments.steps, arguments.rate)
    layers = [module for module in model.modules() if isinstance(module, LoraQuantLinear)]
    with torch.no_grad():
        costs = [nearest(layer.quant_layer.quantized(), layer.delta(["default"])) for layer in layers]
    reports = {"rounded to nearest": MergeReport.of(costs), "as hf-quant merges": merge_cost(model)}
    print(
        f"{label_of(arguments.model)}, {arguments.steps} steps of rank {arguments.rank}: loss {first:.3f} -> {last:.3f}"
    )
    for what, report in reports.items():
        print(
            f"{what}: {report.mean_kept:.1%} of the update survives, the weights differ from base + update by "
            f"{report.mean_error:.2%} ({len(report.layers)} layers)"
        )


if __name__ == "__main__":
    main()
