"""compare(): results that are recorded and belong together, the missing ones measured by the same protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from hf_quant.checkpoint import MANIFEST_FILE, checkpoint_digest, read_json, read_manifest
from hf_quant.comparison.result import Comparison, Entry, Loss
from hf_quant.errors import EvaluationError, HfQuantError
from hf_quant.evaluation import RESULTS_FILE, EvaluationResult, environment, evaluate, load_text
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.results import SpeedResult
from hf_quant.evaluation.sources import checked_device, load_tokenizer, opened, quiet_loading, timed_load
from hf_quant.evaluation.speed import PREFILL_TOKENS, Subject, measure
from hf_quant.texts import BUILT_IN

Measure: TypeAlias = Literal["missing", "always", "never"]

KL = "KL(float ‖ quantized), nats per token"
_SAME_FLOAT = 2e-3  # relative: perplexities of one float model on one text, on different processors
_PROTOCOL = ("windows", "length", "dtype", "seed")


@dataclass(frozen=True)
class _Found:
    """The results of one checkpoint, and whether they were in its directory."""

    directory: Path
    name: str
    result: EvaluationResult
    recorded: bool


def compare(
    directories: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    measured: Measure = "missing",
    speed: bool = False,
    texts: Sequence[str] | None = None,
    media: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    device: str | None = None,
    repeats: int = 3,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Comparison:
    """Put checkpoints that were made from one float model side by side.

    Any checkpoint that transformers loads can take part. What ``hf-quant evaluate`` recorded in a directory is used
    while it is about the files there; nothing is written into the directories.

    Args:
        directories: at least two, each a quantized checkpoint or a smaller model of the same vocabulary.
        reference: the float model, a directory or a Hub id; needed where something is measured, unless a checkpoint
            records one that can be found.
        measured: ``missing``: what is not recorded; ``always``: all of them anew; ``never``: an error instead.
        speed: load all checkpoints at once and time them in turns, so that their speeds can be compared; else each
            speed is of its own run, and what can be compared is its ratio to the float model there.
        texts, media, windows, length: as in :func:`hf_quant.evaluation.evaluate`; default: as the first recorded
            results say, else evaluate's own.
        device: likewise.
        repeats: timed runs for the speed.
        trust_remote_code: run Python code that comes with the models.
        progress: bars on stderr.

    Raises:
        EvaluationError: fewer than two directories, one named twice, results of different protocols or float models,
            nothing recorded where nothing may be measured, no float model to measure against.
        HfQuantError: as :func:`hf_quant.evaluation.evaluate`.
    """
    device = None if device is None else checked_device(device)
    paths = _checked(directories)
    names = _names(paths)
    known: dict[Path, EvaluationResult] = {}
    reasons: dict[Path, str] = {}
    for path in paths:
        own = "" if measured == "always" else _recorded(path)
        if isinstance(own, EvaluationResult):
            known[path] = own
        else:
            reasons[path] = own
    if reasons and measured == "never":
        path, reason = next(iter(reasons.items()))
        raise EvaluationError(
            f"{path} {reason}, and nothing may be measured.", f"run `hf-quant evaluate {path}`, or let compare measure."
        )
    asked = {"texts": texts, "media": media, "windows": windows, "length": length, "device": device}
    first = next(iter(known.values()), None)
    settings = _settings(asked, first) if reasons else {}
    float_model = _reference(reference, paths) if reasons or speed else None
    found: list[_Found] = []
    for path in paths:
        if path in known:
            result = known[path]
        else:
            assert float_model is not None
            result = evaluate(
                path,
                float_model,
                **settings,
                speed=not speed,
                int8_activations=False,
                depth=False,  # no table shows it
                repeats=repeats,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        found.append(_Found(path, names[path], result, path in known))
    for other in found[1:]:
        _check_alike(found[0], other)
    _check_asked(asked, found[0])
    if speed and found[0].result.texts:
        assert float_model is not None
        rates = _in_turns(paths, float_model, device or "cpu", repeats, trust_remote_code, progress)
    else:
        rates = {}
    return _comparison(found, rates)


def _checked(directories: Sequence[str | Path]) -> list[Path]:
    """The directories, each a model, none twice."""
    if len(directories) < 2:
        raise EvaluationError(
            f"a comparison needs at least two checkpoints, got {len(directories)}.",
            "name more; one alone is measured by `hf-quant evaluate`.",
        )
    paths = [Path(directory) for directory in directories]
    seen: dict[Path, Path] = {}
    for path in paths:
        if not (path / "config.json").is_file():
            what = "has no config.json" if path.is_dir() else "is not a directory"
            raise EvaluationError(f"{path} {what}.", "give directories of models that transformers loads.")
        if path.resolve() in seen:
            raise EvaluationError(f"{path} is named twice.", "name each checkpoint once.")
        seen[path.resolve()] = path
    return paths


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The directories' own names, with their parents' where two are alike."""
    own = [path.resolve().name for path in paths]
    return {
        path: name if own.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for path, name in zip(paths, own, strict=True)
    }


def _recorded(path: Path) -> EvaluationResult | str:
    """The results that lie in a directory, or why they are of no use."""
    if not (path / RESULTS_FILE).is_file():
        return f"has no {RESULTS_FILE}"
    try:
        result = EvaluationResult.read(path / RESULTS_FILE)
    except EvaluationError:
        return f"has a {RESULTS_FILE} that is not one of hf-quant's"
    digest = checkpoint_digest(path) if (path / MANIFEST_FILE).is_file() else None
    if result.candidate_digest != digest:
        return f"has a {RESULTS_FILE} of other files than those that lie there"
    return result


def _settings(asked: Mapping[str, Any], first: EvaluationResult | None) -> dict[str, Any]:
    """How to measure: as asked, else as the first recorded results were, else by default."""
    settings = {key: value for key, value in asked.items() if value is not None}
    if first is None:
        return settings
    protocol = first.protocol
    if asked["texts"] is None and first.texts:
        foreign = [text for text in first.texts if text.name not in BUILT_IN]
        if foreign:
            raise EvaluationError(
                f"what is recorded was measured on {foreign[0].name!r} ({foreign[0].source}), which is not built in.",
                "give that text: --text FILE.",
            )
        settings["texts"] = tuple(text.name for text in first.texts)
    settings.setdefault("windows", protocol.windows)
    settings.setdefault("length", protocol.length)
    settings.setdefault("device", protocol.device)
    return {**settings, "dtype": getattr(torch, protocol.dtype), "seed": protocol.seed}


def _reference(given: str | Path | None, paths: Sequence[Path]) -> str | Path:
    """The float model to measure against."""
    if given is not None:
        return given
    for path in paths:
        if (path / MANIFEST_FILE).is_file():
            base = str(read_manifest(path).provenance.get("base_model") or "")
            if "/" in base or Path(base or "missing").is_dir():
                return base
    raise EvaluationError(
        "something is to be measured, and no checkpoint records a float model that can be found.",
        "say where it is: --reference DIR_OR_HUB_ID.",
    )


def _check_alike(one: _Found, other: _Found) -> None:
    """Raise EvaluationError when two results cannot stand in one table."""
    a, b = one.result, other.result
    pairs: list[tuple[str, Any, Any]] = [(key, getattr(a.protocol, key), getattr(b.protocol, key)) for key in _PROTOCOL]
    pairs += [("what was read", _read(a), _read(b)), ("loss", _loss_name(a), _loss_name(b))]
    for text, same in zip(a.texts, b.texts, strict=False):
        values = text.perplexity_float.value, same.perplexity_float.value
        if not math.isclose(*values, rel_tol=_SAME_FLOAT):
            pairs.append((f"float perplexity on {text.name}", f"{values[0]:.4g}", f"{values[1]:.4g}"))
    if not a.texts:
        pairs.append(("float model", a.reference, b.reference))
    for what, left, right in pairs:
        if left != right:
            raise EvaluationError(
                f"{one.directory} and {other.directory} were measured differently: {what} is {left} and {right}.",
                "measure all of them alike: --measure always.",
            )


def _check_asked(asked: Mapping[str, Any], one: _Found) -> None:
    """Raise EvaluationError when recorded results are not what was asked for."""
    protocol = one.result.protocol
    wrong = [key for key in ("windows", "length") if asked[key] not in (None, getattr(protocol, key))]
    if asked["texts"] is not None and one.recorded:
        digests = [load_text(text).sha256 for text in asked["texts"]]
        if digests != [text.sha256 for text in one.result.texts]:
            wrong.append("text")
    if wrong:
        raise EvaluationError(
            f"{one.directory} has results of another {wrong[0]} than was asked for.",
            "measure anew: --measure always.",
        )


def _read(result: EvaluationResult) -> list[str]:
    texts = [f"{text.name} {text.sha256[:12]}" for text in result.texts]
    return [*texts, *(f"{samples.name} {samples.sha256[:12]}" for samples in result.samples)]


def _loss_name(result: EvaluationResult) -> str:
    return KL if result.texts else result.samples[0].figures[0].title


def _in_turns(
    paths: Sequence[Path], reference: str | Path, device: str, repeats: int, trust_remote_code: bool, progress: bool
) -> dict[Path, SpeedResult]:
    """Speeds of all checkpoints in bfloat16, loaded at once and timed in turns."""
    with ExitStack() as stack:
        stages = stack.enter_context(Stages(progress))
        stack.enter_context(quiet_loading())
        origins = [stack.enter_context(opened(p, "candidate", trust_remote_code=trust_remote_code)) for p in paths]
        float_origin = stack.enter_context(opened(reference, "reference", trust_remote_code=trust_remote_code))
        tokenizer = load_tokenizer(float_origin, origins[0])
        ids = torch.tensor(tokenizer(load_text(BUILT_IN[0]).content[: 16 * PREFILL_TOKENS]).input_ids)
        subjects = []
        for origin in origins:
            with stages.stage(f"load {origin.label}"):
                subjects.append(Subject("quantized", *timed_load(origin, torch.bfloat16, device)))
        with stages.stage("speed, in turns", len(subjects) * (repeats + 1)) as advance:
            return dict(zip(paths, measure(subjects, ids, repeats=repeats, advance=advance), strict=True))


def _comparison(found: Sequence[_Found], rates: Mapping[Path, SpeedResult]) -> Comparison:
    first = found[0].result
    throughput = first.throughput[0].unit if first.throughput else "tokens"
    return Comparison(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        reference=first.reference,
        float_disk_bytes=first.size.float_disk_bytes,
        loss=_loss_name(first),
        speed_unit=throughput,
        protocol=first.protocol,
        environment=environment.describe(),
        one_run=bool(rates),
        entries=tuple(_entry(one, rates.get(one.directory)) for one in found),
    )


def _entry(found: _Found, rate: SpeedResult | None) -> Entry:
    result = found.result
    own = {run.model: run.decode_tokens_per_second for run in result.speed} or {
        run.model: run.samples_per_second for run in result.throughput
    }
    ratio = own["quantized"] / own["float"] if own else None
    speed = rate.decode_tokens_per_second if rate is not None else own.get("quantized")
    agreements = [text.top1_agreement.value for text in result.texts]
    return Entry(
        name=found.name,
        format=_format(found.directory),
        digest=result.candidate_digest,
        disk_bytes=result.size.quantized_disk_bytes,
        bits_per_weight=result.size.bits_per_weight,
        losses=_losses(result),
        agreement=sum(agreements) / len(agreements) if agreements else None,
        decode_tokens_per_second=speed,
        speed_ratio=None if rate is not None else ratio,
        measured="recorded" if found.recorded else "here",
    )


def _losses(result: EvaluationResult) -> tuple[Loss, ...]:
    if result.texts:
        return tuple(
            Loss(
                name=text.name,
                sha256=text.sha256,
                value=text.kl,
                noise_floor=None if text.noise_floor is None else text.noise_floor.kl,
            )
            for text in result.texts
        )
    return tuple(
        Loss(name=s.name, sha256=s.sha256, value=s.figures[0].value, noise_floor=s.figures[0].noise_floor)
        for s in result.samples
    )


def _format(directory: Path) -> str:
    """What a checkpoint's config calls its quantization: ``compressed-tensors``, ``gptq``, ...; ``float`` without."""
    try:
        config = read_json(directory, "config.json").get("quantization_config")
    except HfQuantError:
        return "float"
    return str(config.get("quant_method") or "quantized") if isinstance(config, dict) else "float"
