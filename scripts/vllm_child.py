"""Runs in an environment with vLLM: what one checkpoint says to given tokens, for check_vllm.py.

Reads a JSON request from the standard input: ``model`` (a directory), ``dtype``, ``windows`` (token ids whose
probabilities are wanted), ``prompts`` (token ids to go on from, greedily, all at once) and ``tokens`` (how many).
Prints an object: vLLM's ``version``, ``logprobs`` (per window, of every token after the first, in nats), ``top`` (the
likeliest token at the same places) and ``generated`` (token ids per prompt).
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main() -> None:
    """Answer one request."""
    vllm: Any = importlib.import_module("vllm")
    request = json.load(sys.stdin)
    windows, prompts = request["windows"], request["prompts"]
    longest = max(len(ids) for ids in [*windows, *prompts]) + request["tokens"]
    # eager: compiling takes minutes; no tokenizer: random models have none
    options: dict[str, Any] = {"enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": longest + 1}
    model = vllm.LLM(model=request["model"], dtype=request["dtype"], enable_prefix_caching=False, **options)
    score = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    greedy = vllm.SamplingParams(max_tokens=request["tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    scored = model.generate([{"prompt_token_ids": ids} for ids in windows], score, use_tqdm=False)
    done = model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    logprobs, top = [], []
    for ids, output in zip(windows, scored, strict=True):
        places = list(zip(ids[1:], output.prompt_logprobs[1:], strict=True))
        logprobs.append([place[token].logprob for token, place in places])
        top.append([next(token for token, found in place.items() if found.rank == 1) for _, place in places])
    generated = [list(output.outputs[0].token_ids) for output in done]
    print(json.dumps({"version": vllm.__version__, "logprobs": logprobs, "top": top, "generated": generated}))


if __name__ == "__main__":
    main()
