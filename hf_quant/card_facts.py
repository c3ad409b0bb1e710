"""What a card is made from: the checkpoint's files, its plan, its provenance and the measured results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_quant.card_text import LayerRow, file_name
from hf_quant.evaluation.results import EvaluationResult, SpeedResult, ThroughputResult

LABEL = re.compile(r"(?P<grid>\w+)(?: (?P<zero>sym|asym))? (?P<group>g\d+|per-channel)(?P<nested> dq)?")
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "tekken")


@dataclass(frozen=True)
class CheckpointFacts:
    """What the card says about the checkpoint's files.

    Attributes:
        name: title of the card and of the model index.
        repo_id: what the snippets load: a Hub id, or the directory's name while there is none.
        architecture, model_type: from config.json.
        files: (relative name, bytes) of every file but the card, its results and its plots.
        tensors: tensor name -> bytes, from the headers; None when they were not read.
        context: how many tokens it reads at a time; 0 where its config does not say.
        chat: whether the tokenizer has a chat template.
        custom_code: whether loading needs trust_remote_code.
        plots: (relative path, caption) of the plots beside the card.
        quantized_by: who made it, for the metadata; None leaves the key out.
        tags: further ones for the metadata.
    """

    name: str
    repo_id: str
    architecture: str
    model_type: str
    files: tuple[tuple[str, int], ...]
    tensors: Mapping[str, int] | None = None
    context: int = 0
    chat: bool = False
    custom_code: bool = False
    plots: tuple[tuple[str, str], ...] = ()
    quantized_by: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def has_processor(self) -> bool:
        """Whether there is something that reads images or sound."""
        return any(name in ("preprocessor_config.json", "processor_config.json") for name, _ in self.files)

    @property
    def has_tokenizer(self) -> bool:
        return any(name.startswith(_TOKENIZERS) for name, _ in self.files)


@dataclass(frozen=True)
class Facts:
    """Everything that conclusions are drawn from."""

    provenance: Mapping[str, Any]
    rows: tuple[LayerRow, ...]
    results: EvaluationResult | None

    @cached_property
    def quantized(self) -> tuple[LayerRow, ...]:
        return tuple(row for row in self.rows if row.is_quantized)

    @cached_property
    def weights_by_label(self) -> Counter[str]:
        """Weights per scheme label, most first."""
        counts: Counter[str] = Counter()
        for row in self.quantized:
            counts[row.label] += row.numel
        return Counter(dict(counts.most_common()))

    @property
    def is_bitsandbytes(self) -> bool:
        return self.provenance["format"] == "bitsandbytes"

    @property
    def is_compressed_tensors(self) -> bool:
        return self.provenance["format"] in ("compressed-tensors", "int-quantized", "naive-quantized")

    @property
    def is_asymmetric(self) -> bool:
        return any(" asym " in f"{label} " for label in self.weights_by_label)

    @property
    def stock_obstacle(self) -> str:
        """Why stock transformers cannot load it, as recorded; empty when it can."""
        found = str(self.provenance.get("stock_loading") or "")
        return found if found.startswith("Stock transformers cannot") else ""

    @property
    def needs_dequantize(self) -> bool:
        """Whether stock transformers loads it only expanded: zero points, or code that reads packed weights."""
        asked = "CompressedTensorsConfig(dequantize=True)" in str(self.provenance.get("stock_loading") or "")
        return self.is_compressed_tensors and (asked or self.is_asymmetric)

    @property
    def quantized_weights(self) -> int:
        return sum(row.numel for row in self.quantized)

    @property
    def all_weights(self) -> int:
        """Weights of the model; a tied one counts once (its second row holds no bytes)."""
        return sum(row.numel for row in self.rows if row.is_quantized or row.float_bytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(row.bytes_now for row in self.quantized) / max(1, self.quantized_weights)

    @property
    def bytes_read(self) -> bool:
        """Whether bytes per layer were read from the files (else they are the plan's)."""
        return all(row.stored_bytes is not None for row in self.rows)

    def speed(self, model: str) -> SpeedResult | None:
        """The first speed result of ``float`` or ``quantized``."""
        found = self.results.speed if self.results is not None else ()
        return next((entry for entry in found if entry.model == model), None)

    @property
    def kernels(self) -> list[str]:
        """Kernels that ran the quantized layers during the evaluation."""
        found: list[SpeedResult | ThroughputResult] = []
        if self.results is not None:
            found = [*self.results.speed, *self.results.throughput]
        names = dict.fromkeys(name for entry in found if entry.model == "quantized" for name in entry.kernels)
        return [name for name in names if name != "float"]


def is_path(name: object) -> bool:
    """Whether a model's name is written as a path rather than as a Hub id."""
    if not isinstance(name, str):
        return False
    rooted = name.startswith(("/", ".", "~", "file:")) or re.match(r"[A-Za-z]:", name) is not None
    return rooted or "\\" in name or name.count("/") > 1


def is_local(provenance: Mapping[str, Any]) -> bool:
    """Whether the base model is a directory: recorded as one, written as a path, or a bare name without the commit that
    every download from the Hub has."""
    name = provenance["base_model"]
    if "base_model_is_local" in provenance:
        return bool(provenance["base_model_is_local"])
    return is_path(name) or (isinstance(name, str) and "/" not in name and not provenance.get("base_revision"))


def shown_base(provenance: Mapping[str, Any]) -> str:
    """The base model's name as the card shows it: a Hub id, or the last part of a path; empty when not recorded."""
    name = provenance["base_model"]
    if not isinstance(name, str) or not name:
        return ""
    return file_name(name) if is_local(provenance) else name


def other_reference(provenance: Mapping[str, Any], reference: str) -> str:
    """The recorded base model's name where what was measured against is called otherwise; empty where it is not."""
    known = [name for name in (shown_base(provenance), copy_name(provenance)) if name]
    same = {file_name(name).casefold() for name in known}
    return known[0] if known and file_name(reference).casefold() not in same else ""


def copy_name(provenance: Mapping[str, Any]) -> str:
    """The name of the local copy of the base model that was quantized; empty when it was the base model itself."""
    name = provenance.get("base_model_copy")
    return file_name(name) if isinstance(name, str) and name else ""
