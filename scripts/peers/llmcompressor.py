"""Runs llm-compressor's GPTQ: int4 symmetric, compressed-tensors pack-quantized, options ``group``."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from scripts.peers.shared import Meter, read_job, stored_bits, write_float, write_report


def main() -> None:
    """Quantize, save, and load the saved checkpoint again with stock transformers, decompressed."""
    job = read_job()
    torch.set_num_threads(job.threads)
    compressor: Any = importlib.import_module("llmcompressor")
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    schemes: Any = importlib.import_module("compressed_tensors.quantization")
    datasets: Any = importlib.import_module("datasets")
    ids = job.calibration()
    samples = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    arguments = schemes.QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=job.options["group"],
    )
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)
    recipe = modifiers.GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    meter = Meter()
    with meter.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    with meter.stage("quantize"):
        compressor.oneshot(
            model=model,
            dataset=samples,
            recipe=recipe,
            batch_size=min(8, len(ids)),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
        )
    with meter.stage("save"):
        model.save_pretrained(job.work / "saved", save_compressed=True)
    peak = meter.peak()
    del model
    saved = AutoModelForCausalLM.from_pretrained(
        job.work / "saved", dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    weights = {}
    for name, module in saved.named_modules():
        if hasattr(module, "weight_scale"):
            weights[f"{name}.weight"] = module.weight
    count = write_float(job.model, job.out, weights)
    # It stores scales in the model's dtype (float32 here, whatever scale_dtype says), and they are counted as stored.
    bits = stored_bits(job.work / "saved", (".weight_packed", ".weight_scale"))
    note = f"damping {recipe.dampening_frac}, actorder {recipe.actorder}"
    write_report(job, meter, version=version("llmcompressor"), bits=bits, weights=count, peak=peak, note=note)


if __name__ == "__main__":
    main()
