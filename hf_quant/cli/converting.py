"""``hf-quant convert``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import out, print_json, quiet_libraries


def convert(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the other one goes.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="compressed-tensors, gptq, awq, bitsandbytes, executorch, gguf, modelopt, onnx, openvino.",
            show_default=False,
        ),
    ],
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    round_scales: Annotated[
        bool, typer.Option("--round-scales", help="GGUF: scales may be rounded to float16; says what it changed.")
    ] = False,
    activations: Annotated[
        str, typer.Option("--activations", help="ONNX: int8 lets 4-bit layers round their inputs, which is faster.")
    ] = "float",
    json: o.Json = False,
) -> None:
    """Put a quantized checkpoint into another format: the same weights, packed differently, never quantized again.

    Refused, naming the layer and the reason, where the other format cannot hold a weight exactly: NF4 has no place on
    an integer grid, AWQ holds 4 bits only and no reordered columns, GPTQ and AWQ have one scheme for all layers and
    store float16 scales. GGUF (Q4_0, Q4_1, Q8_0; for llama.cpp, Ollama, LM Studio) holds int4, and symmetric int8, in
    groups of whole blocks of 32; its scales are float16, and so are the products of scales and zero points, which
    --round-scales allows to be rounded. ONNX (for onnxruntime and optimum) holds int4 in groups of a multiple of 16,
    and int8, of language models, text encoders and image models. OpenVINO holds everything but
    FP4 and fused experts, of causal language models. ExecuTorch (XNNPACK, for phones) holds symmetric int4 in groups of
    a multiple of 32, and int8 with a scale per output, of causal language models. ModelOpt's layout (for TensorRT-LLM)
    holds symmetric int4 in groups of 64 or 128, and int8 with a scale per output.

    [bold]Examples[/bold]

    hf-quant convert ./Llama-3.2-1B-GPTQ ./Llama-3.2-1B-ct --to compressed-tensors

    hf-quant convert ./out ./out-awq --to awq

    hf-quant convert ./out ./out-gguf --to gguf

    hf-quant convert ./out ./out-onnx --to onnx

    hf-quant convert ./out ./out-ov --to openvino
    """
    quiet_libraries()
    from hf_quant.convert import convert as run

    options = {"overwrite": overwrite, "trust_remote_code": trust_remote_code, "round_scales": round_scales}
    done = run(directory, output, to, activations=activations, **options)
    if json:
        print_json(asdict(done))
        return
    how = "exactly" if done.exact else "with rounded scales"
    out.print(f"{done.layers} layers from {done.source} to {done.target}, {how}: {output}", soft_wrap=True)
    for note in done.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
