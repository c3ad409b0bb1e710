"""A budget instead of a guess: sensitivities, allocation, and for budgets of accuracy quantizing and measuring."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_quant import api
from hf_quant.calibration import CalibrationData, load_calibration
from hf_quant.checkpoint import atomic_write, check_output
from hf_quant.config import CALIBRATED, Calibration, HfQuantConfig
from hf_quant.errors import BudgetError
from hf_quant.evaluation.divergence import Reference, compare, run_reference
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.integrations.calibrated import Session
from hf_quant.integrations.shell import ModelWeights
from hf_quant.nn.splitting import split_experts
from hf_quant.plan import EMBEDDING, make_plan
from hf_quant.plots import draw_budget
from hf_quant.quantize.allocate import Budget
from hf_quant.quantize.fit_budget import Attempt, FittedBudget, Measurement, fit_budget
from hf_quant.quantize.fold import SAMPLES, find_folds
from hf_quant.quantize.gains import calibrated_gains, with_gains
from hf_quant.quantize.menu import FUSED, Menu, make_menu
from hf_quant.quantize.sensitivity import estimate_sensitivity, settings, take_samples
from hf_quant.quantize.sensitivity_record import Sensitivity, model_digest
from hf_quant.skeleton import model_class, plan_directory, read_settings

HELD_OUT = 8  # one calibration sample of so many is kept to measure on


@dataclass(frozen=True)
class BudgetedRun:
    """What a budget came to.

    Attributes:
        config: with one override per layer.
        fitted: the allocation, what was measured on held-out data, and every attempt.
        sensitivity: per layer and scheme.
        menu: what there was to choose from.
    """

    config: HfQuantConfig
    fitted: FittedBudget
    sensitivity: Sensitivity
    menu: Menu


def quantize_to_budget(
    source: str | os.PathLike[str],
    config: HfQuantConfig,
    budget: Budget,
    output_dir: str | os.PathLike[str],
    *,
    sensitivities: str | os.PathLike[str] | None = None,
    fuse: bool = True,
    overwrite: bool = False,
    session: Session | None = None,
    on_sensitivity: Callable[[int, int], None] | None = None,
    on_attempt: Callable[[Attempt], None] | None = None,
    **options: Any,
) -> BudgetedRun:
    """Choose bits and groups per layer within a budget, quantize, and save.

    The float model is loaded as a whole once, for the gradients of the sensitivities. Budgets of accuracy are verified:
    each try is quantized and measured on calibration samples that it did not see, and the next one adjusted.

    Args:
        source: directory of a float causal language model (any model for budgets of bits and bytes).
        config: grid, method or preset, calibration, skips; its own overrides stay as they are.
        budget: one limit.
        output_dir: where the checkpoint goes.
        sensitivities: a file to reuse; written when it does not exist.
        fuse: layers that servers run as one matrix (q/k/v, gate/up) share one scheme.
        overwrite: replace an existing checkpoint.
        session: callbacks, as in :func:`hf_quant.quantize`.
        on_sensitivity: told how many samples are done, of how many.
        on_attempt: called after every try of a budget of accuracy.
        **options: for :func:`hf_quant.quantize`.

    Raises:
        BudgetError: a budget that nothing satisfies; the message says what is possible.
        SensitivityError: a file of sensitivities of another model, data or menu.
        HfQuantError: as :func:`hf_quant.quantize`.
    """
    output = Path(output_dir)
    check_output(output, overwrite)
    directory = Path(os.fspath(source))
    if not directory.is_dir():
        raise BudgetError(f"{source} is not a directory.", "download the model first; its gradients are needed.")
    planned = plan_directory(directory, config, options.get("trust_remote_code", False))
    if table := next((layer.name for layer in planned.quantized if layer.kind == EMBEDDING), None):
        raise BudgetError(f"a budget does not weigh embeddings, and {table} is to be quantized.", "drop its override.")
    asked = dict(config.calibration or Calibration().model_dump())
    fold = asked.pop("fold") and config.method == CALIBRATED
    current = replace(session or Session())
    data = current.data or load_calibration(
        asked.pop("source"), directory=directory, **asked, progress=current.on_sampling
    )
    if current.on_data:
        current.on_data(data)
    train, held_out = data.split(max(1, data.samples // HELD_OUT)) if budget.is_measured else (data, data)
    with ExitStack() as stack:
        model = _float_model(directory, options.get("trust_remote_code", False))
        if fold:  # layers are weighed as they will be quantized
            layers, samples = make_plan(model, config).quantized, take_samples(data.batches, SAMPLES)
            find_folds(model, layers, ModelWeights(model), samples, data.source).into(model, layers)
        menu = make_menu(model, config, together=FUSED if fuse else ())
        sensitivity = _sensitivity(model, data, menu, sensitivities, on_sensitivity)
        if config.method == CALIBRATED:
            sensitivity = with_gains(sensitivity, calibrated_gains(model, data.batches, menu))
        measure = _Measurement(directory, config, train, stack, options)
        if budget.is_measured:
            measure.reference(model, held_out)
        del model  # what is measured against holds it until it is forgotten
        gc.collect()
        fitted = fit_budget(menu, sensitivity, budget, measure, progress=on_attempt)
        measure.forget()
        chosen = fitted.allocation.apply(config)
        if chosen.calibration is not None:
            current.data = train
            index = fitted.best_attempt
            current.journal = None if index is None else measure.journals[index]  # nothing is done twice
        current.on_data = None
        current.note = {"budget": _record(budget, fitted, sensitivity)}
        api.quantize(directory, chosen, output, overwrite=overwrite, session=current, **options)
    _plot(output, budget, fitted)
    return BudgetedRun(chosen, fitted, sensitivity, menu)


class _Measurement:
    """Quantizes with given overrides, keeps the journal, and measures on held-out samples."""

    def __init__(
        self, directory: Path, config: HfQuantConfig, train: CalibrationData, stack: ExitStack, options: dict[str, Any]
    ) -> None:
        self.directory, self.config, self.train, self.options = directory, config, train, options
        self.root = Path(stack.enter_context(TemporaryDirectory(prefix="hf-quant-budget-")))
        self.journals: list[Path] = []
        self._reference: Reference | None = None

    def reference(self, model: Any, held_out: CalibrationData) -> None:
        """Run the float model on the held-out samples."""
        texts = [batch for batch in held_out.batches if "pixel_values" not in batch]
        rows = [row for batch in texts for row in batch.get("input_ids", ())]
        longest = max((len(row) for row in rows), default=0)
        ids = torch.stack([row for row in rows if len(row) == longest]) if rows else torch.empty(0, 0)
        if longest < 2:
            raise BudgetError(
                "a budget of accuracy needs text to measure on.", "join a text, or give a budget of bits or bytes."
            )
        self._reference = run_reference(LogitStream(model, "the float model"), ids)

    def forget(self) -> None:
        """Free the float model."""
        self._reference = None
        gc.collect()

    def __call__(self, overrides: Mapping[str, Mapping[str, Any] | str]) -> Measurement:
        assert self._reference is not None
        config = HfQuantConfig(**{**self.config.to_dict(), "overrides": {**overrides, **self.config.overrides}})
        self.journals.append(self.root / f"try-{len(self.journals)}")
        session = Session(data=self.train if config.calibration else None, journal=self.journals[-1])
        found: Any = api.quantize(self.directory, config, session=session, **self.options)
        with torch.no_grad():
            divergence = compare(self._reference, LogitStream(found.dequantize().float().eval(), "the quantized model"))
        increase = float(np.mean(divergence.nll_model) - np.mean(divergence.nll_reference))
        return Measurement(float(np.mean(divergence.kl)), increase)


def _float_model(directory: Path, trust_remote_code: bool) -> Any:
    settings_ = read_settings(directory, trust_remote_code=trust_remote_code)
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    with quiet_loading():
        model = model_class(settings_).from_pretrained(directory, dtype=torch.float32, **extra).eval()
    split_experts(model)  # they are weighed one by one
    return model


def _sensitivity(
    model: Any,
    data: CalibrationData,
    menu: Menu,
    file: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None,
) -> Sensitivity:
    digest = model_digest(model)
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        found = Sensitivity.load(path)
        found.check(model=digest, data=data.sha256, menu=menu, estimator=settings())
        return found
    found = estimate_sensitivity(model, data, menu, digest=digest, progress=progress)
    if path is not None:
        found.save(path)
    return found


def _record(budget: Budget, fitted: FittedBudget, sensitivity: Sensitivity) -> dict[str, Any]:
    """For the provenance: what was asked for, what it came to, and what that rests on."""
    measured = fitted.measured
    return {
        **budget.record(),
        "bits_per_weight": round(fitted.allocation.bits_per_weight, 4),
        "predicted_kl": fitted.allocation.predicted_kl,
        "factor": fitted.factor,
        "held_out_kl": None if measured is None else measured.kl,
        "held_out_loss_increase": None if measured is None else measured.loss_increase,
        "layers": fitted.allocation.counts(),
        "estimator": sensitivity.estimator,
        "data_sha256": sensitivity.data,
    }


def _plot(output: Path, budget: Budget, fitted: FittedBudget) -> None:
    """The Pareto curve beside the card's other plots."""
    tries = [
        (f"try {index + 1}", attempt.allocation.bits_per_weight, attempt.measured.kl)
        for index, attempt in enumerate(fitted.attempts)
    ]
    limits = {"target_bits": ("bits", budget.limit), "max_kl": ("kl", budget.limit)}
    plot = draw_budget(fitted.allocation, tries, limits.get(budget.kind))
    (output / "plots").mkdir(exist_ok=True)
    for suffix, content in plot.files.items():
        atomic_write(output / "plots" / f"{plot.name}{suffix}", content)
