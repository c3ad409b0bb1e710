"""``hf-quant serve``: what it passes on, and a real client that streams from a tiny model in several chats at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils.import_utils import is_serve_available
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.cli import serving
from hf_quant.cli.app import app
from hf_quant.kernels import registry
from hf_quant.nn.fused import describe_fused

SCRIPTS = Path(__file__).parents[2] / "scripts"
needs_server = pytest.mark.skipif(not is_serve_available(), reason="fastapi, uvicorn and openai are not installed")


def test_without_a_server_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    found = CliRunner().invoke(app, ["serve", "somewhere"])
    assert found.exit_code == 2 and "hf-quant[serving]" in found.output


def test_its_options_are_passed_on_and_ours_are_not(monkeypatch) -> None:
    seen: dict[str, object] = {}

    class Server:
        def __init__(self, force_model: str, port: int = 1, continuous_batching: bool = False) -> None:
            kernel = os.environ.get(registry.ENVIRONMENT_VARIABLE)
            seen.update(model=force_model, port=port, batching=continuous_batching, kernel=kernel)

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    # the module itself needs the packages
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", SimpleNamespace(Serve=Server))
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "auto")  # put back afterwards
    arguments = ["serve", "somewhere", "--port", "9", "--kernel", "reference", "--continuous-batching"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == {"model": "somewhere", "port": 9, "batching": True, "kernel": "reference"}
    assert CliRunner().invoke(app, ["serve", "somewhere", "--no-such-option"]).exit_code == 2
    assert serving.CONTEXT["ignore_unknown_options"]


@pytest.mark.parametrize("overrides", [{}, {"embed_tokens": {}}])
def test_continuous_batching_generates_what_generate_does(tiny_model, overrides) -> None:
    float_model = tiny_model("llama", initializer_range=0.3)
    model = hf_quant.quantize(float_model, HfQuantConfig(group_size=32, overrides=overrides))
    fused = [report.fused for report in describe_fused(model)]
    assert fused == [registry.get("native").unavailable() is None]  # it must step aside for paged attention
    prompts = [torch.randint(1, 300, (length,)).tolist() for length in (3, 7, 12, 5)]
    greedy = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64)
    together = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=memory)
    assert len({tuple(output.generated_tokens) for output in together.values()}) > 1
    for prompt, output in zip(prompts, together.values(), strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        assert output.error is None and output.generated_tokens == alone[0, len(prompt) :].tolist()


@needs_server
@pytest.mark.slow
def test_a_client_streams_from_chats_at_once(tiny_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from serve_check import QUESTIONS
    from serve_client import ask, ask_together, serving

    out = tmp_path / "out"
    hf_quant.quantize(tiny_llama, HfQuantConfig(group_size=32, overrides={"embed_tokens": {}}), out)
    with serving("hf-quant", out, ["--continuous-batching", "--cb-num-blocks", "16"]) as address:
        alone = [ask(address, str(out), question, 6) for question in QUESTIONS[:2]]
        together = ask_together(address, str(out), QUESTIONS[:2] * 4, 6)
    assert [answer.text for answer in together] == [answer.text for answer in alone] * 4
    assert all(answer.finish in ("stop", "length") and answer.pieces for answer in alone)
