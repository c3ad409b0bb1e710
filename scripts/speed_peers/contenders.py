"""Who takes part in scripts/bench_generate.py: what each row is called, which process runs it, with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OURS = "hf-quant"
# Data-free absmax scales are made in a second and run as fast as any others of the same format.
_INT4 = {"bits": 4, "method": "absmax"}
# What each environment is made of, besides torch.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "llamacpp": ("transformers==5.23.0", "numpy", "safetensors", "sentencepiece", "PyYAML"),
    "openvino": ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0"),
    "torchao": ("torchao==0.18.0", "transformers==5.23.0"),
}
_HEAD = {"lm_head": {"bits": 4}}
_HEAD8 = {"lm_head": {"bits": 8}}  # llama.cpp's Q4_0 files hold the head in 6 or 8 bits


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        name: the runtime.
        layout: what it runs: number format, and the options that tell its rows apart.
        module: the file under scripts/speed_peers that serves it.
        options: passed to the module's ``load``.
        environment: its virtual environment; None is the interpreter that runs the benchmark.
        extra: only measured when it is asked for with --all or named by --only.
    """

    name: str
    layout: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    extra: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} | {self.layout}"


def contenders(group: int) -> list[Contender]:
    """All rows, ours first; ``group`` is our int4 rows' group size."""
    int4 = f"int4 g{group}"

    def ours(layout: str, compiled: bool = False, extra: bool = False, **config: Any) -> Contender:
        config = {**_INT4, "group_size": group, **config}
        options = {"library": "hf_quant", "config": config, "compile": compiled}
        return Contender(OURS, layout, "generate", options, extra=extra)

    found = [
        ours(int4),
        ours(f"{int4}, int8 activations", activations="int8"),
        ours(f"{int4}, int8 head", overrides=_HEAD8),
        ours(f"{int4}, int8 head, int8 activations", overrides=_HEAD8, activations="int8"),
        ours(f"{int4}, int4 head", overrides=_HEAD),
        ours(f"{int4}, int4 head, int8 activations", overrides=_HEAD, activations="int8"),
        ours(f"{int4}, compiled", compiled=True, extra=True),
        ours(f"{int4}, int4 head, int8 activations, compiled", True, True, overrides=_HEAD, activations="int8"),
        ours("int8 g128", extra=True, bits=8, group_size=128),
        ours("nf4 g64", extra=True, bits=None, grid="nf4", group_size=64),
        Contender("transformers", "bf16", "generate", {"library": "float", "dtype": "bfloat16"}),
        Contender("transformers", "float32", "generate", {"library": "float", "dtype": "float32"}, extra=True),
    ]
    compiled = {"library": "float", "dtype": "bfloat16", "compile": True}
    found.append(Contender("transformers", "bf16, compiled", "generate", compiled, extra=True))
    found.append(Contender("bitsandbytes", "nf4 g64", "generate", {"library": "bitsandbytes"}))
    found += [
        Contender("llama.cpp", kind, "llamacpp", {"type": kind}, "llamacpp") for kind in ("Q4_0", "Q8_0", "Q4_K_M")
    ]
    found += [
        Contender("OpenVINO GenAI", f"int4 g{group}", "genai", {"type": "int4", "group": group}, "openvino"),
        Contender("OpenVINO GenAI", "int8", "genai", {"type": "int8"}, "openvino"),
    ]
    torchao = {"library": "torchao", "group": group, "compile": True}
    found.append(Contender("torchao", f"{int4}, compiled", "generate", torchao, "torchao", extra=True))
    return found
