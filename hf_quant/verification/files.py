"""Every file against its recorded digest; of damaged weights, which tensor."""

from __future__ import annotations

from pathlib import Path

from hf_quant.checkpoint import (
    MANIFEST_FILE,
    Manifest,
    Verification,
    changed_tensors,
    check_directory,
    verify_evidence,
)
from hf_quant.checkpoint.headers import read_json
from hf_quant.errors import CheckpointError
from hf_quant.provenance import EXPORT, KEY
from hf_quant.verification.findings import Finding, note

_RESTORE = "restore it from where the checkpoint came from (download it again), or quantize again."
_SHOWN = 3


def check_files(directory: Path, manifest: Manifest, found: Verification) -> list[Finding]:
    """What of a checkpoint is not as its manifest records; ``found`` is what verify_manifest says."""
    findings = _named(directory, found)
    findings += _of_evidence(verify_evidence(directory))
    if manifest.seal is None:
        findings.append(
            note("files", MANIFEST_FILE, "has no seal (an older hf-quant wrote it), so its plan may have been edited.")
        )
    if not manifest.evidence.files and not findings:
        findings.append(
            note("files", MANIFEST_FILE, "records no results and no card; what is there of them is not digested.")
        )
    exported = EXPORT in manifest.provenance  # no loader of ours reads those files: their digests are all there is
    if not (found.changed or found.missing or exported) and (directory / "config.json").is_file():
        findings += _loadable(directory, manifest)
    return findings


def _named(directory: Path, found: Verification) -> list[Finding]:
    findings = []
    for name in found.missing:
        findings.append(Finding("files", name, "is missing.", _RESTORE))
    for name in found.changed:
        if name == MANIFEST_FILE:
            findings.append(Finding("files", name, "was changed after it was written (its seal is broken).", _RESTORE))
        else:
            findings.append(Finding("files", name, f"is not what was written{_where(directory, name)}.", _RESTORE))
    for name in found.unexpected:
        findings.append(Finding("files", name, "is not recorded: it is no part of this checkpoint.", "remove it."))
    return findings


def _of_evidence(found: Verification) -> list[Finding]:
    again = "run `hf-quant evaluate` and `hf-quant card` again, or restore it."
    findings = [
        Finding("files", name, "is missing: it was recorded when it was written.", again) for name in found.missing
    ]
    # what differs in the card is named by the check of the card, which allows lines that were added by hand
    changed = [name for name in found.changed if not name.endswith(".md")]
    findings += [Finding("files", name, "was changed after it was written.", again) for name in changed]
    findings += [Finding("files", name, "is not recorded.", "remove it.") for name in found.unexpected]
    return findings


def _where(directory: Path, name: str) -> str:
    """In which tensor a safetensors file differs, in words."""
    if not name.endswith(".safetensors"):
        return ""
    try:
        tensors = changed_tensors(directory, name)
    except CheckpointError as error:
        return f" ({error.problem.rstrip('.')})"
    if not tensors:
        return " (in its header)"
    more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
    return f" (tensor {', '.join(tensors[:_SHOWN])}{more})"


def _loadable(directory: Path, manifest: Manifest) -> list[Finding]:
    """The manifest may be consistent and yet describe files that no loader takes, or those of another checkpoint."""
    try:
        check_directory(directory)
        recorded = read_json(directory, "config.json").get(KEY)
    except CheckpointError as error:
        return [Finding("files", str(directory), error.problem, error.fix)]
    if recorded is None or recorded == manifest.provenance:
        return []
    differing = sorted(
        key for key in {*recorded, *manifest.provenance} if recorded.get(key) != manifest.provenance.get(key)
    )
    return [
        Finding(
            "files",
            "config.json",
            f"tells another origin than {MANIFEST_FILE} ({', '.join(differing)}).",
            "one of the two is from another checkpoint, or was edited: restore it.",
        )
    ]
