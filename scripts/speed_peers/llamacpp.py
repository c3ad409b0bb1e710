"""Serves llama.cpp: converts and quantizes with its own programs, measures with llama-bench and llama-batched-bench.

Each measurement is a process of its own that warms up before it is timed (its weights are mapped and repacked, which is
not). PEER_SOURCE and PEER_PROGRAMS say where its sources and programs are.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.speed_peers.protocol import serve

SOURCE, PROGRAMS = (Path(os.environ.get(name, "")) for name in ("PEER_SOURCE", "PEER_PROGRAMS"))
_PAD = 256  # llama.cpp rounds the context of a sequence up to this many tokens


class LlamaCpp:
    """The GGUF file of this process."""

    def __init__(self) -> None:
        self.file = Path()
        self.threads = 1

    def convert(self, model: str, target: str, options: dict[str, Any], threads: int) -> dict[str, Any]:
        """Write the GGUF file ``target`` of ``options["type"]``, by way of a bfloat16 one that is removed again.

        llama-quantize keeps its defaults: the head (and with it a tied embedding) becomes Q6_K in the 4-bit files.
        """
        full = Path(f"{target}.bf16")
        try:
            convert = [sys.executable, str(SOURCE / "convert_hf_to_gguf.py"), model, "--outtype", "bf16"]
            run([*convert, "--outfile", str(full)])
            run([str(PROGRAMS / "llama-quantize"), str(full), target, options["type"], str(threads)])
        finally:
            full.unlink(missing_ok=True)
        return {}

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Note the file; returns the bytes of weights that a token reads."""
        self.file, self.threads = Path(model), threads
        sys.path.insert(0, str(SOURCE / "gguf-py"))
        gguf: Any = importlib.import_module("gguf")
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(self.file).tensors}
        if "output.weight" in sizes:  # else the embedding is the output head too
            sizes.pop("token_embd.weight")
        return {"version": os.environ["PEER_VERSION"], "token_bytes": sum(sizes.values())}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds of a batch of ``tokens``."""
        return self._bench(tokens, ["-p", str(tokens), "-n", "0"])

    def decode(self, sequences: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds of ``tokens`` steps after a prompt."""
        if sequences == 1:
            return self._bench(tokens, ["-p", "0", "-n", str(tokens), "-d", str(prompt)])
        room = -(-(prompt + tokens) // _PAD) * _PAD * sequences
        sizes = ["-c", str(room), "-npp", str(prompt), "-ntg", str(tokens), "-npl", str(sequences)]
        command = [str(PROGRAMS / "llama-batched-bench"), "-m", str(self.file), "-t", str(self.threads), *sizes]
        return batched_figures(run([*command, "--output-format", "jsonl"]))

    def _bench(self, tokens: int, sizes: list[str]) -> dict[str, Any]:
        command = [str(PROGRAMS / "llama-bench"), "-m", str(self.file), "-t", str(self.threads), "-r", "1"]
        (test,) = json.loads(run([*command, *sizes, "-o", "json"]))
        return {"tokens": tokens, "seconds": test["samples_ns"][0] / 1e9}


def batched_figures(output: str) -> dict[str, Any]:
    """What llama-batched-bench's line of JSON says of the generation. Raises ValueError when there is none."""
    for line in output.splitlines():
        if line.startswith("{"):
            test = json.loads(line)
            return {"tokens": test["pl"] * test["tg"], "seconds": test["t_tg"]}
    raise ValueError("llama-batched-bench printed no figures")


def run(command: list[str]) -> str:
    """What a program wrote to stdout; its stderr goes to ours. Raises CalledProcessError when it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, errors="replace").stdout


if __name__ == "__main__":
    peer = LlamaCpp()
    serve({name: getattr(peer, name) for name in ("convert", "load", "prefill", "decode")})
