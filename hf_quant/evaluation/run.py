"""evaluate(): a candidate against its float reference: accuracy, size and speed in one results file."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_quant.checkpoint import MANIFEST_FILE, atomic_write, checkpoint_digest, record_evidence, require_verified
from hf_quant.errors import EvaluationError
from hf_quant.evaluation import environment
from hf_quant.evaluation.accuracy import AUTO_KERNEL, Job, accuracy, environment_of, forces, name_of
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.compressed import DRAWN, KEPT
from hf_quant.evaluation.depth import DepthJudge
from hf_quant.evaluation.depth_slices import text_depth
from hf_quant.evaluation.divergence import Divergence
from hf_quant.evaluation.judges import Panel, Request, make_panel
from hf_quant.evaluation.machine import peak_growth
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.reference_cache import ReferenceCache
from hf_quant.evaluation.results import (
    RESULTS_FILE,
    EvaluationResult,
    NoiseFloor,
    Protocol,
    RoundedActivations,
    SizeResult,
    SpeedResult,
    TextResult,
    ThroughputResult,
)
from hf_quant.evaluation.size import bits_per_weight, disk_bytes, memory_bytes
from hf_quant.evaluation.sources import Origin, Source, checked_device, opened, quiet_loading, timed_load
from hf_quant.evaluation.speed import Subject, measure, measure_passes, run_once
from hf_quant.evaluation.task_record import with_earlier_tasks
from hf_quant.evaluation.text import Text, Windows
from hf_quant.kernels import registry

BOOTSTRAP_SAMPLES = 10_000


def evaluate(
    candidate: Source,
    reference: Source,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    texts: Sequence[str | Path | Text] | None = None,
    media: str | Path | None = None,
    windows: int | None = None,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    speed: bool = True,
    noise_floor: bool = True,
    int8_activations: bool = True,
    depth: bool = True,
    reference_cache: Path | str | None = None,
    kernel: str = AUTO_KERNEL,
    activations: str = registry.FLOAT,
    repeats: int = 3,
    bootstrap_samples: int = BOOTSTRAP_SAMPLES,
    trust_remote_code: bool = False,
    reference_revision: str | None = None,
    progress: bool = True,
    command: str | None = None,
) -> EvaluationResult:
    """Measure a model against the float model that it was made from.

    Accuracy comes first, with two models in memory at a time: the reference and the candidate, then the reference and
    its 16-bit self (the noise floor). Besides them there are the hidden states of the windows and a few chunks of
    logits, whatever the vocabulary. Then both models are loaded afresh in 16 bits for memory and speed.

    What accuracy means depends on what the model is for (:mod:`hf_quant.evaluation.kinds`): perplexity and KL for
    those that continue text; embeddings, classes, captions, or answers for the others.

    Args:
        candidate: a directory or Hub id that transformers can load (ours or any other format), or a model in memory.
        reference: the float model, likewise. A model in memory is also saved to a temporary directory, because its
            size, its load time and the noise floor need files.
        tokenizer: default: the reference's, else the candidate's.
        processor: of images or sound, likewise.
        texts: ``docs``, ``prose``, text files, ``hub:name[@config][:split[:column]]``, or :class:`Text`; default: both
            built-in ones, for models that read text.
        media: ``images:DIR`` or ``audio:DIR``, for models that read those; default: synthetic ones, which the results
            call that.
        windows: windows per text, images or clips; at least 2. Default 16, of encoders, classifiers and models of
            images 128.
        length: tokens per window; default (None or 0) 512, of encoder-decoders 256, of encoders 128.
        dtype: of both models during the accuracy pass; default float32, or the dtype of a reference in memory.
        device: default ``cpu``.
        seed: of the choice of windows and of the bootstrap.
        speed: measure load seconds, prefill and decode tokens per second too.
        noise_floor: compare the reference in 16 bits with itself too.
        int8_activations: measure what ``activations="int8"`` adds too, where the candidate's kernels can do it.
        depth: of models that continue text, measure where it is lost too: by the float model's confidence, by position,
            layer by layer, in generated answers.
        reference_cache: a directory that keeps what many candidates are compared with (about 1 KB per token): of the
            float model the likeliest tokens and a sample of the others, for models that continue text. The divergence
            is then an estimate, whose error is recorded; all other figures stay what they are. With ``speed=False`` and
            ``depth=False`` the float model is not loaded once the cache holds it.
        kernel: force one of our kernels for the candidate (``auto``: the best for each layer).
        activations: ``int8`` allows our kernels to round the candidate's activations to 8 bits.
        repeats: timed runs for the speed.
        bootstrap_samples: resamples for the confidence intervals.
        trust_remote_code: run Python code that comes with the models.
        reference_revision: of a Hub id.
        progress: bars on stderr.
        command: recorded in the results: how to get them again.

    Raises:
        EvaluationError: a kind of model without a measure, models that do not match, texts that are missing or too
            short, logits that are not numbers.
        CalibrationError: a folder of images or sound that is missing, or a file in it that cannot be read.
        CheckpointError: a candidate of ours whose files are not those of its manifest, or damaged files.
        KernelError: the kernel that was asked for cannot run.
        DependencyError: a package that a format or a Hub dataset needs is not installed.
        OutputError: no space for the temporary copy of a model in memory.
    """
    registry.check_name(kernel)
    registry.check_activations(activations)
    device = checked_device(device)
    asked = forces(kernel, activations)
    if asked is not None and isinstance(candidate, PreTrainedModel):
        raise EvaluationError(f"{asked} for a model in memory.", "load it with that, or pass a directory.")
    for name, value, least in (
        ("windows", windows, 2),
        ("length", length or None, 2),
        ("bootstrap_samples", bootstrap_samples, 1),
    ):
        if value is not None and value < least:
            raise EvaluationError(f"{name}={value} gives no confidence interval.", f"use at least {least}.")
    with ExitStack() as stack:
        stages = stack.enter_context(Stages(progress))
        stack.enter_context(quiet_loading())
        if kernel != AUTO_KERNEL:
            stack.enter_context(environment_of(registry.ENVIRONMENT_VARIABLE, kernel))
        if activations != registry.FLOAT:
            stack.enter_context(environment_of(registry.ACTIVATIONS_VARIABLE, activations))
        float_origin = stack.enter_context(
            opened(reference, "reference", trust_remote_code=trust_remote_code, revision=reference_revision)
        )
        origin = stack.enter_context(opened(candidate, "candidate", trust_remote_code=trust_remote_code))
        digest = _digest(origin, progress)
        with stages.stage("prepare samples"):
            request = Request(texts, media, windows, length, seed, tokenizer, processor)
            panel = make_panel(request, float_origin, origin)
        bits = bits_per_weight(origin.directory, float_origin.directory)
        stored = _stored_dtype(float_origin)
        narrow = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
        job = Job(
            stages,
            origin,
            float_origin,
            _protocol_dtype(dtype, float_origin, origin),
            narrow,
            device,
            kernel,
            activations,
        )
        # last, because its finding is one of the model, not of a text
        inside = DepthJudge(panel.cuts[0], panel.tokenizer) if depth and panel.cuts else None
        cache = _cache(job, panel, reference_cache, seed) if reference_cache is not None else None
        judges = [*panel.judges(cache), *([inside] if inside is not None else [])]
        found = accuracy(job, judges, noise_floor, int8_activations)
        sizes, speeds, throughputs = _footprint(job, panel, bits, repeats if speed else 0, cache is None)
    findings = list(zip(found.measured, found.rounded, found.floors, strict=True))
    texts_found = findings[: len(panel.cuts)]
    samples_found = findings[len(panel.cuts) : len(panel.cuts) + len(panel.examiners)]
    bootstrap = Bootstrap(panel.windows, bootstrap_samples, seed)
    return EvaluationResult(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        candidate=origin.label,
        candidate_digest=digest,
        reference=float_origin.label,
        reference_revision=reference_revision,
        reference_dtype=name_of(job.dtype),
        reference_stored_dtype=name_of(stored),
        task=float_origin.kind.task,
        protocol=Protocol(
            windows=panel.windows,
            length=panel.length,
            dtype=name_of(job.dtype),
            device=job.device,
            seed=seed,
            bootstrap_samples=bootstrap_samples,
            kept_tokens=None if cache is None else KEPT,
            drawn_tokens=None if cache is None else DRAWN,
        ),
        texts=tuple(
            _text_result(cut, *finding, job.floor_dtype, bootstrap, depth)
            for cut, finding in zip(panel.cuts, texts_found, strict=True)
        ),
        samples=tuple(
            examiner.result(*finding, name_of(job.floor_dtype), bootstrap_samples, seed)
            for examiner, finding in zip(panel.examiners, samples_found, strict=True)
        ),
        size=sizes,
        accuracy_kernels=found.kernels,
        speed=speeds,
        throughput=throughputs,
        environment=environment.describe(),
        command=command,
        depth=None
        if inside is None
        else inside.result(found.measured[-1], found.floors[-1], name_of(job.floor_dtype), bootstrap_samples, seed),
    )


def evaluate_directory(directory: Path | str, reference: Source, **options: Any) -> EvaluationResult:
    """:func:`evaluate` a checkpoint directory and record the results in its ``evaluation.json``.

    Tasks that are recorded there of the same checkpoint and float model stay.
    """
    result = with_earlier_tasks(directory, evaluate(Path(directory), reference, **options))
    write_results(directory, result)
    return result


def write_results(directory: Path | str, result: EvaluationResult) -> Path:
    """Write ``evaluation.json`` into a directory, whole or not at all; returns its path. Raises OutputError.

    A checkpoint of ours records its digest, for :func:`hf_quant.verify`.
    """
    path = Path(directory) / RESULTS_FILE
    atomic_write(path, result.model_dump_json(indent=2) + "\n")
    if (Path(directory) / MANIFEST_FILE).is_file():
        record_evidence(directory, [RESULTS_FILE])
    return path


def _cache(job: Job, panel: Panel, directory: Path | str, seed: int) -> ReferenceCache:
    if not panel.cuts:
        raise EvaluationError(
            f"a reference cache is of no use to {job.reference.label}, which continues no text.", "leave it out."
        )
    with job.stages.stage("digest of the float model"):
        return ReferenceCache.open(
            directory, job.reference.directory, name_of(job.dtype), name_of(job.floor_dtype), seed
        )


def _footprint(
    job: Job, panel: Panel, bits: float, repeats: int, load_float: bool
) -> tuple[SizeResult, tuple[SpeedResult, ...], tuple[ThroughputResult, ...]]:
    """Bytes and speed of both models in 16 bits, loaded afresh; with ``repeats=0`` no speed.

    Without speed and with ``load_float=False`` the float model's bytes are counted on its skeleton.
    """
    gc.collect()
    subjects = []
    memory = []
    dtypes = []
    for role, origin in (("float", job.reference), ("quantized", job.candidate)):
        if role == "float" and not repeats and not load_float:
            memory.append(origin.memory_bytes(job.narrow))
            dtypes.append(name_of(job.narrow))
            continue
        with job.stages.stage(f"load {role} model in {name_of(job.narrow)}"), peak_growth(job.device) as peak:
            model, seconds = timed_load(origin, job.narrow, job.device)
            if repeats and panel.cuts:
                run_once(model, panel.cuts[0].ids.flatten())
        dtypes.append(name_of(model.dtype))  # some formats do not follow the dtype that is asked for
        if repeats:
            subjects.append(Subject("float" if role == "float" else "quantized", model, seconds, peak.nbytes))
        else:
            memory.append(memory_bytes(model))
        del model
    speeds: tuple[SpeedResult, ...] = ()
    throughputs: tuple[ThroughputResult, ...] = ()
    if repeats:
        with job.stages.stage("speed, in turns", len(subjects) * (repeats + 1)) as advance:
            if panel.cuts:
                speeds = measure(subjects, panel.cuts[0].ids.flatten(), repeats=repeats, advance=advance)
            else:
                first = panel.examiners[0]
                inputs = [case.inputs for case in first.cases]
                throughputs = measure_passes(subjects, inputs, first.samples.unit, repeats=repeats, advance=advance)
        memory = [memory_bytes(subject.model) for subject in subjects]  # after a run, so with what kernels prepared
    return (
        SizeResult(
            float_disk_bytes=disk_bytes(job.reference.directory),
            quantized_disk_bytes=disk_bytes(job.candidate.directory),
            float_memory_bytes=memory[0],
            quantized_memory_bytes=memory[1],
            memory_dtype=" / ".join(dict.fromkeys(dtypes)),
            bits_per_weight=bits,
        ),
        speeds,
        throughputs,
    )


def _text_result(
    cut: Windows,
    measured: Divergence,
    int8: Divergence | None,
    floor: Divergence | None,
    floor_dtype: torch.dtype,
    bootstrap: Bootstrap,
    depth: bool,
) -> TextResult:
    summary = measured.summary(bootstrap)
    noise = rounded = None
    if int8 is not None:
        other = int8.summary(bootstrap)
        rounded = RoundedActivations(
            kl=other.kl, top1_agreement=other.top1_agreement, perplexity=other.perplexity_model
        )
    if floor is not None:
        below = floor.summary(bootstrap)
        noise = NoiseFloor(
            dtype=name_of(floor_dtype),
            kl=below.kl,
            top1_agreement=below.top1_agreement,
            perplexity=below.perplexity_model,
        )
    return TextResult(
        name=cut.text.name,
        source=cut.text.source,
        sha256=cut.text.sha256,
        tokens=measured.kl.size,
        bos=cut.bos,
        perplexity_float=summary.perplexity_reference,
        perplexity_quantized=summary.perplexity_model,
        perplexity_increase_percent=summary.perplexity_increase_percent,
        kl=summary.kl,
        kl_p99=measured.kl_p99,
        kl_error=measured.kl_error,
        top1_agreement=summary.top1_agreement,
        noise_floor=noise,
        int8_activations=rounded,
        depth=text_depth(measured, floor, bootstrap) if depth else None,
    )


def _protocol_dtype(asked: torch.dtype | None, reference: Origin, candidate: Origin) -> torch.dtype:
    """The accuracy pass's dtype; raises EvaluationError when a model in memory has another one than was asked for."""
    dtype = asked or (reference.model.dtype if reference.model is not None else torch.float32)
    for role, origin in (("reference", reference), ("candidate", candidate)):
        if origin.model is not None and origin.model.dtype != dtype:
            raise EvaluationError(
                f"the {role} is in {name_of(origin.model.dtype)}, but accuracy is to be measured in {name_of(dtype)}.",
                "load it in that dtype, or pass the directory instead of the model.",
            )
    return dtype


def _stored_dtype(origin: Origin) -> torch.dtype:
    """The dtype that a float checkpoint's config records; float32 where it records none."""
    config = AutoConfig.from_pretrained(str(origin.directory), trust_remote_code=origin.trust_remote_code)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _digest(origin: Origin, progress: bool) -> str | None:
    """What names the candidate's content: of a checkpoint of ours, after checking its files against the manifest."""
    if origin.model is not None or not (origin.directory / MANIFEST_FILE).is_file():
        return None
    require_verified(origin.directory, progress=progress)
    return checkpoint_digest(origin.directory)
