"""The recorded plan against what the files really hold: every layer's bits, group, grid and bytes, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_quant.card_text import LayerRow, layer_rows
from hf_quant.checkpoint import MANIFEST_FILE, Manifest, read_headers
from hf_quant.provenance import plan_rows
from hf_quant.skeleton import plan_of_directory
from hf_quant.verification.findings import Finding

# bitsandbytes describes every weight in JSON, whose length depends on the digits of a mean
_SLACK = {"bitsandbytes": 16}
_AGAIN = "the manifest or the files were edited, or are of different checkpoints: restore both, or quantize again."


def check_plan(directory: Path, manifest: Manifest, trust_remote_code: bool = False) -> tuple[list[Finding], str]:
    """Recompute the plan from config.json and the headers and compare it with the recorded one.

    Returns:
        the findings, and what was compared in words.

    Raises:
        HfQuantError: the plan cannot be recomputed.
    """
    plan = plan_of_directory(directory, trust_remote_code)
    found = {row["name"]: row for row in plan_rows(plan)}
    recorded = {str(row.get("name")): row for row in manifest.plan}
    findings = [
        Finding("plan", name, f"is in the files, but not in the plan of {MANIFEST_FILE}.", _AGAIN)
        for name in found
        if name not in recorded
    ]
    for name, row in recorded.items():
        if name not in found:
            findings.append(Finding("plan", name, "is in the plan, but the model has no such weight.", _AGAIN))
        elif differs := _difference(row, found[name]):
            findings.append(Finding("plan", name, differs, _AGAIN))
    if manifest.provenance.get("format") != plan.format:
        problem = f"the files are {plan.format}, the manifest says {manifest.provenance.get('format')}."
        findings.append(Finding("plan", "format", problem, _AGAIN))
    if not findings:
        findings = _bytes(directory, manifest, found, _SLACK.get(plan.format, 0))
    return findings, f"{len(plan.quantized)} quantized and {len(plan.kept)} other weights, as the files hold them"


def _difference(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How a recorded row differs from the files', in words; empty when it does not."""
    for key, what in (("label", "stored as"), ("shape", "of shape"), ("kind", "of kind"), ("shares", "sharing")):
        planned, held = recorded.get(key), found.get(key)
        if planned != held:
            return f"is {what} {held or 'float'}, the plan says {planned or 'float'}."
    return ""


def _bytes(directory: Path, manifest: Manifest, found: Mapping[str, Mapping[str, Any]], slack: int) -> list[Finding]:
    """Recorded bytes against those of the headers; of files with other names than the modules, those of the formats."""
    stored = {name: info.nbytes for name, info in read_headers(directory).items()}
    rows: Sequence[LayerRow] = layer_rows(manifest.plan, stored)
    findings = []
    for row in rows:
        held = row.stored_bytes if row.stored_bytes is not None else int(found[row.name]["planned_bytes"])
        if row.is_quantized and abs(held - row.planned_bytes) > slack:
            problem = f"takes {held:,} bytes, the plan says {row.planned_bytes:,}."
            findings.append(Finding("plan", row.name, problem, _AGAIN))
    return findings
