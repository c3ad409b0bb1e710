"""The recorded figures, measured again by the recorded protocol, and compared within the intervals that they state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_quant.checkpoint import RESULTS_FILE
from hf_quant.errors import EvaluationError
from hf_quant.evaluation import evaluate
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.texts import BUILT_IN, Text, load_text
from hf_quant.verification.findings import Finding, note
from hf_quant.verification.tasks import check_tasks

# A figure without an interval (a percentile) may move this much with the order of floating-point sums, which differs
# between processors and kernels.
PLAIN_TOLERANCE = 0.05
_ENDS = 0.5  # how far the ends of an interval may move, as a share of it
_INTERVAL = {"value", "low", "high"}
_SECTIONS = ("texts", "samples")
_EXACT = ("float_disk_bytes", "quantized_disk_bytes")
_TIMED = ("speed", "throughput")
_FIX = "run `hf-quant evaluate` and `hf-quant card` again, or ask its maker how it was measured."


def check_metrics(
    directory: Path,
    reference: str,
    *,
    texts: Sequence[str] = (),
    media: str | None = None,
    tasks: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[list[Finding], str]:
    """Evaluate a checkpoint again as its evaluation.json says, and compare.

    A figure with an interval reproduces when each of the two values lies in the other's interval and the ends of both
    lie within half of an interval of each other (the windows and the resamples are the same, so they hardly move); one
    without, when it is within 5 %; bytes on disk and counts exactly. Speed and memory depend on the machine: they are
    reported, not judged.

    Args:
        directory: the checkpoint, with results.
        reference: the float model that it was measured against.
        texts: texts that are neither built in nor Hub datasets: the files that the recorded names stand for.
        media: likewise, a folder of images or sound.
        tasks: run the recorded tasks again too.
        device: default: the recorded one.
        trust_remote_code: run Python code that comes with the models.
        progress: bars on stderr.

    Returns:
        the findings, and what was measured in words.

    Raises:
        HfQuantError: no results, or it cannot be measured here.
    """
    recorded = EvaluationResult.read(directory / RESULTS_FILE)
    protocol, plain = recorded.protocol, recorded.model_dump()
    loaded, findings = _texts(plain, texts)
    if findings:
        return findings, ""
    parts = [part for name in _SECTIONS for part in plain.get(name, ())]
    samples: dict[str, Any] = {"texts": loaded} if loaded else {}
    if media is not None:
        samples["media"] = media
    again = evaluate(
        directory,
        reference,
        **samples,
        windows=protocol.windows,
        length=protocol.length,
        dtype=getattr(torch, protocol.dtype),
        device=device or protocol.device,
        seed=protocol.seed,
        bootstrap_samples=protocol.bootstrap_samples,
        speed=any(plain.get(name) for name in _TIMED),
        noise_floor=any(_measured(part, "noise_floor") for part in parts),
        int8_activations=any(_measured(part, "int8_activations") for part in parts),
        depth=recorded.depth is not None,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    count, findings = compare(recorded, again)
    if tasks:
        options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
        scores, wrong = check_tasks(directory, recorded, reference, **options)
        count, findings = count + scores, [*findings, *wrong]
    else:
        findings += _not_run(recorded)
    return findings, f"{count} figures measured again against {reference}"


def compare(recorded: EvaluationResult, again: EvaluationResult) -> tuple[int, list[Finding]]:
    """(figures compared, what does not reproduce and what is only reported) of two evaluations by one protocol."""
    old, new = recorded.model_dump(), again.model_dump()
    pairs = [pair for name in _SECTIONS for pair in _by_name(name, old.get(name, ()), new.get(name, ()))]
    findings = []
    if layers := _depth(old):
        pairs.append(("depth.layers", layers, _depth(new)))
        problem = "is not judged: where two tokens are close, a rounding decides between them."
        findings.append(note("metrics", "depth.generation", problem))
    findings += [finding for where, a, b in pairs for finding in _walk(where, a, b)]
    for key in _EXACT:
        if old["size"][key] != new["size"][key]:
            findings.append(_off(f"size.{key}", f"is {new['size'][key]:,} here, not {old['size'][key]:,}"))
    bits = (old["size"]["bits_per_weight"], new["size"]["bits_per_weight"])
    if not math.isclose(*bits, rel_tol=1e-6):
        findings.append(_off("size.bits_per_weight", f"is {bits[1]:g} here, not {bits[0]:g}"))
    for key in _TIMED:
        for before, now in zip(old.get(key, ()), new.get(key, ()), strict=False):
            rates = [name for name in before if name.endswith("_per_second")]
            told = ", ".join(f"{name} {now[name]:.3g} here, {before[name]:.3g} recorded" for name in rates)
            findings.append(note("metrics", f"{key} of the {before['model']} model", f"{told} (not judged)."))
    if (old["accuracy_kernels"] or {}) != (new["accuracy_kernels"] or {}):
        told = f"{new['accuracy_kernels']} here, {old['accuracy_kernels']} recorded"
        findings.append(note("metrics", "kernels", f"{told}: figures may differ within their intervals."))
    return sum(_count(a) for _, a, _ in pairs) + len(_EXACT) + 1, findings


def _not_run(recorded: EvaluationResult) -> list[Finding]:
    """Tasks are whole benchmarks: they are run again only when that is asked for."""
    names = [", ".join(task.name for task in run.tasks) for run in recorded.tasks]
    return [note("metrics", f"tasks {name}", "are not run again: --tasks does that.") for name in names]


def _depth(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Errors inside the model without their noise floor, which is rounding alone and depends on the kernels."""
    layers = (plain.get("depth") or {}).get("layers") or {}
    parts = {key: value for key, value in layers.items() if key not in ("blocks", "linears")}
    for key in ("blocks", "linears"):
        if key in layers:
            parts[key] = [{k: v for k, v in part.items() if k != "noise_floor"} for part in layers[key]]
    return parts


def _texts(recorded: Mapping[str, Any], given: Sequence[str]) -> tuple[list[Text], list[Finding]]:
    """The recorded texts by name and digest; a finding for each that cannot be had or is another one."""
    files = {text.name: text for text in map(load_text, given)}
    continued = recorded["texts"]
    # what encoders and their like read is digested as the model reads it; images and sound are no texts
    wanted = continued or [part for part in recorded.get("samples", ()) if part["name"] in (*BUILT_IN, *files)]
    unknown = [name for name in files if name not in [part["name"] for part in wanted]]
    if unknown:
        raise EvaluationError(f"no recorded text is called {unknown[0]!r}.", "leave out --text, or rename the file.")
    loaded, findings = [], []
    for part in wanted:
        name, source = part["name"], part["source"]
        if name not in files and name not in BUILT_IN:
            problem = f"is not built in ({source}), so it cannot be measured on again."
            fix = "give it with --text (its SHA-256 is compared)."
            findings.append(Finding("metrics", f"text {name!r}", problem, fix))
            continue
        found = files[name] if name in files else load_text(name)
        loaded.append(found)
        if continued and found.sha256 != part["sha256"]:
            digests = f"SHA-256 {found.sha256[:12]}…, measured was {part['sha256'][:12]}…"
            problem = f"is another one here ({digests}: {source})."
            fix = "verify with the same text: the built-in one comes with Python, whose version it depends on."
            findings.append(Finding("metrics", f"text {name!r}", problem, fix))
    return loaded, findings


def _by_name(section: str, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """(name, recorded, measured again) of each text or set of samples."""
    found = {part["name"]: part for part in new}
    for part in old:
        yield f"{section}.{part['name']}", part, found.get(part["name"])


def _measured(part: Mapping[str, Any], key: str) -> bool:
    """Whether a text or a set of samples has this beside its figures."""
    return part.get(key) is not None or any(figure.get(key) is not None for figure in part.get("figures", ()))


def _walk(where: str, old: Any, new: Any) -> Iterator[Finding]:
    """What differs between a recorded value and the one measured again."""
    if isinstance(old, Mapping) and old.keys() >= _INTERVAL:
        if not (isinstance(new, Mapping) and new.keys() >= _INTERVAL):
            yield _off(where, "is not measured here")
        elif problem := _interval(old, new):
            yield _off(where, problem)
    elif isinstance(old, Mapping):
        for key, value in old.items():
            if key not in ("source", "notes", "title", "kl_error"):
                yield from _walk(f"{where}.{key}", value, new.get(key) if isinstance(new, Mapping) else None)
    elif isinstance(old, (list, tuple)):
        others = list(new) if isinstance(new, (list, tuple)) else []
        for i, value in enumerate(old):
            name = value.get("name", i) if isinstance(value, Mapping) else i
            yield from _walk(f"{where}.{name}", value, others[i] if i < len(others) else None)
    elif isinstance(old, float) and isinstance(new, (int, float)):
        if not math.isclose(old, new, rel_tol=PLAIN_TOLERANCE, abs_tol=1e-9):
            yield _off(
                where, f"is {new:.6g} here, not {old:.6g} (it has no interval; {PLAIN_TOLERANCE:.0%} is allowed)"
            )
    elif old is not None and old != new:
        yield _off(where, f"is {new!r} here, not {old!r}")


def _interval(old: Mapping[str, float], new: Mapping[str, float]) -> str:
    """How a recorded figure with its interval differs from the one measured again; empty when it reproduces."""
    same = math.isclose(old["value"], new["value"], rel_tol=1e-9)
    stated, found = (f"{part['value']:.6g} [{part['low']:.6g}, {part['high']:.6g}]" for part in (old, new))
    if not (same or old["low"] <= new["value"] <= old["high"]):
        return f"is {new['value']:.6g} here, outside of the recorded {stated}"
    if not (same or new["low"] <= old["value"] <= new["high"]):
        return f"is {found} here, which does not hold the recorded {old['value']:.6g}"
    slack = _ENDS * (new["high"] - new["low"]) + 1e-9 * abs(new["value"])
    if any(abs(old[end] - new[end]) > slack for end in ("low", "high")):
        return f"is {found} here, the recorded interval is another one: {stated}"
    return ""


def _count(value: Any) -> int:
    """Figures in a recorded value: numbers, an interval being one."""
    if isinstance(value, Mapping):
        return 1 if value.keys() >= _INTERVAL else sum(map(_count, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_count, value))
    return int(isinstance(value, (int, float)) and not isinstance(value, bool))


def _off(where: str, problem: str) -> Finding:
    return Finding("metrics", where, f"{problem}.", _FIX)
