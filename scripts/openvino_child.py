"""Runs in an environment with optimum-intel and openvino-genai: what they make of one directory, for check_openvino.py.

Reads a JSON request from the standard input: ``directory``, ``ids`` (windows of token ids, all of one length),
``logits`` (the .npy to write, float32 ``[windows, length, vocabulary]``), ``prompt`` (a text), ``tokens`` (how many to
generate) and ``options`` (of OpenVINO's CPU plugin). Prints an object: ``ids`` of the prompt, the ``tokens`` that
optimum-intel generates, the ``text`` that openvino-genai does, the types of the ``weights`` that the plugin multiplies
with (and how often), ``attention`` (operations with the cache inside), and ``versions``.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PRODUCT = "FullyConnected"  # what the CPU plugin calls a product with a weight


def main() -> None:
    """Answer one request."""
    openvino: Any = importlib.import_module("openvino")
    optimum: Any = importlib.import_module("optimum.intel")
    genai: Any = importlib.import_module("openvino_genai")
    transformers: Any = importlib.import_module("transformers")
    request = json.load(sys.stdin)
    directory, wanted = Path(request["directory"]), request["tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = optimum.OVModelForCausalLM.from_pretrained(directory, ov_config=request["options"])
    found = []
    for window in torch.tensor(request["ids"]):
        row = window[None]
        found.append(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].numpy())
    np.save(request["logits"], np.stack(found))
    prompt = tokenizer(request["prompt"], add_special_tokens=False, return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=wanted, do_sample=False)
    operations = model.request.get_compiled_model().get_runtime_model().get_ops()
    layers = [(str(node.get_rt_info()["layerType"].astype(str)), node) for node in operations]
    weights = Counter(node.input_value(1).get_element_type().to_string() for kind, node in layers if kind == _PRODUCT)
    pipeline = genai.LLMPipeline(str(directory), "CPU", **request["options"])
    settings = genai.GenerationConfig(max_new_tokens=wanted, do_sample=False, apply_chat_template=False)
    answer = pipeline.generate([request["prompt"]], settings)
    print(
        json.dumps(
            {
                "ids": prompt["input_ids"][0].tolist(),
                "tokens": said[0, prompt["input_ids"].shape[1] :].tolist(),
                "text": answer.texts[0],
                "weights": dict(weights),
                "attention": sum("ScaledDotProductAttention" in kind for kind, _ in layers),
                "versions": {
                    "openvino": openvino.__version__.partition("-")[0],
                    "optimum-intel": version("optimum-intel"),
                    "transformers": transformers.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
