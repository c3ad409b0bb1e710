"""Serves the contenders that are transformers models: plain ``model.generate()``, whoever made the weights.

Also measures what a fresh process needs from a saved checkpoint to its first token. The environments of other libraries
do not have hf-quant: only the rows of hf-quant import it.
"""

from __future__ import annotations

import importlib
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import CompileConfig

from scripts.speed_peers.protocol import serve

_BLOCK = 8 << 20


class Clock(StoppingCriteria):
    """Notes when each new token was there; never stops, and costs what the check for the end of text would."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Generator:
    """The model of this process."""

    def __init__(self) -> None:
        self.model: Any = None
        self.compiled = False

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Load as the options say; returns the library's version and the bytes of weights that a token reads."""
        torch.set_num_threads(threads)
        library = options["library"]
        arguments = _LIBRARIES[library](options)
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(model, **arguments).eval()
        seconds = time.perf_counter() - start
        self.compiled = bool(options.get("compile"))
        return {"version": _version(library), "token_bytes": token_bytes(self.model), "load_seconds": seconds}

    def save(self, directory: str) -> dict[str, Any]:
        """Save the loaded model as a checkpoint."""
        self.model.save_pretrained(directory)
        return {}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds of one forward pass that fills the cache and gives the next token's logits."""
        ids = self._prompt(1, tokens)
        with torch.no_grad():
            start = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return {"tokens": tokens, "seconds": time.perf_counter() - start}

    def decode(self, sequences: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds from the first new token of a greedy generate() to the last, ``tokens`` steps later."""
        clock = Clock()
        ids = self._prompt(sequences, prompt)
        self.model.generation_config.eos_token_id = None  # a None in the settings would be filled from here
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=tokens + 1, pad_token_id=0)
        if self.compiled:
            settings.cache_implementation = "static"
            settings.compile_config = CompileConfig()
            settings.compile_config._compile_all_devices = True  # transformers' switch for compiling on a CPU
        with torch.no_grad():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        if len(clock.times) != tokens + 1:
            raise RuntimeError(f"generate() made {len(clock.times)} tokens instead of {tokens + 1}")
        return {"tokens": sequences * tokens, "seconds": clock.times[-1] - clock.times[0]}

    def kernels(self) -> dict[str, Any]:
        """How many layers each kernel of hf-quant ran."""
        speed: Any = importlib.import_module("hf_quant.evaluation.speed")
        return {"kernels": speed.kernels(self.model)}

    def _prompt(self, sequences: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary, (sequences, tokens), generator=generator)

    # ---- a saved checkpoint, in a fresh process

    def prepare(self, threads: int, module: str) -> dict[str, Any]:
        """Everything that does not depend on the checkpoint: imports, threads, torch's first use."""
        torch.set_num_threads(threads)
        importlib.import_module("hf_quant")
        importlib.import_module(module)
        torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))
        return {}

    def first_token(self, directory: str, prompt: int, cold: bool) -> dict[str, Any]:
        """Seconds from the call that loads the checkpoint to the first new token, and the memory held afterwards."""
        if cold:
            drop_cached(Path(directory))
        before = resident("RssAnon")
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        loaded = time.perf_counter() - start
        self.decode(1, prompt, 0)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "load_seconds": loaded,
            "anonymous_bytes": resident("RssAnon") - before,
            "file_bytes": resident("RssFile"),
            "model_bytes": sum(t.nbytes for t in unique(self.model)),
        }

    def read(self, directory: str, cold: bool) -> dict[str, Any]:
        """Seconds to read the checkpoint's weights once, from the disk (``cold``) or from the page cache."""
        if cold:
            drop_cached(Path(directory))
        buffer, total = bytearray(_BLOCK), 0
        buffer[::4096] = bytes(len(buffer[::4096]))  # its pages are there before the clock runs
        start = time.perf_counter()
        for file in sorted(Path(directory).glob("*.safetensors")):
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    total += count
        return {"bytes": total, "seconds": time.perf_counter() - start}


def token_bytes(model: Any) -> int:
    """Bytes of weights that one decoded token reads: all but an input embedding that is not the output head too."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    separate = embedding is not None and (head is None or getattr(head, "weight", None) is not embedding.weight)
    looked_up = {t.data_ptr() for t in unique(embedding)} if separate else set()
    return sum(t.nbytes for t in unique(model) if t.data_ptr() not in looked_up)


def unique(module: Any) -> list[torch.Tensor]:
    """Parameters and buffers, each once, with the tensors that bitsandbytes and torchao keep in or beside a weight."""
    found: dict[int, torch.Tensor] = {}
    pending: list[Any] = [*module.parameters(), *module.buffers()]
    while pending:
        tensor = pending.pop()
        if (state := getattr(tensor, "quant_state", None)) is not None:
            pending += [t for t in (state.absmax, state.code) if t is not None]
            pending += [state.state2.absmax] if getattr(state, "state2", None) is not None else []
        if hasattr(tensor, "__tensor_flatten__"):
            pending += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            found[tensor.data_ptr()] = tensor.detach()
    return list(found.values())


def drop_cached(directory: Path) -> None:
    """Ask the system to forget the pages of a checkpoint's files, so that they are read from the disk."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as source:
            os.fsync(source.fileno())
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(kind: str) -> int:
    """Bytes of this process in memory: ``RssAnon`` or ``RssFile`` (mapped files); 0 where there is no ``/proc``."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), 0)


def _version(library: str) -> str:
    if library == "hf_quant":  # may run from a checkout that is not installed
        return str(importlib.import_module("hf_quant").__version__)
    return version("transformers" if library == "float" else library)


def _float(options: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": getattr(torch, options["dtype"])}


def _hf_quant(options: dict[str, Any]) -> dict[str, Any]:
    hf_quant: Any = importlib.import_module("hf_quant")
    return {"dtype": torch.bfloat16, "quantization_config": hf_quant.HfQuantConfig(**options["config"])}


def _bitsandbytes(options: dict[str, Any]) -> dict[str, Any]:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"dtype": torch.bfloat16, "quantization_config": config, "device_map": {"": "cpu"}}


def _torchao(options: dict[str, Any]) -> dict[str, Any]:
    quantization: Any = importlib.import_module("torchao.quantization")
    kind = quantization.Int4WeightOnlyConfig(group_size=options["group"], int4_packing_format="opaque")
    return {"dtype": torch.bfloat16, "quantization_config": transformers.TorchAoConfig(kind), "device_map": {"": "cpu"}}


_LIBRARIES = {"float": _float, "hf_quant": _hf_quant, "bitsandbytes": _bitsandbytes, "torchao": _torchao}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    generator = Generator()
    names = ("load", "save", "prefill", "decode", "kernels", "prepare", "first_token", "read")
    serve({name: getattr(generator, name) for name in names})
