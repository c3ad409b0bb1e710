"""A calibrated run: data, the walk through a float model, and tuning; its result waits in a journal for the loader."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from hf_quant.calibration import CalibrationData, load_calibration
from hf_quant.checkpoint import check_directory, file_sha256, weight_files
from hf_quant.checkpoint.contents import SIDE_FILES
from hf_quant.checkpoint.journal import Journal, open_journal
from hf_quant.config import HfQuantConfig
from hf_quant.integrations.shell import ModelWeights, open_shell
from hf_quant.plan import Plan
from hf_quant.quantize.contracts import Progress, Weights
from hf_quant.quantize.distill import TuningStep, distill
from hf_quant.quantize.fold import SAMPLES, FoldedWeights, Folds, find_folds
from hf_quant.quantize.reconstruct import Reconstruction, reconstruct
from hf_quant.quantize.sensitivity import take_samples
from hf_quant.quantize.sequential import calibrate
from hf_quant.tensor import QuantizedTensor
from hf_quant.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_quant")
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
# units of the journal beside those of the layers
FOLDED = "folded"  # norms and biases that took back factors
RECONSTRUCTED, LEFT = "reconstructed ", "left "  # + a block: it was tuned alone, or that did not help
TUNED = "tuned"  # what tuning changed
REFUSED = "tuning refused"  # tuning ran and did not help


@dataclass
class Session:
    """What the caller of a calibrated run adds to its config.

    Attributes:
        data: used instead of the config's ``calibration`` section.
        journal: where the run records what is done, so that it can be resumed; default: a temporary directory.
        on_data: called with the data before the walk.
        on_layer: called after every layer of the walk.
        on_block: called after every block that was tuned alone.
        on_tuning: called after every tuning step.
        on_sampling: told what is being done, how much is done and of how much, while calibration data is made.
        note: JSON values that the checkpoint's provenance holds besides its own.
    """

    data: CalibrationData | None = None
    journal: Path | None = None
    on_data: Callable[[CalibrationData], None] | None = None
    on_layer: Callable[[Progress], None] | None = None
    on_block: Callable[[Reconstruction], None] | None = None
    on_tuning: Callable[[TuningStep], None] | None = None
    on_sampling: Callable[[str, int, int], None] | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """The result of a run: tensors and float parameters in a journal, and what they were made from."""

    journal: Journal
    data: CalibrationData
    _stack: ExitStack = field(repr=False)

    @property
    def tuned(self) -> bool:
        """Tuning ran and its result was kept."""
        return self.journal.finished(TUNED) or self.journal.finished_any(RECONSTRUCTED)

    def close(self) -> None:
        """Remove the journal where it was temporary."""
        self._stack.close()


_ready: ContextVar[Calibrated | None] = ContextVar("hf_quant_ready", default=None)
_session: ContextVar[Session | None] = ContextVar("hf_quant_session", default=None)


@contextmanager
def session(current: Session) -> Iterator[Session]:
    """Calibrated runs inside follow ``current``."""
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


@contextmanager
def loading(calibrated: Calibrated) -> Iterator[None]:
    """Models that are loaded with a calibrated config inside take their layers from this run; it is closed after."""
    token = _ready.set(calibrated)
    try:
        yield
    finally:
        _ready.reset(token)
        calibrated.close()


def ready() -> Calibrated | None:
    """The run that :func:`loading` gave."""
    return _ready.get()


def run_on_files(
    source: str,
    kind: type[PreTrainedModel],
    plan: Plan,
    config: HfQuantConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Calibrated:
    """Quantize the layers of a float checkpoint (directory or Hub id) into a journal.

    Args:
        source: of the checkpoint.
        kind: the model's class.
        plan: made for a model of that class.
        config: what to do.
        revision: of a Hub id.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: damaged files, or a journal of a different run.
        CalibrationError: data that cannot be had or does not fit the model.
    """
    directory = Path(source)
    if not directory.is_dir():
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=[*SIDE_FILES, *_MODEL_FILES]))
    check_directory(directory)
    plan = plan.calibrated
    current = _session.get() or Session()
    data = current.data or _load(config, current, directory=directory)
    if current.on_data:
        current.on_data(data)
    fingerprint = _fingerprint(config, plan, data)
    files = ["config.json", *weight_files(directory)]
    fingerprint["model"] = {"class": kind.__name__, **{name: file_sha256(directory / name) for name in files}}
    with _journal(current, fingerprint) as (journal, stack):
        model, weights = open_shell(directory, kind, plan, trust_remote_code)
        _run(model, plan, config, data, weights, journal, current)
        return Calibrated(journal, data, stack.pop_all())


def run_on_model(model: PreTrainedModel, plan: Plan, config: HfQuantConfig, tokenizer: Any = None) -> Calibrated:
    """Quantize the layers of a float model in memory into a journal; the model is left as it was.

    Raises:
        CalibrationError: as above; or the default data without a tokenizer to make it with.
    """
    current, plan = _session.get() or Session(), plan.calibrated
    data = current.data or _load(config, current, model=model, processor=tokenizer)
    if current.on_data:
        current.on_data(data)
    with _journal(replace(current, journal=None), _fingerprint(config, plan, data)) as (journal, stack):
        training = model.training
        model.eval()
        try:
            with _in_float32(model, plan):
                _run(model, plan, config, data, ModelWeights(model), journal, current)
        finally:
            model.train(training)
        return Calibrated(journal, data, stack.pop_all())


@contextmanager
def _in_float32(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Inside, a model computes in float32, as one from files does; the weights to be quantized stay as they are."""
    planned = {f"{layer.name}.weight" for layer in plan.quantized}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtypes = {name: (tensor, tensor.dtype) for name, tensor in tensors if name not in planned}
    narrow = {name: found for name, found in dtypes.items() if found[1] in (torch.bfloat16, torch.float16)}
    try:
        for tensor, _ in narrow.values():
            tensor.data = tensor.data.to(torch.float32)
        yield
    finally:
        for tensor, dtype in narrow.values():
            tensor.data = tensor.data.to(dtype)


def _run(
    model: Any,
    plan: Plan,
    config: HfQuantConfig,
    data: CalibrationData,
    weights: Weights,
    journal: Journal,
    current: Session,
) -> None:
    tuning = config.tuning or {"steps": 0, "block_steps": 0}
    if journal.finished(TUNED) or journal.finished(REFUSED):
        return
    folds = _folds(model, plan, config, data, weights)
    weights = FoldedWeights(weights, folds)
    with folds.in_place(model):
        if not all(layer.name in journal for layer in plan.quantized):
            calibrate(model, plan, data, weights, journal, progress=current.on_layer)
        if not journal.finished(FOLDED):
            journal.replace(FOLDED, {}, folds.floats)
        if tuning["block_steps"]:

            def keep(block: str, changed: Mapping[str, QuantizedTensor]) -> None:
                journal.add(f"{RECONSTRUCTED if changed else LEFT}{block}", changed, [])

            def finished(block: str) -> bool:
                return journal.finished(f"{RECONSTRUCTED}{block}") or journal.finished(f"{LEFT}{block}")

            steps = tuning["block_steps"]
            reconstruct(model, plan, data, weights, journal.tensor, keep, finished, steps, progress=current.on_block)
        if tuning["steps"]:
            tensors, floats = distill(model, plan, data, weights, journal.tensor, tuning, progress=current.on_tuning)
            journal.replace(TUNED if tensors or floats else REFUSED, tensors, {**folds.floats, **floats})


def _folds(model: Any, plan: Plan, config: HfQuantConfig, data: CalibrationData, weights: Weights) -> Folds:
    if not (config.calibration and config.calibration["fold"]):
        return Folds()
    samples = take_samples(data.batches, SAMPLES)
    folds = find_folds(model, plan.quantized, weights, samples, data.source, getattr(torch, plan.scale_dtype))
    logger.info("%d norms and layers take back the factors of %d layers", len(folds), len(folds.columns))
    return folds


def _load(config: HfQuantConfig, current: Session, **where: Any) -> CalibrationData:
    asked = {key: value for key, value in (config.calibration or {}).items() if key != "fold"}
    return load_calibration(asked.pop("source"), **{"directory": None, **where}, **asked, progress=current.on_sampling)


def _fingerprint(config: HfQuantConfig, plan: Plan, data: CalibrationData) -> dict[str, Any]:
    loading = config.get_loading_attributes()
    recipe = {key: value for key, value in config.to_dict().items() if key not in loading}
    versions = {"hf_quant": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"config": recipe, "data": data.record(), "scale_dtype": plan.scale_dtype, "versions": versions}


@contextmanager
def _journal(current: Session, fingerprint: dict[str, Any]) -> Iterator[tuple[Journal, ExitStack]]:
    with ExitStack() as stack:
        where = current.journal or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-quant-")))
        yield open_journal(where, fingerprint), stack
