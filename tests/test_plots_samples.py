"""The plot of models that continue no text: panels, numbers and what the caption says."""

from __future__ import annotations

import pytest

from hf_quant.evaluation.results import Figure, Interval, SampleResult
from hf_quant.plots import draw
from hf_quant.plots_samples import draw_samples

pytest.importorskip("matplotlib", reason="the optional package matplotlib is not installed")


def _figure(name, title, unit, value, floor=None):
    around = [None if v is None else Interval(value=v, low=0.8 * v, high=1.1 * v) for v in (value, floor)]
    return Figure(name=name, title=title, unit=unit, value=around[0], noise_floor=around[1])


def _samples(name, *figures):
    return SampleResult(
        name=name,
        source="here",
        sha256="0",
        samples=9,
        unit="images",
        noise_floor_dtype="bfloat16",
        figures=figures,
    )


def _axes(plot):
    return {axes.get_title(loc="left"): axes for axes in plot.figure.axes}


def _words(axes):
    return [text.get_text() for text in axes.texts]


def test_a_panel_for_every_figure_and_a_row_for_every_set():
    kl = ("kl", "KL(float ‖ quantized)", "nats")
    same = ("top1_agreement", "top-1 agreement", "share")
    plot = draw_samples(
        [
            _samples("photos", _figure(*kl, 0.25, 0.001), _figure(*same, 0.75, 0.9)),
            _samples("a $strange$ name", _figure(*kl, 0.5)),
        ]
    )
    axes = _axes(plot)
    assert list(axes) == ["KL(float ‖ quantized), nats", "Top-1 agreement"]
    kl_axes, same_axes = axes.values()
    assert kl_axes.get_xscale() == "log" and same_axes.get_xscale() == "linear"
    assert _words(kl_axes) == ["0.250", "0.00100", "0.500"]
    assert _words(same_axes) == ["75.0 %", "90.0 %"]  # as many digits as the intervals allow
    assert all(tick <= 100 for tick in same_axes.get_xticks())  # an agreement of more means nothing
    assert [label.get_text() for label in kl_axes.get_yticklabels()] == ["photos", "a $strange$ name"]
    assert plot.caption == (
        "KL(float ‖ quantized): 0.250 nats on photos and 0.500 nats on a $strange$ name; bars are 95 % intervals"
    )
    legend = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert legend == ["quantized", "noise floor: float in bfloat16"]
    # every point and its bar are inside the axes
    low, high = kl_axes.get_xlim()
    assert low < 0.0008 and high > 0.55
    assert plot.files[".png"].startswith(b"\x89PNG") and b"<svg" in plot.files[".svg"]
    assert (
        plot.files
        == draw_samples(
            [
                _samples("photos", _figure(*kl, 0.25, 0.001), _figure(*same, 0.75, 0.9)),
                _samples("a $strange$ name", _figure(*kl, 0.5)),
            ]
        ).files
    )


def test_losses_that_may_be_nothing_start_at_zero():
    plot = draw_samples(
        [_samples("text", _figure("kl", "KL", "nats", 0.0), _figure("word_error", "words", "share", 0))]
    )
    low, high = _axes(plot)["KL, nats"].get_xlim()
    assert low <= 0 < high


def test_many_sets_are_cut_and_counted():
    figure = _figure("kl", "KL", "nats", 0.1)
    plot = draw_samples([_samples(f"set {i}", figure) for i in range(10)])
    assert "; 2 more sets are in the table" in plot.caption
    assert len(_words(plot.figure.axes[0])) == 8


def test_nothing_measured_is_not_drawn():
    assert draw_samples([]) is None and draw(None, []) == []
