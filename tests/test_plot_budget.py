"""The plot of a budget: drawn from the allocation alone, the same bytes every time, whatever names it is given."""

from __future__ import annotations

import io

import pytest
from matplotlib.image import imread

from hf_quant.grids import Scheme
from hf_quant.plots import draw_budget
from hf_quant.quantize.allocate import Allocation, ParetoPoint

CURVE = (
    *(ParetoPoint(4 + i / 4, 10**6 + i, 0.4 * 4 ** (-i / 4)) for i in range(48)),
    ParetoPoint(16, 10**7, 0.0),
)
CHOSEN = Allocation({"a": Scheme(), "b": None}, CURVE[2].predicted_kl, 4.5, 4.4, 10**6, CURVE)


@pytest.mark.parametrize("limit", [None, ("bits", 4.5), ("kl", 0.21)])
def test_it_is_drawn_and_repeatable(limit) -> None:
    measured = (("uniform int4 g32", 4.5, 0.3), ("量子化 $x$", 4.25, 0.4))
    plot = draw_budget(CHOSEN, measured, limit)
    again = draw_budget(CHOSEN, measured, limit)
    assert (plot.caption, plot.files) == (again.caption, again.files)
    assert plot.name == "budget" and set(plot.files) == {".png", ".svg"}
    assert "0.200 nats per token at 4.50 bits" in plot.caption
    image = imread(io.BytesIO(plot.files[".png"]), format="png")
    assert image.shape[1] > 2 * 400 and image[..., :3].std() > 0.01


def test_measurements_and_limits_show() -> None:
    plots = [draw_budget(CHOSEN), draw_budget(CHOSEN, [("other", 5, 0.2)]), draw_budget(CHOSEN, [("other", 14, 0.2)])]
    assert len({plot.files[".svg"] for plot in plots}) == 3
