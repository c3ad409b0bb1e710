"""Recorded figures are measured again by the recorded protocol; those that do not reproduce are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant.card import write_card
from hf_quant.checkpoint import RESULTS_FILE
from hf_quant.errors import CheckpointError, ConfigError
from hf_quant.evaluation import EvaluationResult
from hf_quant.verification import Report
from hf_quant.verification.metrics import compare

Edit = Callable[[Path, Callable[[Any], None]], None]


def _metrics(directory: Path, reference: Path, *texts: Path) -> Report:
    return hf_quant.verify(directory, metrics=True, reference=reference, texts=list(map(str, texts)), progress=False)


def test_honest_figures_reproduce(checkpoint: Path, float_model: Path, text: Path) -> None:
    report = _metrics(checkpoint, float_model, text)
    assert report.ok, report.problems
    assert "figures measured again" in report.done["metrics"]
    assert any("not judged" in finding.problem for finding in report.notes), "speed is reported"


def test_another_float_model_does_not_give_these_figures(
    checkpoint: Path, tiny_checkpoint: Callable[..., Path], text: Path
) -> None:
    other = tiny_checkpoint("llama", seed=7, dtype=torch.bfloat16)
    subjects = {finding.subject for finding in _metrics(checkpoint, other, text).problems}
    assert "texts.fox.kl" in subjects


def test_a_text_that_is_not_there_or_another_one(
    checkpoint: Path, float_model: Path, text: Path, tmp_path: Path
) -> None:
    problems = _metrics(checkpoint, float_model).problems
    assert [finding.subject for finding in problems] == ["text 'fox'"] and "--text" in problems[0].fix
    other = tmp_path / text.name
    other.write_text(text.read_text() + "more")
    assert "is another one here" in _metrics(checkpoint, float_model, other).problems[0].problem
    stranger = tmp_path / "stranger"
    stranger.write_text(text.read_text())
    assert "no recorded text is called 'stranger'" in _metrics(checkpoint, float_model, stranger).problems[0].problem


def test_the_reference_has_to_be_known(checkpoint: Path) -> None:
    report = hf_quant.verify(checkpoint, metrics=True, progress=False)  # org/base is on no Hub that can be reached
    assert not report.ok and report.problems[-1].check == "metrics"
    write_card(checkpoint)  # without the Hub's name for it, the name of a local copy is all that is known
    with pytest.raises(CheckpointError, match=r"only the name of its base model.*--reference"):
        hf_quant.verify(checkpoint, metrics=True, progress=False)
    with pytest.raises(ConfigError, match="add --metrics"):
        hf_quant.verify(checkpoint, tasks=True, progress=False)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("texts", 0, "kl"), {"value": 0.5, "low": 0.4, "high": 0.6}, "texts.fox.kl"),
        (("texts", 0, "kl_p99"), 123.0, "texts.fox.kl_p99"),
        (("texts", 0, "tokens"), 5, "texts.fox.tokens"),
        (("size", "quantized_disk_bytes"), 5, "size.quantized_disk_bytes"),
        (("size", "bits_per_weight"), 3.0, "size.bits_per_weight"),
    ],
)
def test_a_figure_outside_of_its_interval_is_named(
    published: Path, path: tuple[Any, ...], value: object, named: str
) -> None:
    honest = EvaluationResult.read(published / RESULTS_FILE)
    assert not [finding for finding in compare(honest, honest)[1] if finding.fatal]
    plain = honest.model_dump()
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    lied = EvaluationResult.model_validate(plain)
    assert [finding.subject for finding in compare(lied, honest)[1] if finding.fatal] == [named]


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda v, low, high: (v / 2, low, high), "does not hold the recorded"),  # a value outside of its own interval
        (
            lambda v, low, high: (v / 2, v / 4, high),
            "does not hold the recorded",
        ),  # the interval is stretched to hold it
        (lambda v, low, high: (v, v - (v - low) / 50, v + (high - v) / 50), "interval is another one"),  # too sure
        (lambda v, low, high: (v, low - 3 * (high - low), high), "interval is another one"),  # too modest
    ],
)
def test_a_forged_figure_is_named_even_where_its_interval_holds_the_truth(
    published: Path, forge: Callable[[float, float, float], tuple[float, float, float]], said: str
) -> None:
    honest = EvaluationResult.read(published / RESULTS_FILE)
    plain = honest.model_dump()
    kl = plain["texts"][0]["kl"]
    kl["value"], kl["low"], kl["high"] = forge(kl["value"], kl["low"], kl["high"])
    (found,) = [f for f in compare(EvaluationResult.model_validate(plain), honest)[1] if f.fatal]
    assert found.subject == "texts.fox.kl" and said in found.problem


def test_a_figure_inside_of_its_interval_reproduces(published: Path) -> None:
    honest = EvaluationResult.read(published / RESULTS_FILE)
    plain = honest.model_dump()
    kl = plain["texts"][0]["kl"]
    kl["value"] = (kl["value"] + kl["high"]) / 2
    again = EvaluationResult.model_validate(plain)
    assert not [finding for finding in compare(honest, again)[1] if finding.fatal]
