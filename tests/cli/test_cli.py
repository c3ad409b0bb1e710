"""Every command on tiny models, and every way to get it wrong."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_quant.cli import app
from hf_quant.version import __version__

COMMANDS = ("plan", "quantize", "evaluate", "card", "push", "inspect", "chat", "demo")
runner = CliRunner()


def run(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> Any:
    result = runner.invoke(app, [str(a) for a in arguments], input=stdin)
    details = f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert result.exit_code == code, details
    return result


def refused(*arguments: str | Path) -> str:
    """A typed error: two lines on stderr, nothing on stdout, exit code 2, no traceback."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert lines[-1].startswith("fix:   "), result.stderr
    assert "Traceback" not in result.stderr
    return errors[0] + " " + lines[-1]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    sentences = (f"{n} quick brown foxes jump over {n * n} lazy dogs. " for n in range(500))
    path.write_text("".join(sentences), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A tiny int4 checkpoint, as the command line writes it; read only."""
    out = tmp_path_factory.mktemp("quantized") / "tiny-int4"
    run("quantize", tiny_llama, "-o", out, "--preset", "fast")
    return out


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, tiny_llama: Path, text_file: Path) -> Path:
    """A copy of ``checkpoint`` with results and a card; read only."""
    out = tmp_path_factory.mktemp("measured") / "tiny-int4"
    shutil.copytree(checkpoint, out)
    run("evaluate", out, "-r", tiny_llama, "--text", text_file, "--windows", "4", "--length", "64")
    run("card", out, "--base-model", "someone/tiny")
    return out


# --- help ---


def test_help_lists_every_command() -> None:
    shown = run("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", shown), command
    assert run("--version").stdout.strip() == f"hf-quant {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(command: str) -> None:
    shown = run(command, "--help").stdout
    assert "Examples" in shown
    assert f"hf-quant {command}" in shown


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from hf_quant.cli import app\n"
        "try:\n    app(['quantize', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


# --- plan ---


def test_plan_names_every_kind_of_layer(tiny_llama: Path) -> None:
    shown = run("plan", tiny_llama, "--bits", "8", "--skip", "o_proj").stdout
    for word in ("model.layers.*.mlp.down_proj", "int8 sym", "left in float", "output head", "peak memory"):
        assert word in shown
    assert re.search(r"o_proj.*on request", shown)


def test_plan_json_adds_up(tiny_llama: Path) -> None:
    data = json.loads(run("plan", tiny_llama, "--json").stdout)
    assert data["planned_bytes"] == sum(layer["planned_bytes"] for layer in data["layers"])
    on_disk = (tiny_llama / "model.safetensors").stat().st_size
    assert 0 < on_disk - data["float_bytes"] < 8192  # the header
    assert data["format"] == "compressed-tensors"
    assert {layer["scheme"] for layer in data["layers"]} == {None, "int4 sym g32"}


def test_plan_predicts_the_bytes_of_the_checkpoint(tiny_llama: Path, checkpoint: Path) -> None:
    planned = json.loads(run("plan", tiny_llama, "--json").stdout)["planned_bytes"]
    with (checkpoint / "model.safetensors").open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    written = (checkpoint / "model.safetensors").stat().st_size - 8 - header
    assert written == planned


def test_plan_of_70_billion_parameters_takes_seconds(tmp_path: Path) -> None:
    model = _sparse_llama_70b(tmp_path / "llama-70b")
    started = time.perf_counter()
    data = json.loads(run("plan", model, "--json").stdout)
    assert time.perf_counter() - started < 15
    assert 140e9 < data["float_bytes"] < 142e9
    assert 38e9 < data["planned_bytes"] < 44e9
    assert data["peak_bytes"] < 1.1 * data["planned_bytes"]
    assert sum(layer["scheme"] is not None for layer in data["layers"]) == 7 * 80


def _sparse_llama_70b(out: Path) -> Path:
    """The headers of a 70B Llama over files of holes: 141 GB in name, kilobytes on disk."""
    out.mkdir()
    hidden, inner, layers, vocabulary, kv = 8192, 28672, 80, 128256, 1024
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": vocabulary,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden)},
        {"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)},
    ]
    for n in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes.append({f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()})
    weight_map = {}
    for number, shard in enumerate(shapes, 1):
        name = f"model-{number:05d}-of-{len(shapes):05d}.safetensors"
        header, end = {}, 0
        for tensor, shape in shard.items():
            size = 2
            for dimension in shape:
                size *= dimension
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        encoded = json.dumps(header).encode()
        with (out / name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + end)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return out


# --- the whole way ---


def test_quantize_writes_a_stock_checkpoint(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["hf_quant"]["version"] == __version__
    assert {"hf_quant.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in checkpoint.iterdir()}


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (("--bits", "8", "--asymmetric"), "compressed-tensors"),
        (("--grid", "nf4", "--group-size", "32"), "bitsandbytes"),
    ],
)
def test_quantize_flags_reach_the_checkpoint(
    tiny_llama: Path, tmp_path: Path, flags: tuple[str, ...], method: str
) -> None:
    run("quantize", tiny_llama, "-o", tmp_path / "out", "--preset", "fast", *flags)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == method
    recipe = config["hf_quant"]["recipe"]
    assert str(recipe["bits"]) in flags or recipe["grid"] in flags


def test_evaluate_records_what_it_prints(measured: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    results = json.loads((measured / "evaluation.json").read_text(encoding="utf-8"))
    assert [text["name"] for text in results["texts"]] == [text_file.name]
    assert results["protocol"]["windows"] == 4
    assert results["texts"][0]["kl"]["value"] > 0
    copy = tmp_path / "copy"
    shutil.copytree(measured, copy)
    flags = ("--text", text_file, "--windows", "4", "--length", "64", "--no-speed", "--no-noise-floor", "--json")
    again = json.loads(run("evaluate", copy, "-r", tiny_llama, *flags).stdout)
    assert again["texts"][0]["kl"] == results["texts"][0]["kl"]
    assert again["speed"] == []


def test_card_and_dry_push(measured: Path) -> None:
    assert "base_model: someone/tiny" in (measured / "README.md").read_text(encoding="utf-8")
    result = run("push", measured, "--repo-id", "someone/tiny-int4", "--dry-run")
    assert "model.safetensors" in result.stdout
    assert "dry run" in result.stdout


def test_inspect_names_layers_kernels_and_provenance(checkpoint: Path) -> None:
    shown = run("inspect", checkpoint).stdout
    for word in ("model.layers.*.self_attn.q_proj", "int4 sym g32", "base model", "every file is as recorded"):
        assert word in shown
    data = json.loads(run("inspect", checkpoint, "--kernel", "reference", "--json").stdout)
    assert {layer["kernel"] for layer in data["layers"] if layer["label"] == "int4 sym g32"} == {"reference"}
    assert all(layer["reason"] for layer in data["layers"] if layer["kernel"])


def test_inspect_of_a_changed_file_exits_with_1(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    tokenizer = copy / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    shown = run("inspect", copy, code=1).stdout
    assert "tokenizer_config.json" in shown


def test_chat_answers_once_and_is_reproducible(checkpoint: Path) -> None:
    flags = ("--max-new-tokens", "8", "--temperature", "0.9", "--seed", "3")
    first = run("chat", checkpoint, "-p", "fox", *flags).stdout
    assert first.strip()
    assert run("chat", checkpoint, "-p", "fox", *flags).stdout == first


def test_chat_in_turns_ends_on_quit_and_on_end_of_file(checkpoint: Path) -> None:
    run("chat", checkpoint, "--max-new-tokens", "4", stdin="fox\n/clear\ndog\n/quit\n")
    run("chat", checkpoint, "--max-new-tokens", "4", stdin="fox\n")


# --- wrong input ---


def test_unknown_commands_and_options_get_suggestions() -> None:
    assert "quantize" in run("quantise", code=2).stderr
    assert "--group-size" in run("plan", "x", "--group-sise", "32", code=2).stderr
    assert "--output-dir" in run("quantize", "x", code=2).stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--bits", "5"), "bits"),
        (("--grid", "nf5"), "grid"),
        (("--group-size", "0"), "group_size"),
        (("--grid", "nf4", "--asymmetric"), "zero points"),
        (("--double-quant",), "double_quant"),
        (("--method", "magic"), "method"),
        (("--on-indivisible", "maybe"), "on_indivisible"),
        (("--override", "down_proj"), "--override"),
        (("--override", "down_proj=bits=3"), "bits"),
        (("--override", "down_prog=bits=8"), "down_proj"),
        (("--skip", "q_prj"), "q_proj"),
        (("--group-size", "48", "--on-indivisible", "error"), "48"),
        (("--recipe", "missing.yaml"), "missing.yaml"),
    ],
)
def test_wrong_choices_are_named(tiny_llama: Path, tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    assert words in refused("plan", tiny_llama, *flags)
    assert words in refused("quantize", tiny_llama, "-o", tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


def _truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _escape(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama"', encoding="utf-8")


def _unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "lhama", "architectures": ["LhamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _missing_tensor(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _not_a_number(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage", [_truncate, _escape, _pickle, _no_config, _broken_config, _unknown_architecture, _missing_tensor]
)
def test_damaged_models_are_refused(tiny_llama: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    damage(model)
    refused("plan", model)
    refused("quantize", model, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_that_is_not_a_number_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    _not_a_number(model)
    for flags in (("--preset", "fast"), ("--calibration", "docs", "--samples", "2", "--length", "16")):
        assert "model.layers.1.mlp.up_proj" in refused("quantize", model, "-o", tmp_path / "out", *flags)
        shutil.rmtree(tmp_path / ".out.journal", ignore_errors=True)  # of the layers before it
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_output_is_only_replaced_on_request(tiny_llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out)
    before = (out / "config.json").read_bytes()
    assert "--overwrite" in refused("quantize", tiny_llama, "-o", out, "--bits", "8")
    assert (out / "config.json").read_bytes() == before
    run("quantize", tiny_llama, "-o", out, "--bits", "8", "--preset", "fast", "--overwrite")
    assert (out / "config.json").read_bytes() != before


def test_directories_that_are_not_ours_are_refused(tiny_llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    for command in (("evaluate",), ("card",), ("inspect",), ("push", "--repo-id", "a/b")):
        refused(command[0], tiny_llama, *command[1:])
        refused(command[0], tmp_path / "missing", *command[1:])
    refused("chat", tmp_path / "missing", "-p", "x")
    assert "evaluate" in refused("card", checkpoint)
    assert "--reference" in refused("evaluate", checkpoint)
    refused("push", checkpoint, "--repo-id", "a/b", "--dry-run")


def test_a_kernel_that_does_not_exist_is_refused(checkpoint: Path) -> None:
    assert "reference" in refused("inspect", checkpoint, "--kernel", "magic")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "plan", tmp_path / "missing", code=1)
    assert result.exception is not None
    assert type(result.exception).__name__ == "CheckpointError"


def test_a_real_process_prints_two_lines_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_quant.cli", "plan", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    first, *_, last = done.stderr.strip().splitlines()
    assert first.startswith("error: ") and "missing" in first
    assert last.startswith("fix:   ")
