"""The benchmark script on a tiny model: every row once, figures kept between runs, a README filled in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_accuracy.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_accuracy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_accuracy"] = module
    sys.path.insert(0, str(SCRIPT.parent))  # where it imports from when it is run
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    yield module
    del sys.modules["bench_accuracy"]


def test_every_row_of_ours_has_a_baseline(bench):
    rows = bench.rows()
    assert len({row.key for row in rows}) == len(rows) == 41
    for row in rows:
        if row.method == bench.OURS:
            assert any(other.baseline and other.layout == row.layout for other in rows), row.key
    assert set(bench._SHORT) <= {row.layout for row in rows}


def _row(layout, method, values):
    kl = {"value": sum(values) / len(values), "low": 0.0, "high": 1.0}
    text = {"kl": kl, "kl_of_windows": values}
    return {
        "key": f"{layout} | {method}",
        "layout": layout,
        "method": method,
        "baseline": method != "hf-quant",
        "texts": {"docs": text},
    }


def test_changes_are_paired_and_ties_are_ties(bench):
    base = [0.1, 0.5, 0.2, 0.9]
    table = [
        _row("a", "RTN", [2 * v for v in base]),
        _row("a", "other", base),
        _row("a", "hf-quant", [0.5 * v for v in base]),
        _row("b", "RTN", base),
        _row("b", "hf-quant", [v * 1.01 for v in base]),
        _row("c", "RTN", base),
        _row("c", "hf-quant", [0.2, 0.4, 0.4, 0.8]),
        _row("d", "RTN", base),
        _row("d", "hf-quant", [v * 1.3 for v in base]),
    ]
    changes = {
        row["layout"]: row["change"]["docs"] for row in bench.compare_with_baselines(table, 0) if "change" in row
    }
    assert changes["a"]["value"] == pytest.approx(-50) and changes["a"]["high"] == pytest.approx(-50)
    assert not bench.is_tie(changes["a"]) and bench.verdict(changes["a"]) == "-50 %"
    assert bench.is_tie(changes["b"]), "below 2 %"
    assert bench.is_tie(changes["c"]), "windows disagree"
    assert bench.verdict(changes["d"]) == "+30 %"


@pytest.mark.slow
def test_runs_resumes_and_fills(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    figures, table, readme = tmp_path / "f.json", tmp_path / "t.md", tmp_path / "README.md"
    readme.write_text("above\n<!-- table:accuracy -->\nSTALE\n<!-- /table:accuracy -->\nbelow\n")

    def run(only: str) -> subprocess.CompletedProcess[str]:
        options = ["--windows", "2", "--length", "24", "--quiet", "--only", only, "--label", "tiny"]
        files = ["--json", str(figures), "--markdown", str(table), "--fill", str(readme)]
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--model", str(tiny_llama), *options, *files],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
            check=False,
        )

    first = run("int4 sym g32|LLM.int8")
    assert first.returncode in (0, 3), first.stderr  # a random model need not gain from a search
    kept = json.loads(figures.read_text())
    assert [row["key"] for row in kept["rows"]] == [
        "bfloat16 | float",
        "int4 sym g32 | RTN",
        "int4 sym g32 | hf-quant",
        "int8 sym per-channel | LLM.int8",
    ]
    bits = {row["key"]: row["bits_per_weight"] for row in kept["rows"]}
    assert bits["int4 sym g32 | hf-quant"] == 4.5
    assert 8.2 < bits["int8 sym per-channel | LLM.int8"] < 8.6
    second = run("nf4 g64 dq")
    assert second.returncode in (0, 3), second.stderr
    after = json.loads(figures.read_text())
    assert after["rows"][:4] == kept["rows"] and len(after["rows"]) == 6
    nf4 = {row["method"]: row for row in after["rows"] if row["layout"] == "nf4 g64 dq"}
    assert nf4["bitsandbytes"]["bits_per_weight"] == pytest.approx(nf4["hf-quant"]["bits_per_weight"], rel=0.01)
    filled = readme.read_text()
    assert filled.startswith("above\n<!-- table:accuracy -->\n|") and filled.endswith(
        "<!-- /table:accuracy -->\nbelow\n"
    )
    assert "STALE" not in filled and "nf4 g64 dq" in filled and "tiny, data-free" in filled
    assert table.read_text().count("\n| ") == 1 + 1 + 6  # ruler, float32, six rows below the header
