"""Results against the files, and the card against the results: it is made again and compared line by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from hf_quant.card import CardInputs, compose
from hf_quant.card_metadata import validate_card
from hf_quant.checkpoint import (
    MANIFEST_FILE,
    README_FILE,
    RESULTS_FILE,
    Manifest,
    checkpoint_digest,
    read_manifest,
    verify_evidence,
    weight_files,
)
from hf_quant.errors import CardError, EvaluationError
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.evaluation.size import disk_bytes
from hf_quant.provenance import EXPORT, measured_digests
from hf_quant.verification.findings import Finding, note
from hf_quant.version import __version__

_EVALUATE = "run `hf-quant evaluate` and `hf-quant card` again."
_CARD = "write it again with `hf-quant card`."
_SHOWN = 60  # characters of a line around the first difference
_MOST = 8


def check_results(directory: Path, manifest: Manifest) -> tuple[list[Finding], str]:
    """Whether evaluation.json belongs to these files, and says of them what they say themselves."""
    path = directory / RESULTS_FILE
    if not path.is_file():
        recorded = RESULTS_FILE in manifest.evidence.files
        return ([] if recorded else [note("results", RESULTS_FILE, "there is none: nothing was measured.")]), ""
    try:
        results = EvaluationResult.read(path)
    except EvaluationError as error:
        return [Finding("results", RESULTS_FILE, _first(error.problem), _EVALUATE)], ""
    findings = []
    digest = checkpoint_digest(directory)
    if results.candidate_digest not in measured_digests(manifest.provenance, digest):
        whose = f"{results.candidate_digest[:12]}…" if results.candidate_digest else "of a checkpoint that is not named"
        problem = f"these are results of another checkpoint ({whose}, this one is {digest[:12]}…)."
        findings.append(Finding("results", RESULTS_FILE, problem, _EVALUATE))
    if EXPORT in manifest.provenance:
        converted = note(
            "results", RESULTS_FILE, "was measured on the checkpoint that these files were converted from."
        )
        return [*findings, converted], f"measured {results.created} against {results.reference}"
    if any(name.endswith(".safetensors") for name in manifest.files) and weight_files(directory):
        held = disk_bytes(directory)
        if held != results.size.quantized_disk_bytes:
            problem = f"says {results.size.quantized_disk_bytes:,}, the weight files have {held:,} bytes."
            findings.append(Finding("results", f"{RESULTS_FILE} size.quantized_disk_bytes", problem, _EVALUATE))
    return findings, f"measured {results.created} against {results.reference}"


def check_card(directory: Path, manifest: Manifest) -> tuple[list[Finding], str]:
    """Whether README.md is what the recorded results, plan and provenance give; lines added by hand are let through."""
    path = directory / README_FILE
    if not path.is_file():
        recorded = README_FILE in manifest.evidence.files
        return ([] if recorded else [note("card", README_FILE, "there is none yet.", _CARD)]), ""
    try:
        text = path.read_bytes().decode("utf-8")
        validate_card(text, directory)
    except UnicodeDecodeError as error:
        return [Finding("card", README_FILE, f"is not UTF-8 text ({error.reason} at byte {error.start}).", _CARD)], ""
    except CardError as error:
        return [Finding("card", README_FILE, _first(error.problem), error.fix)], ""
    given = manifest.evidence.card
    if given is None:
        problem = f"{MANIFEST_FILE} does not record what it was made from, so it cannot be made again."
        return [note("card", README_FILE, problem, _CARD)], ""
    inputs = card_inputs(given)
    if inputs.version != __version__:
        return _other_version(directory, manifest, text, inputs.version)
    expected, _ = compose(directory, inputs)
    findings = [*_figures(text, expected), *_lines(text, expected)]
    return findings, f"{expected.count(chr(10))} lines, made again from the recorded results"


def card_inputs(recorded: dict[str, Any]) -> CardInputs:
    """What a manifest records about its card; raises CardError when that is not what this version records."""
    known = {field.name for field in fields(CardInputs)}
    try:
        return CardInputs(**{key: value for key, value in recorded.items() if key in known})
    except TypeError as error:
        raise CardError(f"{MANIFEST_FILE} records a card that is not described whole: {error}.", _CARD) from error


def require_card(directory: Path) -> None:
    """Raise CardError when the card of a checkpoint says something that its results do not give."""
    findings, _ = check_card(directory, read_manifest(directory))
    for finding in findings:
        if finding.fatal:
            raise CardError(f"{finding.subject} {finding.problem}", finding.fix or _CARD)


def _other_version(directory: Path, manifest: Manifest, text: str, version: str) -> tuple[list[Finding], str]:
    """Another version words a card differently: its digest and the figures of its model index are what is left."""
    findings = []
    if README_FILE in verify_evidence(directory).changed:
        findings.append(Finding("card", README_FILE, "was changed after it was written.", _CARD))
    problem = f"hf-quant {version} wrote it, this is {__version__}: its wording is not compared."
    return [*findings, note("card", README_FILE, problem)], f"digest, as hf-quant {version} wrote it"


def _figures(text: str, expected: str) -> Iterator[Finding]:
    """The figures of the model index that are not those of the results."""
    said, given = _index(text), _index(expected)
    for key, value in given.items():
        if key not in said:
            yield Finding("card", f"{README_FILE} model-index {key}", f"is missing; the results give {value}.", _CARD)
        elif said[key] != value:
            problem = f"the card says {said[key]}, the results give {value}."
            yield Finding("card", f"{README_FILE} model-index {key}", problem, _CARD)
    for key in said.keys() - given.keys():
        yield Finding("card", f"{README_FILE} model-index {key}", f"says {said[key]}, which nobody measured.", _CARD)


def _index(text: str) -> dict[str, Any]:
    """``dataset metric`` -> the value that a card's model index gives."""
    found: list[EvalResult] = getattr(ModelCard(text, ignore_metadata_errors=True).data, "eval_results", None) or []
    return {f"{result.dataset_name} {result.metric_type}": result.metric_value for result in found}


def _lines(text: str, expected: str) -> Iterator[Finding]:
    """The lines that are not as the results give them, at most a few; the number of those that were added by hand."""
    there, wanted = text.split("\n"), expected.split("\n")
    added = differing = 0
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, wanted, there, autojunk=False).get_opcodes():
        if kind == "insert":
            added += j2 - j1
        elif kind != "equal":
            differing += 1
            if differing <= _MOST:
                yield _difference(wanted[i1:i2], there[j1:j2], there, j1)
    if differing > _MOST:
        yield Finding("card", README_FILE, f"differs in {differing - _MOST} more places.", _CARD)
    if added:
        yield note("card", README_FILE, f"{added} lines were added by hand: they are their author's word.")


def _difference(wanted: list[str], there: list[str], lines: list[str], at: int) -> Finding:
    heading = next((line.lstrip("# ") for line in reversed(lines[: at + 1]) if line.startswith("#")), "metadata")
    subject = f"{README_FILE} line {at + 1} ({heading})"
    if not there:
        return Finding("card", subject, f"a line is missing here: {_cut(wanted[0], 0)!r}.", _CARD)
    pairs = zip(wanted, there, strict=False)
    should, does = next(((a, b) for a, b in pairs if a != b), (wanted[-1], there[-1]))
    start = next((i for i, (a, b) in enumerate(zip(should, does, strict=False)) if a != b), min(len(should), len(does)))
    return Finding("card", subject, f"says {_cut(does, start)!r}, the results give {_cut(should, start)!r}.", _CARD)


def _cut(line: str, at: int) -> str:
    """The part of a line around a character."""
    begin = max(0, at - _SHOWN // 2)
    return ("…" if begin else "") + line[begin : begin + _SHOWN] + ("…" if len(line) > begin + _SHOWN else "")


def _first(problem: str) -> str:
    """The first line of a problem: parsers tell long stories."""
    return problem.splitlines()[0].rstrip(".:") + "."
