"""What a card says of files that `hf-quant convert` wrote for another runtime: their origin, and how they are run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_quant.card_facts import CheckpointFacts, Facts
from hf_quant.card_text import amount, code, listing, literal, markdown, significant, value_only
from hf_quant.errors import CardError
from hf_quant.evaluation.kinds import Kind
from hf_quant.provenance import EXPORT

_RUNTIMES = {
    "gguf": "llama.cpp and what is built on it (Ollama, LM Studio)",
    "onnx": "onnxruntime",
    "openvino": "OpenVINO",
    "modelopt": "TensorRT-LLM",
}
_TITLES = {"gguf": "GGUF", "onnx": "ONNX", "openvino": "OpenVINO", "modelopt": "ModelOpt"}
_COMPUTES = {
    "gguf": "llama.cpp rounds the inputs of quantized layers to 8 bits",
    "onnx": "onnxruntime rounds the inputs of 8-bit layers to 8 bits unless it is told not to",
    "openvino": "OpenVINO's CPU plug-in computes in bfloat16, and rounds inputs and the cache to 8 bits, unless it is "
    "told not to",
    "modelopt": "TensorRT-LLM computes in the model's 16 bits",
}
_MOST_TEXTS = 3


@dataclass(frozen=True)
class Export:
    """One directory of such files.

    Attributes:
        format: one of ``gguf``, ``onnx``, ``openvino``, ``modelopt``.
        stored: the format of the checkpoint that it was converted from.
        record: what `convert` noted: the file, whether it is exact, notes, the digest of the checkpoint, the model.
        checkpoint: names and files.
        kind: what the model is for.
    """

    format: str
    stored: str
    record: Mapping[str, Any]
    checkpoint: CheckpointFacts
    kind: Kind

    @property
    def title(self) -> str:
        return _TITLES[self.format]

    @property
    def runtime(self) -> str:
        return _RUNTIMES[self.format]

    @property
    def weight_bytes(self) -> int:
        """Bytes of what the runtime reads: all but the tokenizer and the like."""
        ends = (".gguf", ".onnx", ".onnx_data", "_model.bin", "_model.xml", ".safetensors")
        return sum(size for name, size in self.checkpoint.files if name.endswith(ends))

    @property
    def exactness(self) -> str:
        """How these weights relate to those that were measured, as Markdown."""
        if self.record.get("exact"):
            return "every quantized weight has exactly the value that it has there"
        rounded = next((note for note in self.record.get("notes", ()) if "rounded" in note), "scales are rounded")
        return f"not exactly the same weights: {markdown(rounded)}"

    @property
    def measured(self) -> str:
        """What the figures of the card are figures of, as a Markdown paragraph."""
        return (
            f"**Measured on the {markdown(self.stored)} checkpoint that these files were converted from** (SHA-256 "
            f"{code(self.record.get('source_digest'))}), by hf-quant; {self.exactness}. {_COMPUTES[self.format]}: what "
            "that adds was not measured here."
        )

    def claim(self, facts: Facts, grids: str) -> str:
        """The line at the top, as Markdown."""
        bits = significant(facts.results.size.bits_per_weight if facts.results else facts.bits_per_weight)
        head = f"{grids} weights, {bits} bits each with their scales, as {amount(self.weight_bytes)} of {self.title}"
        head += f" for {self.runtime}"
        results = facts.results
        if results is None:
            return f"{head}; accuracy was not measured"
        texts = results.texts[:_MOST_TEXTS]
        changes = [f"{value_only(t.perplexity_increase_percent, sign=True)} % on {markdown(t.name)}" for t in texts]
        if not changes:
            return head
        losses = listing([value_only(text.kl) for text in texts])
        return f"{head}; the checkpoint that it was converted from has perplexity {listing(changes)} (KL {losses} nats)"

    @property
    def usage(self) -> str:
        """How to run it, as Markdown; nothing of it was run for this card."""
        return _USAGES[self.format](self)

    def limits(self) -> list[str]:
        """What must not be concluded."""
        return [
            f"These files were not run in {self.runtime} when this card was written: speed, memory and what its "
            "arithmetic adds to the loss were not measured."
        ]


def export_of(provenance: Mapping[str, Any], checkpoint: CheckpointFacts, kind: Kind) -> Export | None:
    """What `convert` recorded; None for a checkpoint that transformers loads.

    Raises:
        CardError: files of a runtime that this version does not know.
    """
    record = provenance.get(EXPORT)
    if record is None:
        return None
    name = str(provenance["format"])
    if name not in _RUNTIMES:
        raise CardError(f"nothing is known of {name!r} files.", "convert again with this version of hf-quant.")
    return Export(name, str(provenance.get("converted_from")), record, checkpoint, kind)


def _gguf(export: Export) -> str:
    file, repo = str(export.record.get("file")), export.checkpoint.repo_id
    return "\n".join(
        [
            "**llama.cpp** (`llama-server` has an OpenAI-compatible API and a page to chat on):",
            "",
            "```bash",
            f"hf download {shlex.quote(repo)} {shlex.quote(file)} --local-dir .",
            f"llama-server -m {shlex.quote(file)} -c 4096",
            "```",
            "",
            "**Ollama**, from the Hub:",
            "",
            "```bash",
            f"ollama run {shlex.quote(f'hf.co/{repo}')}",
            "```",
            "",
            "**Stock transformers** expands it to floats (`pip install torch transformers accelerate gguf`):",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"repo_id = {literal(repo)}",
            f"file = {literal(file)}",
            "tokenizer = AutoTokenizer.from_pretrained(repo_id, gguf_file=file)",
            "model = AutoModelForCausalLM.from_pretrained(repo_id, gguf_file=file)",
            'inputs = tokenizer("The sky is blue because", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
            "```",
        ]
    )


def _onnx(export: Export) -> str:
    if export.kind.measure != "causal":
        return "\n".join(
            [
                "**onnxruntime**; the graph's inputs and outputs have optimum's names:",
                "",
                "```python",
                "import onnxruntime",
                "from huggingface_hub import snapshot_download",
                "",
                f"repo_id = {literal(export.checkpoint.repo_id)}",
                'session = onnxruntime.InferenceSession(f"{snapshot_download(repo_id)}/model.onnx")',
                "print([entry.name for entry in session.get_inputs()])",
                "```",
            ]
        )
    return _python(
        "**onnxruntime**, through optimum (`pip install optimum-onnx onnxruntime`):",
        "from optimum.onnxruntime import ORTModelForCausalLM",
        "ORTModelForCausalLM",
        export,
    )


def _openvino(export: Export) -> str:
    usage = _python(
        "**OpenVINO**, through optimum-intel (`pip install optimum-intel openvino`):",
        "from optimum.intel import OVModelForCausalLM",
        "OVModelForCausalLM",
        export,
    )
    if not any(name.startswith("openvino_tokenizer") for name, _ in export.checkpoint.files):
        return usage
    genai = [
        "**OpenVINO GenAI**, without transformers (`pip install openvino-genai huggingface_hub`):",
        "",
        "```python",
        "import openvino_genai",
        "from huggingface_hub import snapshot_download",
        "",
        f"repo_id = {literal(export.checkpoint.repo_id)}",
        'pipeline = openvino_genai.LLMPipeline(snapshot_download(repo_id), "CPU")',
        'print(pipeline.generate("Why is the sky blue?", max_new_tokens=64))',
        "```",
    ]
    return "\n".join([usage, "", *genai])


def _modelopt(export: Export) -> str:
    lines = ["**TensorRT-LLM**; hf-quant's makers had no NVIDIA GPU and never ran it:", "", "```bash"]
    return "\n".join([*lines, f"trtllm-serve {shlex.quote(export.checkpoint.repo_id)}", "```"])


def _python(title: str, load: str, name: str, export: Export) -> str:
    """A snippet that loads a causal language model in a class like those of transformers."""
    return "\n".join(
        [
            title,
            "",
            "```python",
            load,
            "from transformers import AutoTokenizer",
            "",
            f"repo_id = {literal(export.checkpoint.repo_id)}",
            "tokenizer = AutoTokenizer.from_pretrained(repo_id)",
            f"model = {name}.from_pretrained(repo_id)",
            'inputs = tokenizer("The sky is blue because", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
            "```",
        ]
    )


_USAGES = {"gguf": _gguf, "onnx": _onnx, "openvino": _openvino, "modelopt": _modelopt}
