"""The benchmark scripts on tiny models: rows that go on from a file, every rung, what merging costs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def measuring():
    spec = importlib.util.spec_from_file_location("measuring", SCRIPTS / "measuring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPTS.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_rows_of_a_file_are_used_again_if_the_protocol_is_the_same(measuring, tmp_path: Path) -> None:
    protocol, rows = {"model": "a", "windows": 2}, [{"key": "one", "kl": 1}, {"key": "two", "kl": 2}]
    file = tmp_path / "figures.json"
    assert measuring.recorded(None, protocol) == measuring.recorded(file, protocol) == {}
    measuring.record(None, {})
    measuring.record(file, {**protocol, "more": 1, "rows": rows})
    assert measuring.recorded(file, protocol) == {"one": rows[0], "two": rows[1]}
    for other in ({**protocol, "windows": 3}, {**protocol, "seed": 0}):
        with pytest.raises(SystemExit, match="another protocol"):
            measuring.recorded(file, other)


def test_tables_go_where_they_are_wanted(measuring, tmp_path: Path, capsys) -> None:
    readme, table, marks = tmp_path / "README.md", tmp_path / "table.md", ("<!-- a -->", "<!-- /a -->")
    readme.write_text("above\n<!-- a -->\nSTALE\n<!-- /a -->\nbelow\n")
    measuring.publish(["| x |"], table, readme, marks, ["| short |"])
    assert capsys.readouterr().out == "| x |\n" and table.read_text() == "| x |\n"
    assert readme.read_text() == "above\n<!-- a -->\n| short |\n<!-- /a -->\nbelow\n"
    measuring.publish(["| x |"], None, readme, marks)
    assert "\n| x |\n" in readme.read_text()
    with pytest.raises(SystemExit, match="has no"):
        measuring.fill_between(readme, [], ("<!-- b -->", "<!-- /b -->"))


@pytest.mark.slow
def test_every_rung_is_a_row_and_is_not_run_again(tiny_llama: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--model", tiny_llama, "--samples", 8, "--sample-length", 32, "--windows", 2, "--length", 24]
    first = run("bench_ablation.py", *options, "--json", figures, "--block-steps", 2)
    rows = json.loads(figures.read_text())["rows"]
    keys = [row["key"] for row in rows]
    assert len(keys) == len(set(keys)) == 10 and "2 steps each" in keys[-1]
    assert all(row["seconds"] > 0 and row["kl"]["docs"] > 0 and row["kl"]["prose"] > 0 for row in rows)
    figures_of = {row["key"]: row["kl"] for row in rows}
    assert len({json.dumps(kl) for kl in figures_of.values()}) >= 9  # every rung does something
    again = run("bench_ablation.py", *options, "--json", figures, "--tune", 2)
    after = json.loads(figures.read_text())["rows"]
    assert after[:10] == rows and len(after) == 11 and "end to end, 2 steps" in after[-1]["key"]
    assert first.stdout.count("\n| ") == 10 + 1 and again.stdout.count("\n| ") == 9 + 1 + 1  # and the ruler
    assert keys[-1] not in again.stdout


@pytest.mark.slow
def test_merging_keeps_what_rounding_to_nearest_loses(tiny_llama: Path) -> None:
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    said = run("bench_merge.py", "--model", tiny_llama, "--steps", 4, "--tokens", 24).stdout
    figures = re.findall(r"([\d.]+)% of the update survives.* by ([\d.]+)% \(14 layers\)", said)
    (nearest, _), (kept, error) = [tuple(map(float, found)) for found in figures]
    assert nearest < 50 < kept < 150 and 0 < error < 20
