"""Runs AutoRound: int4 symmetric, auto_round format, options ``group`` and ``iters``."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.peers.shared import Meter, read_job, stored_bits, write_float, write_report


def main() -> None:
    """Quantize, save, load the saved checkpoint again and read the weights from AutoRound's own layers."""
    job = read_job()
    torch.set_num_threads(job.threads)
    library: Any = importlib.import_module("auto_round")
    ids = job.calibration()
    batch = min(8, len(ids))
    samples: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    meter = Meter()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with meter.stage("load"):
        rounder = library.AutoRound(
            str(job.model),
            tokenizer=tokenizer,
            bits=4,
            group_size=job.options["group"],
            sym=True,
            iters=job.options["iters"],
            seqlen=ids.shape[1],
            nsamples=len(ids),
            batch_size=batch,
            dataset=DataLoader(samples, batch_size=batch),
            device_map="cpu",
            enable_torch_compile=False,  # compiling takes longer than quantizing a small model on a CPU
        )
    with meter.stage("quantize"):  # and save: it does both, block by block
        rounder.quantize_and_save(str(job.work / "saved"), format="auto_round")
    peak = meter.peak()
    del rounder
    directory = next(iter((job.work / "saved").rglob("*.safetensors"))).parent
    saved = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    weights = {}
    with torch.no_grad():
        for name, module in saved.named_modules():
            if hasattr(module, "qweight"):
                # The layer applied to unit vectors gives the columns of its weight, each a code times a scale. At
                # float32 nothing is added to anything but zeros, so this is exact.
                unit = torch.eye(module.infeatures, dtype=torch.float32)
                weights[f"{name}.weight"] = module.float()(unit).to(torch.float32).T
    count = write_float(job.model, job.out, weights)
    bits = stored_bits(directory, (".qweight", ".scales"))  # the zero points of a symmetric checkpoint are constants
    note = f"{job.options['iters']} steps"
    write_report(job, meter, version=version("auto-round"), bits=bits, weights=count, peak=peak, note=note)


if __name__ == "__main__":
    main()
