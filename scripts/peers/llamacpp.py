"""Runs llama.cpp: an importance matrix, then options ``type`` (Q4_0, IQ4_NL, Q4_K_M); embeddings and head stay float.

The environment's ``bin`` holds llama-imatrix and llama-quantize, built by scripts/bench_peers.py from the sources that
the sdist of llama-cpp-python ships, with one line changed: llama-imatrix reads token ids instead of text, so that it
sees exactly the tokens that the other peers see.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from scripts.peers.shared import Meter, read_job, write_float, write_report

FULL_PRECISION = ("F32", "F16", "BF16")


def main() -> None:
    """Convert, compute the importance matrix, quantize; read back through gguf-py and transformers' name mapping."""
    job = read_job()
    source, programs = Path(os.environ["PEER_SOURCE"]), Path(os.environ["PEER_PROGRAMS"])
    ids = job.calibration()
    length = ids.shape[1]
    text, full, matrix = (job.work / name for name in ("ids.txt", "f32.gguf", "imatrix.gguf"))
    quantized = job.work / "quantized.gguf"
    text.write_text(" ".join(map(str, ids.flatten().tolist())), encoding="utf-8")
    meter = Meter()
    convert = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(job.model)]
    meter.call("load", [*convert, "--outtype", "f32", "--outfile", str(full)])
    threads = str(job.threads)
    sizes = ["-c", str(length), "-b", str(length), "-ub", str(length), "-t", threads, "--no-ppl"]
    meter.call(
        "quantize", [str(programs / "llama-imatrix"), "-m", str(full), "-f", str(text), "-o", str(matrix), *sizes]
    )
    keep = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
    command = [str(programs / "llama-quantize"), "--imatrix", str(matrix), *keep]
    meter.call("quantize", [*command, str(full), str(quantized), job.options["type"], threads])
    peak = meter.peak()

    sys.path.insert(0, str(source / "gguf-py"))
    gguf: Any = importlib.import_module("gguf")
    bits = 0.0
    types: dict[str, int] = {}
    stored: dict[str, Any] = {}
    for tensor in gguf.GGUFReader(quantized).tensors:
        if tensor.tensor_type.name not in FULL_PRECISION:
            bits += 8 * tensor.n_bytes
            stored[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type)
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    originals = {tensor.name: tensor.data for tensor in gguf.GGUFReader(full).tensors if tensor.name in stored}
    weights = in_float_order(job.model, gguf, stored, originals)
    count = write_float(job.model, job.out, weights)
    note = ", ".join(f"{number} {name}" for name, number in sorted(types.items()))
    write_report(job, meter, version=os.environ["PEER_VERSION"], bits=bits, weights=count, peak=peak, note=note)


def in_float_order(model: Path, gguf: Any, stored: dict[str, Any], originals: dict[str, Any]) -> dict[str, Any]:
    """The GGUF tensors under the float model's names, their rows in its order.

    llama.cpp's converter permutes the rows of some weights (rotary heads). The order is taken from the unquantized
    conversion, whose rows are the float model's bit for bit, so no architecture needs to be known here. Raises
    ValueError when a tensor is not a permutation of the rows of the weight it is named after.
    """
    import json

    import numpy as np
    import torch
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[config["model_type"]], layers)
    weights: dict[str, Any] = {}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                theirs = names.get_name(name, try_suffixes=(".weight",))
                if not name.endswith(".weight") or theirs not in stored:
                    continue
                float_rows = np.ascontiguousarray(file.get_tensor(name).to(torch.float32).numpy())
                position = {row.tobytes(): number for number, row in enumerate(originals[theirs])}
                order = [position.get(row.tobytes(), -1) for row in float_rows]
                if sorted(order) != list(range(len(float_rows))):
                    raise ValueError(f"the rows of {theirs} are not those of {name}")
                weights[name] = torch.from_numpy(np.ascontiguousarray(stored[theirs][order]))
    if len(weights) != len(stored):
        raise ValueError(f"{len(stored)} tensors are quantized, {len(weights)} were found in the float model")
    return weights


if __name__ == "__main__":
    main()
