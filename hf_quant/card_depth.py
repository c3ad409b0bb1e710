"""The card's section on where accuracy was lost: a pure function of the recorded results."""

from __future__ import annotations

from collections.abc import Mapping

from hf_quant.card_text import code, markdown, significant, with_interval
from hf_quant.evaluation.depth_results import GenerationDepth, LayerDepth, LayerError, Slice
from hf_quant.evaluation.interval import Interval
from hf_quant.evaluation.results import EvaluationResult, TextResult

_MOST_LINEARS = 8


def section(results: EvaluationResult, plots: Mapping[str, tuple[str, str]]) -> str:
    """Markdown from ``## Where it was lost`` on, ending in a blank line; empty where depth was not measured.

    Args:
        results: as recorded.
        plots: name -> (relative path, caption) of the plots that were drawn.
    """
    lines: list[str] = []
    for text in results.texts:
        lines += _text(text)
    if lines and "depth" in plots:
        lines += [f"![{markdown(plots['depth'][1])}]({plots['depth'][0]})", ""]
    if results.depth is not None and results.depth.layers is not None:
        lines += _layers(results.depth.layers)
        if "layers" in plots:
            lines += [f"![{markdown(plots['layers'][1])}]({plots['layers'][0]})", ""]
    if results.depth is not None and results.depth.generation is not None:
        lines += _generation(results.depth.generation)
    return "\n".join(["## Where it was lost", "", *lines]) + "\n" if lines else ""


def _text(text: TextResult) -> list[str]:
    if text.depth is None:
        return []
    parts = [f"{part.name} {with_interval(part.kl)}{_floor(part.noise_floor_kl)}" for part in text.depth.percentiles]
    lines = [f"Text {code(text.name)}: percentiles of KL over its tokens, in nats: {'; '.join(parts)}.", ""]
    lines += ["<details><summary>By the float model's confidence and by position, in figures</summary>", ""]
    lines += [
        "| Positions | Share | KL(float ‖ quantized) | Noise floor | Top-1 agreement |",
        "|---|---:|---:|---:|---:|",
    ]
    for what, slices in (("float top-1", text.depth.by_confidence), ("token", text.depth.by_position)):
        lines += [_slice(what, part) for part in slices]
    return [*lines, "", "</details>", ""]


def _slice(what: str, part: Slice) -> str:
    agreement = with_interval(part.top1_agreement, factor=100)
    cells = [f"{what} {part.name}", f"{100 * part.share:.1f} %", with_interval(part.kl), _plain(part.noise_floor_kl)]
    return f"| {' | '.join(cells)} | {agreement} % |"


def _floor(interval: Interval | None) -> str:
    return "" if interval is None else f" (noise floor {_plain(interval)})"


def _plain(interval: Interval | None) -> str:
    return "–" if interval is None else significant(interval.value, 2)


def _layers(layers: LayerDepth) -> list[str]:
    what = f"the first {layers.windows} windows of {code(layers.text)}, {layers.tokens} tokens each"
    lines = [
        f"Inside the model, on {what}: the error ‖quantized − float‖ / ‖float‖, a mean over tokens. Behind a block "
        "both models are on their own way, so errors add up; a linear layer is given the float model's inputs, so its "
        "error is its own (constant factors per channel, which folding moves from one layer to another, do not count). "
        f"{len(layers.linears)} of {layers.linears_compared} linear layers differ from the float "
        "model's.",
        "",
    ]
    worst = sorted(layers.linears, key=lambda layer: -layer.relative.value)[:_MOST_LINEARS]
    rows = [("last block", layer) for layer in layers.blocks[-1:]] + [("linear", layer) for layer in worst]
    if rows:
        lines += ["| | Layer | Relative error | Noise floor | Cosine |", "|---|---|---:|---:|---:|"]
        lines += [_layer(what, layer) for what, layer in rows]
        lines += [""]
    if len(layers.linears) > len(worst):
        lines += [f"The {len(worst)} largest errors are shown; all are in `evaluation.json`.", ""]
    for sentence in layers.notes:
        lines += [f"Not measured layer by layer: {markdown(sentence)}.", ""]
    return lines


def _layer(what: str, layer: LayerError) -> str:
    cells = [what, code(layer.name, in_table=True), with_interval(layer.relative), _plain(layer.noise_floor)]
    return f"| {' | '.join(cells)} | {layer.cosine:.5f} |"


def _generation(found: GenerationDepth) -> list[str]:
    how = "through the chat template" if found.chat_template else "as plain text"
    prompts = len(found.prompts)
    said = (
        f"Greedy answers to {prompts} built-in prompts ({how}, up to {found.most} tokens): this checkpoint chooses the "
        f"float model's tokens for {with_interval(found.until_divergence)} tokens before the first other one, to the "
        f"end in {found.identical.value * prompts:.0f} of {prompts} answers."
    )
    if found.noise_floor_until_divergence is not None and found.noise_floor_identical is not None:
        floor = with_interval(found.noise_floor_until_divergence)
        said += f" The noise floor is {floor} tokens, and {found.noise_floor_identical.value * prompts:.0f} answers."
    said += " Intervals are a bootstrap over prompts."
    return [said, ""]
