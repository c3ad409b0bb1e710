"""The accuracy pass of an evaluation: the float model once, then whatever is compared with it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.judge import Judge
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.sources import Origin
from hf_quant.evaluation.speed import kernels
from hf_quant.kernels import registry
from hf_quant.nn.packed import PackedWeight

AUTO_KERNEL = "auto"


@dataclass(frozen=True)
class Job:
    """What the stages share."""

    stages: Stages
    candidate: Origin
    reference: Origin
    dtype: torch.dtype
    narrow: torch.dtype
    device: str
    kernel: str
    activations: str

    @property
    def forces(self) -> str | None:
        """What was asked of our kernels, as it was written; None for the defaults."""
        return forces(self.kernel, self.activations)

    @property
    def floor_dtype(self) -> torch.dtype:
        """The other dtype of the noise floor: 16 bits against float32, whichever of them the protocol uses."""
        return self.narrow if self.dtype == torch.float32 else torch.float32


@dataclass(frozen=True)
class Findings:
    """What all judges found, one after the other: lists of equal length, None where something was not measured.

    Attributes:
        measured: of the candidate.
        rounded: of the candidate with int8 activations.
        floors: of the float model in another dtype.
        kernels: layers of the candidate per kernel.
    """

    measured: list[Any]
    rounded: list[Any]
    floors: list[Any]
    kernels: dict[str, int]


def accuracy(job: Job, judges: Sequence[Judge], noise_floor: bool, int8_activations: bool) -> Findings:
    """The candidate, it with int8 activations, and the noise floor, before every judge."""
    known = all(judge.remembers(noise_floor) for judge in judges)
    reference = None
    if not known:
        with job.stages.stage("load float model"):
            reference = job.reference.model or job.reference.load(job.dtype, job.device)
    for judge in judges:
        judge.meet(reference, job.stages)
    with job.stages.stage("load quantized model"):
        model = job.candidate.model or job.candidate.load(job.dtype, job.device)
        if job.forces is not None and not _runs_our_kernels(model):
            raise EvaluationError(
                f"{job.forces} was asked for, but {job.candidate.label} has no layer of hf-quant.",
                "drop that, or evaluate a checkpoint made by hf-quant.",
            )
    measured = [
        found for judge in judges for found in judge.against(model, "the candidate", "quantized model", job.stages)
    ]
    ran = kernels(model)
    rounded: list[Any] = [None] * len(measured)
    floors = list(rounded)
    # a model in memory is left as it is: its owner has chosen how it runs
    if int8_activations and job.activations == registry.FLOAT and job.candidate.model is None:
        with environment_of(registry.ACTIVATIONS_VARIABLE, registry.INT8):
            if _takes_int8(model, job.dtype):
                rounded = [
                    found
                    for judge in judges
                    for found in (
                        judge.against(model, "the candidate", "with int8 activations", job.stages)
                        if judge.rounds
                        else [None]
                    )
                ]
    del model
    gc.collect()  # transformers' models hold reference cycles; the next one would come on top
    if noise_floor:
        title = f"noise floor ({name_of(job.floor_dtype)})"
        model = None
        if not known:
            with job.stages.stage(f"load {title}"):
                model = replace(job.reference, model=None).load(job.floor_dtype, job.device)
        label = f"the reference in {name_of(job.floor_dtype)}"
        floors = [found for judge in judges for found in judge.floor(model, label, title, job.stages)]
    return Findings(measured, rounded, floors, ran)


def _takes_int8(model: Any, dtype: torch.dtype) -> bool:
    """Let every layer of ours choose its kernel again; whether any rounds its activations now."""
    layers = [module for module in model.modules() if isinstance(module, PackedWeight)]
    used = {layer.kernel_name for layer in layers} - {None}
    if not any(registry.INT8 in registry.get(name).activation_modes for name in used):
        return False
    for layer in layers:
        layer.release()
    return registry.INT8 in [layer.prepare(dtype).activations for layer in layers]


def _runs_our_kernels(model: PreTrainedModel) -> bool:
    return any(hasattr(module, "kernel_name") for module in model.modules())


def forces(kernel: str, activations: str) -> str | None:
    """What was asked of our kernels, as it was written; None for the defaults."""
    if kernel != AUTO_KERNEL:
        return f"kernel={kernel}"
    return None if activations == registry.FLOAT else f"activations={activations}"


@contextmanager
def environment_of(variable: str, value: str) -> Iterator[None]:
    """What layers that are made and prepared inside the block ask for."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
