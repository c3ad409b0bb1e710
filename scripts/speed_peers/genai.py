"""Serves OpenVINO GenAI: exports with optimum-intel and NNCF, which compresses weights; measures its LLMPipeline."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scripts.speed_peers.protocol import serve

# Without data, every linear layer at the wanted width; NNCF keeps head and embedding at int8.
_FORMATS = {"int4": ("--weight-format", "int4", "--sym", "--ratio", "1.0"), "int8": ("--weight-format", "int8")}
_FIRST_ID, _LAST_ID = 100, 1000  # prompts of any ids: the arithmetic does not depend on them


class GenAI:
    """The pipeline of this process."""

    def __init__(self) -> None:
        self.genai: Any = None
        self.pipeline: Any = None

    def convert(self, model: str, target: str, options: dict[str, Any], threads: int) -> dict[str, Any]:
        """Export a float model into the directory ``target``."""
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", *_FORMATS[options["type"]]]
        if "group" in options:
            command += ["--group-size", str(options["group"])]
        subprocess.run([*command, target], check=True, stdout=sys.stderr)
        return {}

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Load the exported model; its bytes are those of the file with all weights (a tied head is there once)."""
        self.genai = importlib.import_module("openvino_genai")
        start = time.perf_counter()
        self.pipeline = self.genai.LLMPipeline(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        return {
            "version": version("openvino-genai"),
            "token_bytes": (Path(model) / "openvino_model.bin").stat().st_size,
            "load_seconds": time.perf_counter() - start,
        }

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds of a generate() of one token."""
        seconds, _ = self._generate(1, tokens, 1)
        return {"tokens": tokens, "seconds": seconds}

    def decode(self, sequences: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds from the first new token of a greedy generate() to the last, ``tokens`` steps later."""
        seconds, times = self._generate(sequences, prompt, tokens + 1)
        decoding = (max(times) - min(times)) / 1e3
        if len(times) != tokens + 1 or not 0 < decoding <= seconds:  # the documentation calls them microseconds
            raise RuntimeError(f"{len(times)} times of new tokens span {decoding} s of {seconds} s")
        return {"tokens": sequences * tokens, "seconds": decoding}

    def _generate(self, sequences: int, prompt: int, new: int) -> tuple[float, list[float]]:
        """Seconds of the call, and when (milliseconds) each step's new tokens were there."""
        openvino: Any = importlib.import_module("openvino")
        ids = np.random.default_rng(prompt).integers(_FIRST_ID, _LAST_ID, (sequences, prompt), dtype=np.int64)
        inputs = self.genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        settings = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        start = time.perf_counter()
        done = self.pipeline.generate(inputs, settings)
        seconds = time.perf_counter() - start
        if [len(made) for made in done.tokens] != [new] * sequences:
            raise RuntimeError(f"made {[len(made) for made in done.tokens]} tokens instead of {new} each")
        return seconds, list(done.perf_metrics.raw_metrics.m_new_token_times)


if __name__ == "__main__":
    peer = GenAI()
    serve({name: getattr(peer, name) for name in ("convert", "load", "prefill", "decode")})
