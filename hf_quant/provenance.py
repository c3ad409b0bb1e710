"""Where a checkpoint comes from: the record that travels in its config.json and manifest."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_quant.checkpoint import MANIFEST_FILE, read_manifest
from hf_quant.config import HfQuantConfig
from hf_quant.plan import Plan
from hf_quant.version import __version__

STOCK = "stock_loading"  # in the record: a sentence on what stock transformers needs to load the checkpoint
KEY = "hf_quant"  # top-level key of config.json; stock loaders keep and ignore it
EXPORT = "export"  # in the record of what `hf-quant convert` wrote for other runtimes: what their files no longer say


def make_provenance(
    plan: Plan,
    config: HfQuantConfig,
    base_model: str | None = None,
    base_revision: str | None = None,
    data: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> dict[str, Any]:
    """The record, as JSON values.

    Args:
        plan: what was done.
        config: what was asked for (loading attributes are left out: they are not part of the checkpoint).
        base_model: Hub id or path of the float model; of a path only the last part is kept, because the rest says
            something about somebody's machine and nothing about the model.
        base_revision: commit of the base model, when it is known.
        data: what it was calibrated on (source, digest, samples, tokens, seed); None for data-free methods.
        tuned: tuning ran and its result was kept.
    """
    loading = config.get_loading_attributes()
    return {
        "version": __version__,
        "format": plan.format,
        "method": config.method,
        "recipe": {k: v for k, v in config.to_dict().items() if k not in loading},
        "base_model": public_name(base_model) if base_model else None,
        "base_revision": base_revision,
        "data": None if data is None else dict(data),
        "tuning": config.tuning if tuned else None,
        "scale_dtype": plan.scale_dtype,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


def export_record(
    before: Mapping[str, Any], *, target: str, stored: str, model: Any, source_digest: str | None
) -> dict[str, Any]:
    """The record of files for another runtime: where the weights come from, and what the card has to know of the model.

    Args:
        before: the record of the checkpoint that is converted.
        target, stored: what is written, and the format that was read.
        model: the checkpoint's.
        source_digest: of the checkpoint, whose measured results speak of these weights too.
    """
    names = list(model.config.architectures or [type(model).__name__])
    about = {"source_digest": source_digest, "architecture": names[0], "model_type": model.config.model_type}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int):
        about["max_position_embeddings"] = context
    kept = {key: value for key, value in before.items() if key != STOCK}  # a sentence about other files
    return {**kept, "format": target, "converted_from": stored, EXPORT: about}


def measured_digests(provenance: Mapping[str, Any], own: str) -> tuple[str, ...]:
    """The digests of checkpoints whose results belong to these files: their own, and what they were converted from."""
    source = (provenance.get(EXPORT) or {}).get("source_digest")
    return (own, source) if isinstance(source, str) else (own,)


def exported_as(directory: Path) -> str:
    """What `convert` wrote into a directory (``gguf``, ...), where that is for another runtime; else empty."""
    if not (directory / MANIFEST_FILE).is_file():
        return ""
    provenance = read_manifest(directory).provenance
    return str(provenance.get("format")) if EXPORT in provenance else ""


def public_name(model: str) -> str:
    """A Hub id as it is; the last part of a local path."""
    if Path(model).is_absolute() or model.startswith(".") or Path(model).exists():
        return Path(model).resolve().name
    return model


def plan_rows(plan: Plan, results: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The plan as JSON rows, for the manifest and the card; ``results`` add what a calibrated run says."""
    found = {result["name"]: result for result in results}
    rows = _rows(plan)
    for row in rows:
        result = found.get(row["name"])
        if result is not None:
            row |= {"method": result["method"], "tokens": result["tokens"], "error": result["error"]}
            row["note"] = "; ".join(filter(None, (row["note"], result["note"])))
    return rows


def _rows(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "label": layer.scheme.label if layer.scheme else None,
            "method": layer.method,
            "rule": layer.rule,
            "note": layer.note,
            "float_bytes": layer.float_bytes,
            "planned_bytes": layer.planned_bytes,
            **({"shares": layer.shares} if layer.shares else {}),
        }
        for layer in plan.layers
    ]
