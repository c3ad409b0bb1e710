"""Runs bitsandbytes through stock transformers: NF4 blocks of 64, without calibration; option ``double``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from scripts.peers.shared import Meter, read_job, write_float, write_report


def main() -> None:
    """Quantize while loading, and expand with bitsandbytes' own code."""
    job = read_job()
    torch.set_num_threads(job.threads)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job.options["double"],
        bnb_4bit_compute_dtype=torch.float32,
    )
    meter = Meter()
    with meter.stage("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            job.model, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        )
    peak = meter.peak()
    functional: Any = __import__("bitsandbytes.functional", fromlist=["dequantize_4bit"])
    weights, bits = {}, 0.0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            bits += 8 * (module.weight.numel() + state.absmax.numel() * state.absmax.element_size())
            if state.nested:
                bits += 32 * state.state2.absmax.numel()
            weights[f"{name}.weight"] = functional.dequantize_4bit(module.weight.data, state)
    count = write_float(job.model, job.out, weights)
    write_report(job, meter, version=version("bitsandbytes"), bits=bits, weights=count, peak=peak)


if __name__ == "__main__":
    main()
