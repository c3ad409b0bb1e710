"""What a card is made from, read from a checkpoint's directory and checked; nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_quant.card_facts import is_local
from hf_quant.card_metadata import BaseCard, read_base_card
from hf_quant.checkpoint import MANIFEST_FILE, RESULTS_FILE, Manifest, checkpoint_digest, read_json
from hf_quant.errors import CardError
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.provenance import EXPORT, measured_digests

PROVENANCE_KEYS = ("version", "format", "method", "recipe", "base_model")


def check_whole(directory: Path, manifest: Manifest) -> None:
    """Compare names and sizes with the manifest (`hf-quant push` compares the digests too)."""
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise CardError(
                f"{path} is not the file that {MANIFEST_FILE} records.", "restore it, or quantize and evaluate again."
            )


def check_provenance(directory: Path, recorded: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """config.json and the manifest were written together; if they differ, one of them is from another checkpoint."""
    in_config = config.get("hf_quant")
    if in_config is None:
        raise CardError(f"{directory / 'config.json'} has no hf_quant key.", "quantize again, or restore the file.")
    differing = [key for key in PROVENANCE_KEYS if in_config.get(key) != recorded.get(key)]
    if differing:
        raise CardError(
            f"config.json and {MANIFEST_FILE} of {directory} disagree about {differing[0]}.",
            "one of them is from another checkpoint: quantize again.",
        )


def read_results(directory: Path, provenance: Mapping[str, Any]) -> EvaluationResult:
    """The results beside a checkpoint, when they are of it (or of what it was converted from); raises CardError."""
    path = directory / RESULTS_FILE
    if not path.is_file():
        first = f"run `hf-quant evaluate {directory}` first"
        if EXPORT in provenance:
            first = "run `hf-quant evaluate` on the checkpoint that it was converted from, and convert again"
        raise CardError(
            f"{directory} has no {RESULTS_FILE}, and a card states only what was measured.",
            f"{first}, or pass --allow-unmeasured (allow_unmeasured=True).",
        )
    results = EvaluationResult.read(path)
    digest = checkpoint_digest(directory)
    if results.candidate_digest not in measured_digests(provenance, digest):
        whose = (
            "do not say which checkpoint they belong to"
            if results.candidate_digest is None
            else (f"were measured on another checkpoint ({results.candidate_digest[:12]}…, this one is {digest[:12]}…)")
        )
        raise CardError(f"the results in {path} {whose}.", f"run `hf-quant evaluate {directory}` again.")
    return results


def find_base_card(provenance: Mapping[str, Any], recorded: object) -> BaseCard:
    """As recorded when the checkpoint was made; else from the directory it was made from; else from the Hub."""
    noted = provenance.get("base_card")
    if isinstance(noted, Mapping):
        return BaseCard(noted)
    if isinstance(recorded, str) and Path(recorded).expanduser().is_dir():
        local = read_base_card(recorded)
        if local.metadata or is_local(provenance):
            return local
    if is_local(provenance):
        return BaseCard(problem="its directory is not on this machine")
    named, revision = provenance["base_model"], provenance.get("base_revision")
    return read_base_card(named, revision if named == recorded and isinstance(revision, str) else None)


def has_chat_template(directory: Path, files: Sequence[str]) -> bool:
    """Whether the tokenizer among ``files`` has a chat template."""
    if any(name.startswith(("chat_template", "additional_chat_templates/")) for name in files):
        return True
    return "tokenizer_config.json" in files and bool(read_json(directory, "tokenizer_config.json").get("chat_template"))


def context_of(config: Mapping[str, Any]) -> int:
    """How many tokens the model reads at a time, as its config says; 0 where it does not."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, Mapping) else config).get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) and found > 0 else 0
