"""Runs GPTQModel with its defaults: int4 symmetric, GPTQ format, options ``group``."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

import torch

from scripts.peers.shared import Meter, read_job, stored_bits, write_float, write_report


def main() -> None:
    """Quantize, save, load the saved checkpoint again and expand it with GPTQModel's own code."""
    job = read_job()
    torch.set_num_threads(job.threads)
    library: Any = importlib.import_module("gptqmodel")
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.calibration()]
    meter = Meter()
    config = library.QuantizeConfig(bits=4, group_size=job.options["group"], sym=True)
    with meter.stage("load"):
        model = library.GPTQModel.load(str(job.model), config, device="cpu", dtype=torch.float32)
    with meter.stage("quantize"):
        model.quantize(samples, batch_size=8)
    with meter.stage("save"):
        model.save(str(job.work / "saved"))
    peak = meter.peak()
    del model
    saved = library.GPTQModel.load(
        str(job.work / "saved"), device="cpu", backend=library.BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    weights = {}
    for name, module in saved.model.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.to(torch.float32)  # its runtime multiplies at float16
            weights[f"{name}.weight"] = module.dequantize_weight().to(torch.float32).T
    count = write_float(job.model, job.out, weights)
    # A symmetric checkpoint also has zero points and group indices; they are constants.
    bits = stored_bits(job.work / "saved", (".qweight", ".scales"))
    note = f"damping {config.damp_percent}, desc_act {config.desc_act}, act_group_aware {config.act_group_aware}"
    write_report(job, meter, version=version("gptqmodel"), bits=bits, weights=count, peak=peak, note=note)


if __name__ == "__main__":
    main()
