"""The results file ``evaluation.json``: what was measured, how, and with which confidence. Cards are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from hf_quant.checkpoint.contents import RESULTS_FILE as RESULTS_FILE
from hf_quant.errors import EvaluationError
from hf_quant.evaluation.depth_results import DepthResult, TextDepth
from hf_quant.evaluation.interval import Interval as Interval
from hf_quant.evaluation.interval import Strict as _Strict
from hf_quant.evaluation.task_results import TaskRun


class Protocol(_Strict):
    """How the accuracy figures were taken (nats; windows do not overlap; the first token of a window is not scored).

    Attributes:
        kept_tokens, drawn_tokens: per position, where the divergence is an estimate from what was kept of the float
            model (:mod:`hf_quant.evaluation.compressed`); None where it was computed from all logits.
    """

    windows: int
    length: int
    dtype: str
    device: str
    seed: int
    bootstrap_samples: int
    kept_tokens: int | None = None
    drawn_tokens: int | None = None


class Figures(_Strict):
    """What is measured of any model against the float one."""

    kl: Interval
    top1_agreement: Interval
    perplexity: Interval


class NoiseFloor(Figures):
    """The float model in ``dtype`` against itself in the protocol's dtype: differences below it mean nothing."""

    dtype: str


class RoundedActivations(Figures):
    """The quantized model once more, with its activations rounded to int8 on the fly where its kernels can do that."""


class TextResult(_Strict):
    """Float against quantized on one text.

    Attributes:
        name: ``docs``, ``prose``, a file's or a dataset's name.
        source: where the text came from.
        sha256: of the text (UTF-8) that the windows were cut from.
        tokens: scored tokens, all windows together.
        bos: every window starts with the tokenizer's beginning-of-sequence token.
        kl: mean of KL(float || quantized) per token, in nats; ``kl_p99`` is the 99th percentile over tokens.
        top1_agreement: share (0 to 1) of positions where both models' most likely token is the same.
        kl_error: half of the 95 % interval of what estimating ``kl`` from a reference cache adds; None where all logits
            were compared. (It is part of the interval of ``kl``, too, which is one over windows.)
        int8_activations: what ``activations="int8"`` makes of it; None where it was not measured or changes nothing.
        perplexity_increase_percent: paired: both models saw the same windows in every resample.
        depth: where in the text it was lost; None where that was not measured.
    """

    name: str
    source: str
    sha256: str
    tokens: int
    bos: bool = False
    perplexity_float: Interval
    perplexity_quantized: Interval
    perplexity_increase_percent: Interval
    kl: Interval
    kl_p99: float
    kl_error: float | None = None
    top1_agreement: Interval
    noise_floor: NoiseFloor | None
    int8_activations: RoundedActivations | None = None
    depth: TextDepth | None = None


class Figure(_Strict):
    """One figure of a quantized model against the float one, on one set of samples.

    Attributes:
        name: ``kl``, ``top1_agreement``, ``embedding_distance``, ...
        title: what it is, for people.
        unit: ``share`` (0 to 1), ``nats``, ``percent``, or ``number``.
        value: of the quantized model; the interval is a bootstrap over samples.
        noise_floor: of the float model in ``SampleResult.noise_floor_dtype`` against itself.
        int8_activations: of the quantized model with its activations rounded to int8; None where that changes nothing.
    """

    name: str
    title: str
    unit: Literal["share", "nats", "percent", "number"]
    value: Interval
    noise_floor: Interval | None = None
    int8_activations: Interval | None = None


class SampleResult(_Strict):
    """Float against quantized on one set of samples, for models and inputs other than text that is continued.

    Attributes:
        name: of the text or folder; ``synthetic images`` and ``synthetic sounds`` are made by hf-quant itself.
        source: where the samples came from.
        sha256: of the samples as the model reads them.
        samples: how many; ``unit`` says of what: ``passages``, ``images``, ``clips``.
        tokens: read from the text, or compared in the answers; 0 where there are none.
        synthetic: the samples are no recordings of anything: the figures compare models, they say little about use.
        notes: what has to be known about how it was measured, such as the pooling.
    """

    name: str
    source: str
    sha256: str
    samples: int
    unit: str
    tokens: int = 0
    synthetic: bool = False
    noise_floor_dtype: str | None = None
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def figure(self, name: str) -> Figure | None:
        """The figure of that name; None where it was not measured."""
        return next((figure for figure in self.figures if figure.name == name), None)

    def rows(self) -> list[tuple[str, list[Interval | None]]]:
        """(model, its figures in their order): the quantized model, and what was measured beside it."""
        found: list[tuple[str, list[Interval | None]]] = [
            ("quantized", [figure.value for figure in self.figures]),
            ("quantized, int8 activations", [figure.int8_activations for figure in self.figures]),
            (f"noise floor: float in {self.noise_floor_dtype}", [figure.noise_floor for figure in self.figures]),
        ]
        return [row for row in found if any(value is not None for value in row[1])]


class SizeResult(_Strict):
    """Bytes: files of weights on disk; tensors in memory when loaded in ``memory_dtype``; bits per quantized weight.

    ``memory_dtype`` is ``float / quantized`` where they differ (bitsandbytes keeps the dtype it was saved in). Bits per
    weight count codes, scales and zero points as stored, over the quantized weights only.
    """

    float_disk_bytes: int
    quantized_disk_bytes: int
    float_memory_bytes: int
    quantized_memory_bytes: int
    memory_dtype: str | None = None
    bits_per_weight: float


class SpeedResult(_Strict):
    """Medians of repeated runs, both models in turns in one process, on the machine in ``Environment``.

    Results from before a figure was measured have None there.

    Attributes:
        prefill_tokens_per_second, decode_tokens_per_second: at batch 1.
        first_token_seconds: from a prompt of ``prefill_tokens`` tokens to the first new token of ``generate``.
        batch: sequences of the two figures below, which count the tokens of all of them; prompts of
            ``batch_prefill_tokens`` tokens each.
        peak_bytes: how far the process's (or the accelerator's) memory grew while the model was loaded and ran once,
            pages of its files that were touched included.
        token_bytes: weights that one decoded token reads; None for mixtures of experts, which read some of them.
        read_bandwidth: GB/s that this machine reads memory with, measured in the same run; None on accelerators.
    """

    model: Literal["float", "quantized"]
    dtype: str
    kernels: dict[str, int]
    threads: int
    load_seconds: float
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float
    repeats: int
    first_token_seconds: float | None = None
    batch: int | None = None
    batch_prefill_tokens: int | None = None
    batch_prefill_tokens_per_second: float | None = None
    batch_decode_tokens_per_second: float | None = None
    peak_bytes: int | None = None
    token_bytes: int | None = None
    read_bandwidth: float | None = None

    @property
    def bandwidth_share(self) -> float | None:
        """Bytes of weights per second while one sequence is decoded, over the read bandwidth."""
        if self.token_bytes is None or self.read_bandwidth is None:
            return None
        return self.decode_tokens_per_second * self.token_bytes / (1e9 * self.read_bandwidth)


class ThroughputResult(_Strict):
    """Median of repeated passes at batch 1 over the same samples, both models in turns in one process.

    ``unit`` says what is counted (as in :class:`SampleResult`); one forward pass each, nothing is generated.
    """

    model: Literal["float", "quantized"]
    dtype: str
    kernels: dict[str, int]
    threads: int
    load_seconds: float
    unit: str
    samples: int
    samples_per_second: float
    repeats: int


class Environment(_Strict):
    """Where and with what the figures were taken."""

    machine: str
    cpu: str
    cores: int
    accelerator: str | None
    python: str
    versions: dict[str, str]


class EvaluationResult(_Strict):
    """Everything in ``evaluation.json``.

    Attributes:
        created: UTC, ISO 8601.
        candidate, reference: a Hub id, or the name of a local directory (not its path).
        candidate_digest: of the candidate's manifest when it was made by hf-quant (its files were checked against it).
        reference_dtype: what the float model ran in when accuracy was measured.
        reference_stored_dtype: what its files hold (``float_disk_bytes`` depends on it).
        task: the Hub's name of what the model does, such as ``text-generation``; None where it was not recorded.
        texts: of models that continue text.
        samples: of everything else: encoders, encoder-decoders, images, sound.
        throughput: in place of ``speed`` where no text is continued.
        accuracy_kernels: layers per kernel of the candidate when accuracy was measured, with what it did with the
            activations where it has a choice; at another dtype than that of ``speed`` other kernels may run.
        command: how to get these results again.
        tasks: benchmark tasks, each run with its own settings and command.
        depth: errors layer by layer and in generated answers, of models that continue text.
    """

    schema_version: Literal[1] = 1
    created: str
    candidate: str
    candidate_digest: str | None
    reference: str
    reference_revision: str | None
    reference_dtype: str
    reference_stored_dtype: str | None = None
    task: str | None = None
    protocol: Protocol
    texts: tuple[TextResult, ...]
    samples: tuple[SampleResult, ...] = ()
    size: SizeResult
    accuracy_kernels: dict[str, int] | None = None
    speed: tuple[SpeedResult, ...]
    throughput: tuple[ThroughputResult, ...] = ()
    environment: Environment
    command: str | None
    tasks: tuple[TaskRun, ...] = ()
    depth: DepthResult | None = None

    @classmethod
    def read(cls, path: Path | str) -> EvaluationResult:
        """Parse a results file; raises EvaluationError when it is missing, not JSON or not of this schema."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EvaluationError(
                f"{path} does not exist.", "run `hf-quant evaluate` on the checkpoint first."
            ) from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"{path} is not a results file: {error}.", "run `hf-quant evaluate` again."
            ) from error
