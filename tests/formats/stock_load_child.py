"""Runs in a process of its own: loads checkpoints with stock transformers only, and writes down what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

IDS = torch.arange(3, 27).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float().contiguous()


def packed_modules(model: Any) -> list[str]:
    """Modules that hold packed codes, by the tensors that they own."""
    names = {name for name, tensor in model.named_parameters() if tensor.dtype in (torch.int32, torch.uint8)}
    return sorted({name.rpartition(".")[0] for name in names})


def load(job: dict[str, Any], out: Path) -> dict[str, Any]:
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if job["dequantize"] else {}
    model, info = AutoModelForCausalLM.from_pretrained(job["path"], output_loading_info=True, **extra)
    keys = {key: sorted(map(str, value)) for key, value in info.items() if value}
    result = {"keys": keys, "packed": packed_modules(model), "dtype": str(model.dtype)}
    tensors = {}
    if job["kind"] == "bitsandbytes":
        tensors["dequantized"] = logits(AutoModelForCausalLM.from_pretrained(job["path"]).dequantize())
    tensors["logits"] = logits(model.eval())
    save_file(tensors, out / f"{job['name']}.safetensors")
    return result


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        try:
            results[job["name"]] = load(job, folder)
        except Exception as error:  # what stock transformers raises is part of the answer
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
    from bitsandbytes.functional import has_avx512bf16

    results["bfloat16 only"] = bool(has_avx512bf16())
    results["foreign"] = sorted(name for name in sys.modules if name.split(".")[0] == "hf_quant")
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
