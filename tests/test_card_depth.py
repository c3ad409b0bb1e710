"""The card's section on depth and its plots: figures are the recorded ones, nothing is drawn that was not measured."""

from __future__ import annotations

import pytest

from hf_quant.card_depth import section
from hf_quant.evaluation.depth_results import (
    DepthResult,
    GenerationDepth,
    LayerDepth,
    LayerError,
    Percentile,
    PromptAgreement,
    Slice,
    TextDepth,
)
from hf_quant.evaluation.results import (
    Environment,
    EvaluationResult,
    Interval,
    Protocol,
    SizeResult,
    TextResult,
)
from hf_quant.plots_depth import draw_depth


def interval(value: float) -> Interval:
    return Interval(value=value, low=0.9 * value, high=1.1 * value)


def part(name: str, kl: float) -> Slice:
    return Slice(
        name=name, share=0.5, kl=interval(kl), top1_agreement=interval(0.8125), noise_floor_kl=interval(kl / 1000)
    )


def text_result(depth: TextDepth | None, name: str = "docs") -> TextResult:
    one = interval(1.0)
    return TextResult(
        name=name,
        source="built in",
        sha256="a" * 64,
        tokens=100,
        perplexity_float=one,
        perplexity_quantized=one,
        perplexity_increase_percent=one,
        kl=one,
        kl_p99=1.0,
        top1_agreement=interval(0.9),
        noise_floor=None,
        depth=depth,
    )


def results(*texts: TextResult, depth: DepthResult | None = None) -> EvaluationResult:
    return EvaluationResult(
        created="2026-11-24T00:00:00+00:00",
        candidate="out",
        candidate_digest=None,
        reference="float",
        reference_revision=None,
        reference_dtype="float32",
        protocol=Protocol(windows=4, length=64, dtype="float32", device="cpu", seed=0, bootstrap_samples=100),
        texts=texts,
        size=SizeResult(
            float_disk_bytes=4,
            quantized_disk_bytes=1,
            float_memory_bytes=4,
            quantized_memory_bytes=1,
            bits_per_weight=4.25,
        ),
        speed=(),
        environment=Environment(machine="m", cpu="c", cores=1, accelerator=None, python="3", versions={}),
        command=None,
        depth=depth,
    )


@pytest.fixture
def whole() -> EvaluationResult:
    text = TextDepth(
        percentiles=(Percentile(name="p90", kl=interval(0.4321), noise_floor_kl=interval(0.00012)),),
        by_confidence=(part("0–0.1", 0.222), part("0.9–1", 0.0111)),
        by_position=(part("1", 0.333), part("2–3", 0.0444)),
    )
    blocks = tuple(
        LayerError(
            name=f"model.layers.{i}", relative=interval(0.01 * (i + 1)), cosine=0.99912, noise_floor=interval(1e-3)
        )
        for i in range(3)
    )
    linears = tuple(
        LayerError(name=f"model.layers.{i}.mlp.{kind}", relative=interval(0.02 + 0.01 * i), cosine=0.98765)
        for i in range(3)
        for kind in ("up_proj", "down_proj", "gate_proj")
    )
    prompts = tuple(PromptAgreement(name=n, tokens=64, until_divergence=12, noise_floor=64) for n in ("a", "b"))
    return results(
        text_result(text),
        depth=DepthResult(
            noise_floor_dtype="bfloat16",
            layers=LayerDepth(
                text="docs",
                windows=4,
                tokens=64,
                blocks=blocks,
                linears=linears,
                linears_compared=12,
                notes=("a | note",),
            ),
            generation=GenerationDepth(
                prompts=prompts,
                chat_template=True,
                most=64,
                until_divergence=interval(12.0),
                identical=interval(0.25),
                noise_floor_until_divergence=interval(60.0),
                noise_floor_identical=interval(0.75),
            ),
        ),
    )


def test_the_section_states_the_recorded_figures(whole):
    text = section(whole, {"layers": ("plots/layers.png", "Errors")})
    assert text.startswith("## Where it was lost\n") and text.endswith("\n\n")
    assert "p90 0.432 [0.389, 0.475] (noise floor 0.00012)" in text
    assert "| float top-1 0.9–1 | 50.0 % | 0.0111 [0.0100, 0.0122] | 0.000011 |" in text
    assert "| token 2–3 | 50.0 % | 0.0444 [" in text
    assert "9 of 12 linear layers differ" in text and "The 8 largest errors are shown" in text
    assert "| last block | `model.layers.2` | 0.0300 [" in text
    assert text.index("`model.layers.2.mlp.up_proj`") < text.index("`model.layers.1.mlp.up_proj`")
    assert text.count("`model.layers.0.mlp.") == 2, "the least of nine errors is not among the eight largest"
    assert "2 built-in prompts (through the chat template, up to 64 tokens)" in text and "noise floor is 60" in text
    assert "![Errors](plots/layers.png)" in text and "plots/depth.png" not in text


def test_nothing_is_said_of_what_was_not_measured(whole):
    bare = results(text_result(None))
    assert section(bare, {}) == "" and draw_depth(bare) == []
    without = results(*whole.texts)
    assert "Inside the model" not in section(without, {}) and [plot.name for plot in draw_depth(without)] == ["depth"]


def test_plots_show_the_recorded_figures(whole):
    plots = draw_depth(whole)
    assert [plot.name for plot in plots] == ["depth", "layers"]
    left, right = plots[0].figure.axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0–0.1", "0.9–1"]
    assert left.containers[0].lines[0].get_ydata().tolist() == [0.222, 0.0111]
    assert right.containers[0].lines[0].get_ydata().tolist() == [0.333, 0.0444]
    bars = [bar.get_height() for bar in plots[1].figure.axes[0].patches]
    assert bars == pytest.approx([0.01, 0.02, 0.03])
    assert "up to 3 %" in plots[1].caption
    assert all(file.startswith(b"\x89PNG") for file in (plot.files[".png"] for plot in plots))
