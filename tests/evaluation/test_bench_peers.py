"""The peers' benchmark: what it counts, writes and prints; a peer that fails is a row with the reason."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


def _module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))  # where it imports from when it is run
    yield _module("bench_peers", ROOT / "scripts" / "bench_peers.py")
    sys.path.remove(str(ROOT / "scripts"))
    del sys.modules["bench_peers"]


@pytest.fixture(scope="module")
def environments(bench):
    return sys.modules["peer_environments"]


@pytest.fixture(scope="module")
def shared():
    yield _module("peers_shared", ROOT / "scripts" / "peers" / "shared.py")
    del sys.modules["peers_shared"]


def test_every_peer_has_a_runner_and_an_environment(bench):
    rows = bench.peers()
    assert len({peer.key for peer in rows}) == len(rows) == 9
    for peer in rows:
        assert (ROOT / "scripts" / "peers" / f"{peer.module}.py").is_file()
        assert peer.environment is None or peer.environment in bench.ENVIRONMENTS


def test_bits_are_those_of_the_named_tensors(shared, tmp_path):
    layer = {"qweight": torch.zeros(8, 64, dtype=torch.int32), "scales": torch.zeros(1, 64, dtype=torch.float16)}
    other = {"qzeros": torch.zeros(1, 8, dtype=torch.int32), "g_idx": torch.zeros(64, dtype=torch.int32)}
    save_file({f"a.{name}": tensor for name, tensor in (layer | other).items()}, tmp_path / "1.safetensors")
    save_file({f"b.{name}": tensor for name, tensor in (layer | other).items()}, tmp_path / "2.safetensors")
    bits = shared.stored_bits(tmp_path, (".qweight", ".scales"))
    assert bits / (2 * 64 * 64) == 4.25
    assert shared.stored_bits(tmp_path, ("scales",)) / (2 * 64 * 64) == 0.25


def test_only_the_replaced_weights_differ_from_the_float_model(shared, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    tensors = {"a.weight": torch.randn(4, 8), "b.weight": torch.randn(4, 8), "norm": torch.randn(4)}
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    new = torch.randn(4, 8, dtype=torch.float16)
    assert shared.write_float(model, tmp_path / "out", {"b.weight": new}) == 32
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["b.weight"], new.float()) and (tmp_path / "out" / "config.json").is_file()
    assert all(torch.equal(written[name], tensors[name]) for name in ("a.weight", "norm"))
    with pytest.raises(ValueError, match="not in the float model"):
        shared.write_float(model, tmp_path / "out", {"c.weight": new})
    with pytest.raises(ValueError, match=r"b\.weight is \[8, 4\]"):
        shared.write_float(model, tmp_path / "out", {"b.weight": new.T})


def test_a_program_is_timed_and_its_memory_is_its_own(shared):
    meter = shared.Meter()
    block = "b = bytearray(1 << 30); import time; time.sleep(0.3)"
    meter.call("quantize", [sys.executable, "-c", block])
    assert meter.seconds["quantize"] > 0.3
    if Path("/proc/self/status").is_file():
        assert meter.peak() > 1 << 30
    with pytest.raises(subprocess.CalledProcessError):
        meter.call("quantize", [sys.executable, "-c", "raise SystemExit(5)"])


def test_an_empty_result_is_not_reported(shared, tmp_path):
    job = shared.Job(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path / "report.json", {}, 1)
    with pytest.raises(ValueError, match="quantized nothing"):
        shared.write_report(job, shared.Meter(), version="1", bits=0.0, weights=0, peak=1)
    assert not job.report.exists()


def test_llama_cpp_reads_ids_or_says_that_it_changed(environments, tmp_path):
    file = tmp_path / "imatrix.cpp"
    file.write_text(f"int main() {{\n    {environments._THEIR_TOKENS}\n}}\n")
    environments.read_ids_instead_of_text(file)
    assert "common_tokenize" not in file.read_text() and environments._OUR_TOKENS in file.read_text()
    with pytest.raises(environments.PeerError, match="pinned version changed"):
        environments.read_ids_instead_of_text(file)


def test_the_last_words_of_a_traceback(environments):
    output = "Traceback (most recent call last):\n  File x\nValueError: no such group\n\x1b[0mcleaning up\n"
    assert environments.last_words(output) == "ValueError: no such group"
    assert environments.last_words("") == "it said nothing"
    assert len(environments.last_words("x" * 999)) == 200


def test_the_table_shows_figures_and_failures(bench):
    row = {
        "peer": "one",
        "layout": "int4",
        "version": "1.2",
        "bits_per_weight": 4.25,
        "seconds": {"load": 1.0, "quantize": 9.4},
        "threads": 2,
        "peak_bytes": 1_500_000_000,
        "texts": {"docs": {"kl": {"value": 0.14159}}},
    }
    failed = {"peer": "two", "layout": "int4", "failed": "pip install two: exit 1"}
    data = {
        "model": "tiny",
        "texts": ["docs"],
        "windows": 2,
        "length": 24,
        "calibration": {"shape": [4, 16], "sha256": "ab" * 32},
        "rows": [row, failed],
    }
    lines = bench.table(data)
    assert lines[2] == "| one | 1.2 | int4 | 4.25 | 0.142 | 10 (9) | 2 | 1.50 GB |"
    assert lines[3] == "| two |  | int4 |  |  | failed: pip install two: exit 1 |  |  |"
    assert "4 × 16 tokens (sha256 abababababab)" in lines[-1]


@pytest.mark.slow
def test_runs_resumes_and_reports_what_failed(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    tokens, figures = tmp_path / "tokens.safetensors", tmp_path / "figures.json"
    save_file({"input_ids": torch.arange(32).reshape(2, 16)}, tokens)

    def run(only: str, **environment: str) -> subprocess.CompletedProcess[str]:
        options = ["--windows", "2", "--length", "24", "--threads", "1", "--only", only, "--label", "tiny"]
        files = ["--envs", str(tmp_path / "envs"), "--tokens", str(tokens), "--json", str(figures)]
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--model", str(tiny_llama), *options, *files],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
            check=False,
        )

    first = run("bitsandbytes")
    assert first.returncode == 0, first.stderr
    (row,) = json.loads(figures.read_text())["rows"]
    assert 4.1 < row["bits_per_weight"] < 4.8 and row["texts"]["docs"]["kl"]["value"] > 0
    assert row["seconds"]["quantize"] > 0 and row["peak_bytes"] > 10**7
    # An environment that claims to be ready and holds no interpreter: the reason is in the row, the rest stays.
    home = tmp_path / "envs" / "gptqmodel"
    home.mkdir(parents=True)
    wanted = ["torch==2.13.0", "gptqmodel==7.6.0", "transformers==5.23.0"]
    (home / "hf-quant-bench.json").write_text(json.dumps(wanted))
    second = run("bitsandbytes|GPTQModel . int4 sym g64")
    assert second.returncode == 3, second.stderr
    after = json.loads(figures.read_text())["rows"]
    assert after[1] == row and "gptqmodel failed" in after[0]["failed"]
    assert "failed: gptqmodel failed" in second.stdout and "nf4 g64 dq" in second.stdout
