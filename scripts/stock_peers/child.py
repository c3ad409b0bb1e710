"""Runs where the stock loaders are and hf-quant is not: packs checkpoints, loads them, writes the logits down.

    python child.py JOBS.json

Every job names a float checkpoint, how it is quantized (``method`` and ``options``), the directory to write and the
dtype to compute in. Its logits and, when it fails, its error appear beside the checkpoint.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, CompressedTensorsConfig, GPTQConfig
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(3, 131).view(2, 64)
Pack = Callable[[torch.Tensor, "torch.Tensor | None"], dict[str, torch.Tensor]]


def block_layers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight ``[out, in]`` of every linear layer in a block, by name."""
    for name, module in model.named_modules():
        if any(part.isdecimal() for part in name.split(".")) and isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.detach().float()
            yield name, weight.t().contiguous() if isinstance(module, Conv1D) else weight


def steps(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round-to-nearest scales (representable in ``dtype``) and unsigned zero points, float32 ``[out, groups]``."""
    top = (1 << bits) - 1
    grouped = weight.view(weight.shape[0], -1, group)
    if symmetric:
        scale = grouped.abs().amax(-1).div(top / 2).to(dtype).float()
        return scale, torch.full_like(scale, (top + 1) / 2)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / top).to(dtype).float()
    return scale, (-low / scale).round().clamp(0, top)


def write(job: dict[str, Any], pack: Pack, config: dict[str, Any], dtype: torch.dtype) -> None:
    """A checkpoint whose block layers are packed, everything else in ``dtype``."""
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    state = {
        key: tensor.to(dtype).contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"
    }
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.detach().to(dtype)
    for name, weight in block_layers(model):
        del state[f"{name}.weight"]
        packed = pack(weight, state.get(f"{name}.bias"))
        state |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    out = Path(job["out"])
    out.mkdir(parents=True)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((Path(job["source"]) / "config.json").read_text(encoding="utf-8"))
    settings |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": config}
    (out / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_gptq(job: dict[str, Any]) -> None:
    """GPTQModel's own packer; ``act_order`` scatters the columns of a group over the row."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # type: ignore[import-not-found]
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module  # type: ignore[import-not-found]

    options = job["options"]
    bits, symmetric, act_order = options["bits"], options.get("sym", True), options.get("act_order", False)
    version = options.get("format", "gptq")

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        group = columns if options["group_size"] == -1 else options["group_size"]
        index = torch.arange(columns) // group
        order = torch.arange(columns)
        if act_order:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            index = torch.empty_like(index).index_copy_(0, order, index)
        scale, zero = steps(weight[:, order], bits, group, symmetric, torch.float16)
        linear = nn.Linear(columns, rows, bias=bias is not None)
        linear.weight.data = weight
        layer = TorchLinear(bits, options["group_size"], symmetric, act_order, columns, rows, bias=bias is not None)
        layer.pack(linear, scale, zero.to(torch.int32), index.to(torch.int32))
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, type("Config", (), {"bits": bits, "pack_dtype": torch.int32}))
        return {name: getattr(layer, name).data for name in ("qweight", "qzeros", "scales", "g_idx")}

    config = GPTQConfig(
        bits=bits, group_size=options["group_size"], sym=symmetric, desc_act=act_order, checkpoint_format=version
    )
    write(job, pack, json.loads(json.dumps(config.to_dict())), torch.float16)


def write_awq(job: dict[str, Any]) -> None:
    """GPTQModel's own packer of AWQ's gemm layout."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # type: ignore[import-not-found]

    group = job["options"]["group_size"]

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        scale, zero = steps(weight, 4, group, False, torch.float16)
        linear = nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        layer = AwqTorchLinear(4, group, False, False, columns, rows, register_buffers=True)
        layer.pack(linear, scale.half(), zero)
        return {name: getattr(layer, name).data for name in ("qweight", "qzeros", "scales")}

    config = AwqConfig(bits=4, group_size=group, zero_point=True)
    write(job, pack, json.loads(json.dumps(config.to_dict())), torch.float16)


def write_compressed_tensors(job: dict[str, Any]) -> None:
    """The library's own compressors, module by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    options = job["options"]
    bits, symmetric, group = options["bits"], options.get("sym", True), options["group_size"]
    channel = group == -1
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(options["format"])

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        scale, zero = steps(weight, bits, weight.shape[1] if channel else group, symmetric, torch.bfloat16)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
        if not symmetric:
            state["weight_zero_point"] = (zero - (1 << (bits - 1))).to(torch.int8)
        return dict(compressor.compress(state, scheme))

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=options["format"],
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    write(job, pack, json.loads(config.model_dump_json()), torch.bfloat16)


def write_bitsandbytes(job: dict[str, Any]) -> None:
    """Stock transformers with bitsandbytes quantizes and saves."""
    options = job["options"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options["quant_type"],
        bnb_4bit_use_double_quant=options["double_quant"],
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(job["out"])


WRITERS = {
    "gptq": write_gptq,
    "awq": write_awq,
    "compressed-tensors": write_compressed_tensors,
    "bitsandbytes": write_bitsandbytes,
}


CONFIGS = {"gptq": GPTQConfig, "awq": AwqConfig}


def logits(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the stock loader's model says.

    Of compressed-tensors, only symmetric pack-quantized ones load without ``dequantize=True``.
    """
    extra: dict[str, Any] = {}
    options = job["options"]
    if job["method"] == "compressed-tensors" and (options["format"] != "pack-quantized" or not options["sym"]):
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if "backend" in options:
        extra["quantization_config"] = CONFIGS[job["method"]](bits=4, backend=options["backend"])
    model = AutoModelForCausalLM.from_pretrained(job["out"], dtype=getattr(torch, job["dtype"]), **extra).eval()
    with torch.no_grad():
        return {"logits": model(torch.tensor(job.get("ids", IDS.tolist()))).logits.float().contiguous()}


def main(jobs: Path) -> None:
    """Do every job; what fails is written down and does not stop the others."""
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        out = Path(job["out"])
        try:
            if not out.exists():
                WRITERS[job["method"]](job)
            save_file(logits(job), out.parent / f"{out.name}.logits.safetensors")
        except Exception:  # what a stock loader raises is part of the answer
            (out.parent / f"{out.name}.error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    foreign = sorted(name for name in sys.modules if name.split(".")[0] == "hf_quant")
    if foreign:
        sys.exit(f"hf_quant was imported: {foreign[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
