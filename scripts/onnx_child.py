"""Runs in an environment with optimum-onnx: logits and greedy tokens of one exported directory, for check_onnx.py.

Reads a JSON request from the standard input: ``directory``, ``ids`` (windows of token ids, all of one length),
``logits`` (the .npy to write, float32 ``[windows, length, vocabulary]``), ``prompt`` (token ids), ``tokens`` (how many
to generate), ``threads`` and ``exact`` (no inputs of 8-bit layers are rounded). Prints an object: the generated
``tokens``, and ``versions``.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
import torch


def main() -> None:
    """Answer one request."""
    runtime: Any = importlib.import_module("onnxruntime")
    optimum: Any = importlib.import_module("optimum.onnxruntime")
    transformers: Any = importlib.import_module("transformers")
    request = json.load(sys.stdin)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    if request["exact"]:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    model = optimum.ORTModelForCausalLM.from_pretrained(request["directory"], session_options=options)
    windows = torch.tensor(request["ids"])
    found = []
    for window in windows:
        row = window[None]
        found.append(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].numpy())
    np.save(request["logits"], np.stack(found))
    prompt = torch.tensor([request["prompt"]])
    wanted = {"max_new_tokens": request["tokens"], "do_sample": False}
    with torch.no_grad():
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
    versions = {"onnxruntime": runtime.__version__, "transformers": transformers.__version__}
    print(json.dumps({"tokens": said[0, prompt.shape[1] :].tolist(), "versions": versions}))


if __name__ == "__main__":
    main()
