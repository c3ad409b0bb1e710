"""Runs in an environment with llama-cpp-python: tokens, logits and an answer of one GGUF file, for check_gguf.py.

Reads a JSON request from the standard input: ``file``, ``ids`` (windows of token ids, all of one length), ``logits``
(the .npy to write, float32 ``[windows, length, vocabulary]``), ``text`` and ``chat`` (may be empty). Prints an object:
``tokens`` of the text, and the greedy ``answer`` to the chat message.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

_ANSWER_TOKENS = 24


def main() -> None:
    """Answer one request."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    request = json.load(sys.stdin)
    ids = request["ids"]
    length = len(ids[0])
    # the cache of keys and values in float32 (the default is float16): only the weights are to be compared
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "n_threads": request["threads"]}
    model = llama_cpp.Llama(
        request["file"], n_ctx=max(length, 256), n_batch=length, logits_all=True, verbose=False, **options
    )
    found = np.empty((len(ids), length, model.n_vocab()), dtype=np.float32)
    for row, window in enumerate(ids):
        model.reset()
        model.eval(window)
        found[row] = model.scores[:length]
    np.save(request["logits"], found)
    answer = ""
    if request["chat"]:
        messages = [{"role": "user", "content": request["chat"]}]
        done = model.create_chat_completion(messages, temperature=0, max_tokens=_ANSWER_TOKENS)
        answer = done["choices"][0]["message"]["content"]
    tokens = model.tokenize(request["text"].encode(), add_bos=False, special=True)
    print(json.dumps({"tokens": tokens, "answer": answer, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
