"""What cannot be measured is said in one line, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.comparison import compare
from hf_quant.errors import ConfigError, EvaluationError
from hf_quant.evaluation import evaluate
from hf_quant.evaluation.depth_layers import layer_errors
from hf_quant.evaluation.size import bits_per_weight
from hf_quant.evaluation.sources import Origin, checked_device
from hf_quant.evaluation.stream import LogitStream

OPTIONS = {"windows": 2, "length": 24, "speed": False, "depth": False, "progress": False}


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny int4 checkpoint; read only."""
    directory = tmp_path_factory.mktemp("sources") / "tiny-int4"
    hf_quant.quantize(str(tiny_llama), HfQuantConfig(bits=4, group_size=32), directory)
    return directory


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Origin, *args: object) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(Origin, "load", load)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"device": "xyz"}, EvaluationError, "'xyz' is no device of torch"),
        ({"device": "meta:0"}, EvaluationError, "cannot be used: this machine has none"),
        ({"kernel": "nativ"}, ConfigError, "did you mean native"),
        ({"activations": "int3"}, ConfigError, "not a way to hold activations"),
    ],
)
def test_wrong_wishes(quantized: Path, tiny_llama: Path, options: dict[str, str], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        evaluate(quantized, str(tiny_llama), **OPTIONS, **options)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_float_model_of_another_shape_is_no_reference(quantized: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(EvaluationError, match=r"weight is \[384, 64\] in tiny-int4, \[384, 128\] in"):
        evaluate(quantized, str(tiny_checkpoint("llama", hidden_size=128)), **OPTIONS)


def test_a_smaller_float_model_is_measured_without_its_inside(tiny_checkpoint: Callable[..., Path]) -> None:
    directory = tiny_checkpoint("llama", hidden_size=32, intermediate_size=64)
    assert bits_per_weight(directory, tiny_checkpoint("llama")) == 32
    streams = [
        LogitStream(AutoModelForCausalLM.from_pretrained(place), "a") for place in (tiny_checkpoint("llama"), directory)
    ]
    found = layer_errors(*streams, torch.randint(3, 384, (2, 12)))
    assert not found.blocks and not found.linears


def test_devices_of_this_machine() -> None:
    assert checked_device(None) == checked_device("cpu") == "cpu"
    with pytest.raises(EvaluationError, match="--device cpu"):
        checked_device("cuda:99")


def test_what_the_hub_says_fits_a_line(quantized: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(quantized, "no-such/model", **OPTIONS)
    assert "\n" not in str(caught.value) and ".." not in caught.value.problem


def test_compare_checks_the_device_first(quantized: Path, tiny_llama: Path) -> None:
    with pytest.raises(EvaluationError, match="no device of torch"):
        compare([quantized, tiny_llama], str(tiny_llama), device="xyz")
