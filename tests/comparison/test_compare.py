"""compare(): recorded and new results side by side, the Pareto front, files, plots, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.cli import app
from hf_quant.comparison import Comparison, compare
from hf_quant.comparison.files import write_comparison
from hf_quant.comparison.result import front
from hf_quant.comparison.table import markdown
from hf_quant.convert import convert
from hf_quant.errors import EvaluationError, OutputError
from hf_quant.evaluation import EvaluationResult, evaluate_directory

OPTIONS = {"windows": 4, "length": 32, "progress": False}


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory) -> Path:
    """A float model, int4 and int8 with results, and nf4, a stock GPTQ copy and a text without any; read only."""
    root = tmp_path_factory.mktemp("compare")
    source = root / "float"
    shutil.copytree(tiny_checkpoint("llama", dtype=torch.bfloat16), source)
    text = root / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog because it can " * 200)
    for name, settings in (("int4", {}), ("int8", {"bits": 8}), ("nf4", {"grid": "nf4", "group_size": 64})):
        hf_quant.quantize(str(source), HfQuantConfig(**{"bits": 4, "group_size": 32, **settings}), root / name)
    for name in ("int4", "int8"):
        evaluate_directory(
            root / name, str(source), texts=(str(text),), repeats=1, int8_activations=False, speed=name == "int8",
            **OPTIONS,
        )  # fmt: skip
    convert(root / "int4", root / "gptq", "gptq")
    for ours in ("hf_quant.json", "evaluation.json"):
        (root / "gptq" / ours).unlink(missing_ok=True)
    return root


def _same_text(made: Path) -> dict:
    return {"texts": (str(made / "fox.txt"),), **OPTIONS}


def test_front_is_what_nothing_beats() -> None:
    assert front([(1, 5), (2, 3), (3, 3), (2, 4), (4, 1)]) == [True, True, False, False, True]
    assert front([(1, 1), (1, 1)]) == [True, True]


def test_recorded_results_are_used_and_missing_ones_measured(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    found = compare(
        [made / name for name in ("int4", "int8", "nf4", "gptq")], made / "float", repeats=1, **_same_text(made)
    )
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before, "nothing is written"
    int4, int8, nf4, gptq = found.entries
    assert [entry.measured for entry in found.entries] == ["recorded", "recorded", "here", "here"]
    assert [e.format for e in found.entries] == ["compressed-tensors", "compressed-tensors", "bitsandbytes", "gptq"]
    recorded = EvaluationResult.read(made / "int4" / "evaluation.json")
    assert int4.loss == recorded.texts[0].kl.value and int4.decode_tokens_per_second is None
    assert int4.floor == recorded.texts[0].noise_floor.kl.value
    assert gptq.digest is None and gptq.loss == pytest.approx(int4.loss, rel=1e-3), "the same weights"
    assert int8.loss < int4.loss and int8.disk_bytes > int4.disk_bytes
    speed = {
        run.model: run.decode_tokens_per_second for run in EvaluationResult.read(made / "int8/evaluation.json").speed
    }
    assert int8.speed_ratio == speed["quantized"] / speed["float"] and not found.one_run
    assert nf4.speed_ratio is not None
    assert found.accurate()[1] and not found.fast()[0]
    table = markdown(found)
    assert table.count("\n| ") == 7 and "different runs" in table and "2 of 4 results were recorded" in table


def test_one_run_of_speed(made: Path) -> None:
    found = compare([made / "int4", made / "int8"], made / "float", speed=True, repeats=1, progress=False)
    assert found.one_run and all(e.decode_tokens_per_second > 0 and e.speed_ratio is None for e in found.entries)
    assert found.speeds() == [entry.decode_tokens_per_second for entry in found.entries]
    assert "all in turns in one run" in markdown(found)


def test_command_writes_table_figures_and_plots(made: Path, tmp_path: Path) -> None:
    words = ["compare", str(made / "int4"), str(made / "int8"), "-o", str(tmp_path / "out"), "--measure", "never"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "int4" in shown.stdout and "Pareto front" in shown.stdout
    folder = tmp_path / "out"
    names = {"compare.json", "compare.md", "loss-bytes.png", "loss-bytes.svg", "speed-bytes.png", "speed-bytes.svg"}
    assert {file.name for file in folder.iterdir()} == names
    read = Comparison.model_validate_json((folder / "compare.json").read_text())
    assert [entry.name for entry in read.entries] == ["int4", "int8"]
    text = (folder / "compare.md").read_text()
    assert "](loss-bytes.png)" in text and "](speed-bytes.png)" in text and str(made) not in text
    bytes_before = (folder / "loss-bytes.svg").read_bytes()
    write_comparison(read, folder)
    assert (folder / "loss-bytes.svg").read_bytes() == bytes_before, "the same figures give the same bytes"
    as_json = CliRunner().invoke(app, [*words[:3], "--measure", "never", "--json"])
    assert json.loads(as_json.stdout)["entries"][1]["name"] == "int8"


def test_encoders_are_compared_by_their_own_figure(tmp_path: Path, tiny_tokenizer: object) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import kinds

    source = kinds.save("bert", tmp_path / "bert", tiny_tokenizer)
    for bits in (4, 8):
        hf_quant.quantize(
            str(source), HfQuantConfig(bits=bits, group_size=32, method="absmax"), tmp_path / f"int{bits}"
        )
    found = compare([tmp_path / "int4", tmp_path / "int8"], source, windows=4, length=32, repeats=1, progress=False)
    assert "distance" in found.loss.lower() or "cosine" in found.loss.lower()
    assert found.speed_unit == "passages" and found.entries[0].loss > found.entries[1].loss
    assert write_comparison(found, tmp_path / "out")


def _broken(made: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of int8 whose results say something else."""
    target = tmp_path / "other"
    shutil.copytree(made / "int8", target)
    result = json.loads((target / "evaluation.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = result
        for key in parents:
            place = place[int(key) if key.isdecimal() else key]
        place[last] = value
    (target / "evaluation.json").write_text(json.dumps(result))
    return target


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"protocol__length": 64}, "measured differently: length is 32 and 64"),
        ({"protocol__seed": 1}, "seed is 0 and 1"),
        ({"texts__0__sha256": "0" * 64}, "what was read is"),
        ({"texts__0__perplexity_float": {"value": 9.0, "low": 8.0, "high": 10.0}}, "float perplexity on fox"),
        ({"candidate_digest": "0" * 64}, "of other files than those that lie there, and nothing may be measured"),
    ],
)
def test_results_that_do_not_belong_together(made: Path, tmp_path: Path, changes: dict, match: str) -> None:
    other = _broken(made, tmp_path, **changes)
    with pytest.raises(EvaluationError, match=match) as caught:
        compare([made / "int4", other], measured="never", progress=False)
    assert str(other) in str(caught.value)


def test_bad_requests(made: Path, tmp_path: Path) -> None:
    for directories, match in (
        ([], "needs at least two checkpoints, got 0"),
        ([made / "int4"], "needs at least two checkpoints, got 1"),
        ([made / "int4", made / "nothing"], "nothing is not a directory"),
        ([made / "int4", tmp_path], "has no config.json"),
        ([made / "int4", made / "int4" / ".." / "int4"], "is named twice"),
    ):
        with pytest.raises(EvaluationError, match=match):
            compare(directories, progress=False)
    with pytest.raises(EvaluationError, match=r"has no evaluation\.json, and nothing may be measured"):
        compare([made / "int4", made / "nf4"], measured="never", progress=False)
    with pytest.raises(EvaluationError, match="results of another windows than was asked for"):
        compare([made / "int4", made / "int8"], windows=8, progress=False)
    with pytest.raises(EvaluationError, match="not built in"):
        compare([made / "int4", made / "nf4"], made / "float", progress=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a directory"):
        write_comparison(compare([made / "int4", made / "int8"], progress=False), tmp_path / "file")
    shown = CliRunner().invoke(app, ["compare", str(made / "int4"), str(made / "int8"), "-o", str(tmp_path / "file")])
    assert shown.exit_code == 2 and "error: " in shown.stderr
