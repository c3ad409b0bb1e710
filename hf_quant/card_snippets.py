"""What a reader copies from a card: the code that loads the checkpoint, the recipe and the commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from hf_quant.calibration.processors import reads_videos
from hf_quant.card_facts import CheckpointFacts, Facts, copy_name, shown_base
from hf_quant.card_text import literal, one_line, without_paths
from hf_quant.card_usage import Usage, usage_of
from hf_quant.config import HfQuantConfig
from hf_quant.evaluation.kinds import Kind

# Commands that a card may show, and what stands before the name in them.
_COMMANDS = (("vllm serve", ""), ("hf download", ""), ("ollama run", "hf.co/"), ("trtllm-serve", ""))
# Recipe keys that change how a checkpoint is loaded, not what is in it.
_LOADING_KEYS = ("quant_method", "kernel", "activations", "dequantize")


def with_repo_id(text: str, repo_id: str) -> str:
    """The card with ``repo_id`` in its snippets, for a checkpoint whose card was written before its name was known."""
    match = re.search(r"^<!-- hf-quant: snippets load (\".*\") -->$", text, re.MULTILINE)
    if match is None:
        return text
    old = json.loads(match.group(1))

    def fenced(block: re.Match[str]) -> str:
        changed = block.group().replace(f"repo_id = {literal(old)}\n", f"repo_id = {literal(repo_id)}\n")
        for command, prefix in _COMMANDS:
            before, now = (f"{command} {shlex.quote(prefix + name)}" for name in (old, repo_id))
            changed = re.sub(rf"^{re.escape(before)}(?=\s)", now, changed, flags=re.MULTILINE)
        return changed

    text = re.sub(r"^```.*?^```", fenced, text, flags=re.MULTILINE | re.DOTALL)
    return text.replace(match.group(), _marker(repo_id), 1)


@dataclass(frozen=True)
class Snippet:
    """The pieces of the loading snippets that depend on the model."""

    checkpoint: CheckpointFacts
    facts: Facts
    kind: Kind
    packages: str = field(init=False)

    def __post_init__(self) -> None:
        package = "gptqmodel optimum"  # GPTQ and AWQ, which `hf-quant convert` writes
        if self.facts.is_bitsandbytes or self.facts.is_compressed_tensors:
            package = "bitsandbytes" if self.facts.is_bitsandbytes else "compressed-tensors"
        usage = self.usage
        more = f" {usage.packages}" if usage is not None and usage.packages else ""
        videos = usage is not None and usage.reader == "AutoProcessor" and reads_videos(self.checkpoint.model_type)
        vision = " torchvision" if videos else ""
        object.__setattr__(self, "packages", f"torch{vision} transformers accelerate {package}{more}")

    @property
    def marker(self) -> str:
        return _marker(self.checkpoint.repo_id)

    @property
    def repo(self) -> str:
        return literal(self.checkpoint.repo_id)

    @property
    def shell_repo(self) -> str:
        return shlex.quote(self.checkpoint.repo_id)

    @property
    def trust(self) -> str:
        return ", trust_remote_code=True" if self.checkpoint.custom_code else ""

    @property
    def dequantize(self) -> bool:
        """Stock transformers cannot run the layout packed.

        It expands compressed-tensors weights in the model's own first forward pass; to generate, an encoder-decoder or
        a model of images calls a part of itself before that.
        """
        answers = self.kind.writes_text and self.kind.measure != "causal"
        return self.facts.needs_dequantize or (answers and self.facts.is_compressed_tensors)

    @property
    def usage(self) -> Usage | None:
        """What to do with the loaded model."""
        return usage_of(self.kind, self.checkpoint)


def _marker(repo_id: str) -> str:
    # "--" would end the comment for some parsers
    return f"<!-- hf-quant: snippets load {json.dumps(repo_id).replace('--', chr(92) + 'u002d-')} -->"


def quantize_command(provenance: Mapping[str, Any], checkpoint: CheckpointFacts) -> str:
    """The command that made the checkpoint: as recorded, else the one that makes it from the printed recipe.

    One that was converted afterwards has a second line.
    """
    name = one_line(checkpoint.name)
    before = provenance.get("converted_from")
    if before:
        quantized, target = f"{name}-{before}", str(provenance["format"]).removesuffix("_v2")
        made = quantize_command({**provenance, "converted_from": None}, replace(checkpoint, name=quantized))
        return f"{made}\n{shlex.join(['hf-quant', 'convert', quantized, name, '--to', target])}"
    given = provenance.get("command")
    if isinstance(given, str) and given:
        return one_line(given)
    source = copy_name(provenance) or shown_base(provenance) or "MODEL"
    words = ["hf-quant", "quantize", source, "--recipe", "recipe.yaml"]
    if provenance.get("base_revision"):
        words += ["--revision", str(provenance["base_revision"])]
    return shlex.join([*words, "--output-dir", name])


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML, without keys that only concern loading or that say nothing."""
    # a recipe that went through config.json has its keys in another order
    known = [key for key in HfQuantConfig().to_dict() if key in recipe]
    ordered = {key: recipe[key] for key in (*known, *(key for key in recipe if key not in known))}
    kept = {key: value for key, value in ordered.items() if key not in _LOADING_KEYS and value not in ({}, [], None)}
    return without_paths(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip())
