"""ExecuTorch programs in its runtime: do they compute and generate what the checkpoint does?

    python scripts/check_executorch.py [--model DIR] [--fill README.md] [--json FILE]

Each row quantizes the model, converts the checkpoint with ``hf-quant convert --to executorch`` (pip install
hf-quant[executorch]) and runs the program in ExecuTorch's runtime on this machine's CPU (XNNPACK): logits of windows in
one pass, and a greedy answer token by token through the cache. XNNPACK rounds the inputs of quantized layers to 8 bits,
which is where perplexity differs. Rows that ``--json`` holds from an earlier run
are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_gguf import perplexity  # type: ignore[import-not-found]
from executorch.runtime import Runtime
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_model,
    label_of,
    publish,
    record,
    recorded,
)
from torch.nn import functional
from transformers import AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.convert import convert
from hf_quant.export import executorch_file

_MARKS = ("<!-- table:executorch -->", "<!-- /table:executorch -->")
_CHAT = "What is the capital of France?"
_TEXT = "docs"
_TOKENS = 32
_HEAD = (
    "| checkpoint | MB | perplexity hf-quant | inputs rounded, in ExecuTorch | KL | same top token "
    "| same greedy tokens |"
)
_RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Case:
    """One row: its label, and how the model is quantized."""

    label: str
    options: dict[str, Any]


CASES = (
    Case("int4 sym g32", {"group_size": 32}),
    Case(
        "int4 sym g64, int8 embedding and head",
        {"group_size": 64, "overrides": {"embed_tokens": {"bits": 8, "group_size": -1}}},
    ),
    Case("int8 sym per channel", {"bits": 8, "group_size": -1}),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint (default: the demo's SmolLM2)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="search", help="how scales are chosen; it matters little here")
    parser.add_argument("--only", help="measure the rows whose label contains this, and print no table")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = options.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = built_in_windows(tokenizer, options.windows, options.length, seed=0)[_TEXT].ids
    chat = [{"role": "user", "content": _CHAT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    protocol = {
        "model": label_of(options.model),
        "windows": [options.windows, options.length],
        "method": options.method,
    }
    rows = recorded(options.json, protocol)
    for case in CASES:
        if case.label not in rows and (options.only or "") in case.label:
            with tempfile.TemporaryDirectory() as folder:
                rows[case.label] = measure(case, model, ids, prompt, Path(folder), options.method)
            print(json.dumps(rows[case.label]), file=sys.stderr, flush=True)
            record(options.json, {**protocol, "rows": list(rows.values())})
    if options.only:
        return
    with torch.no_grad():
        plain = perplexity(np.stack([float_model(model)(row[None]).logits[0].numpy() for row in ids]), ids)
    found = [rows[case.label] for case in CASES]
    note = (
        f"{label_of(options.model)} (float32: perplexity {plain:.3f}), {options.windows} windows of {options.length} "
        f"held-out tokens; executorch {found[0]['version']} on this CPU, the rest in float32. KL(hf-quant ‖ "
        f"ExecuTorch) in nats per token; greedy tokens of {_TOKENS} that are `generate`'s on the dequantized weights, "
        "up to the first difference."
    )
    publish([_HEAD, _RULE, *(line_of(row) for row in found), "", note], options.markdown, options.fill, _MARKS)


def measure(case: Case, model: Path, ids: torch.Tensor, prompt: list[int], folder: Path, method: str) -> dict[str, Any]:
    """The figures of one row."""
    from executorch import version

    hf_quant.quantize(str(model), HfQuantConfig(method=method, **case.options), folder / "quantized")
    convert(folder / "quantized", folder / "out", "executorch")
    # the reference kernel makes the float weight for every product; these are the same weights, made once
    reference = hf_quant.load(folder / "quantized", kernel="reference", dtype=torch.float32).dequantize()
    given = torch.tensor([prompt])
    with torch.no_grad():
        ours = np.stack([reference(row[None]).logits[0].numpy() for row in ids])
        answer = reference.generate(given, max_new_tokens=_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
    program = folder / "out" / executorch_file.FILE
    theirs = np.stack([executorch_file.run(program, row[None], ids.shape[1] // 2)[0].numpy() for row in ids])
    said = generated(program, given, len(answer))
    same = next((place for place, token in enumerate(said) if token != answer[place]), len(answer))
    first, second = (functional.log_softmax(torch.from_numpy(logits).double(), dim=-1) for logits in (ours, theirs))
    return {
        "key": case.label,
        "label": case.label,
        "bytes": program.stat().st_size,
        "perplexity": perplexity(ours, ids),
        "perplexity_executorch": perplexity(theirs, ids),
        "kl": float((first.exp() * (first - second)).sum(-1).mean()),
        "top1": float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        "same_tokens": same,
        "tokens": len(answer),
        "version": version.__version__,
    }


def generated(program: Path, given: torch.Tensor, count: int) -> list[int]:
    """The greedy tokens of a program after a prompt ``[1, tokens]``."""
    forward = Runtime.get().load_program(program).load_method("forward")
    logits = forward.execute([given, torch.arange(given.shape[1])])[0]
    found = [int(logits[0, -1].argmax())]
    while len(found) < count:
        place = torch.tensor([given.shape[1] + len(found) - 1])
        found.append(int(forward.execute([torch.tensor([found[-1:]]), place])[0][0, -1].argmax()))
    return found


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    return (
        f"| {row['label']} | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.3f} | {row['perplexity_executorch']:.3f} "
        f"| {row['kl']:.2g} | {row['top1']:.1%} | {row['same_tokens']} of {row['tokens']} |"
    )


if __name__ == "__main__":
    main()
