"""What depth leaves in ``evaluation.json``: where in the text, in the layers and in an answer the accuracy was lost."""

from __future__ import annotations

from hf_quant.evaluation.interval import Interval, Strict


class Slice(Strict):
    """A part of the scored positions of one text.

    Attributes:
        name: ``0.25–0.5`` of the float model's top-1 probability (lower edge included), or ``64–127``: how many tokens
            of the window the model had read when it predicted.
        share: of all scored positions (0 to 1).
        kl: mean of KL(float || quantized) over these positions, nats.
        top1_agreement: share of these positions (0 to 1).
        noise_floor_kl: of the float model in the noise floor's dtype, on the same positions.
    """

    name: str
    share: float
    kl: Interval
    top1_agreement: Interval
    noise_floor_kl: Interval | None = None


class Percentile(Strict):
    """A percentile (``p50``, ``p90``, ``p99``) of KL over the scored positions, nats; resampled by windows."""

    name: str
    kl: Interval
    noise_floor_kl: Interval | None = None


class TextDepth(Strict):
    """Where in one text the divergence lies; slices without positions are left out."""

    percentiles: tuple[Percentile, ...]
    by_confidence: tuple[Slice, ...]
    by_position: tuple[Slice, ...]


class LayerError(Strict):
    """How far one output is from the float model's.

    Attributes:
        name: of the module in the float model.
        relative: mean over tokens of ||quantized - float|| / ||float||.
        cosine: mean over tokens of the cosine between both.
        noise_floor: ``relative`` of the float model in the noise floor's dtype.
    """

    name: str
    relative: Interval
    cosine: float
    noise_floor: Interval | None = None


class LayerDepth(Strict):
    """Errors inside the model.

    Attributes:
        text, windows, tokens: the first windows of this text, cut to this many tokens each.
        blocks: hidden states behind every block, each model on its own stream: errors accumulate.
        linears: every linear layer in the blocks that differs from the float one, given the float model's inputs: the
            error that this layer adds by itself.
        linears_compared: how many were looked at, equal ones included.
        notes: what was not measured layer by layer, such as fused experts.
    """

    text: str
    windows: int
    tokens: int
    blocks: tuple[LayerError, ...]
    linears: tuple[LayerError, ...]
    linears_compared: int
    notes: tuple[str, ...] = ()


class PromptAgreement(Strict):
    """One prompt: of the float model's ``tokens`` greedy tokens, how many were chosen before the first other one.

    Attributes:
        until_divergence: ``tokens`` where no other token was chosen.
        noise_floor: the same of the float model in the noise floor's dtype.
    """

    name: str
    tokens: int
    until_divergence: int
    noise_floor: int | None = None


class GenerationDepth(Strict):
    """Greedy answers, against the float model's; intervals are a bootstrap over prompts.

    Attributes:
        prompts: the built-in ones.
        chat_template: prompts went through the tokenizer's chat template; else as plain text.
        most: new tokens per prompt; fewer where the float model ended its answer.
        until_divergence: mean number of tokens until the first other one.
        identical: share of the prompts with no other token (0 to 1).
    """

    prompts: tuple[PromptAgreement, ...]
    chat_template: bool
    most: int
    until_divergence: Interval
    identical: Interval
    noise_floor_until_divergence: Interval | None = None
    noise_floor_identical: Interval | None = None


class DepthResult(Strict):
    """Everything that is measured once per model, not per text; None where the model allows no such measure."""

    noise_floor_dtype: str | None = None
    layers: LayerDepth | None
    generation: GenerationDepth | None
