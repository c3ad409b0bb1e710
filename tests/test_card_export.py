"""Cards of what `convert` writes for other runtimes: the source's figures, labelled so, and how the files are run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.card import write_card
from hf_quant.card_export import Export
from hf_quant.card_facts import CheckpointFacts
from hf_quant.card_snippets import with_repo_id
from hf_quant.checkpoint import RESULTS_FILE, checkpoint_digest, read_manifest
from hf_quant.convert import convert
from hf_quant.errors import CardError, CheckpointError, EvaluationError
from hf_quant.evaluation import evaluate, evaluate_directory
from hf_quant.evaluation.kinds import kind_of
from hf_quant.hub import check_publishable

pytest.importorskip("gguf")
OPTIONS: dict[str, Any] = {"windows": 2, "length": 24, "speed": False, "depth": False, "progress": False}


@pytest.fixture(scope="module")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured checkpoint; read only."""
    directory = tmp_path_factory.mktemp("source") / "tiny-int4"
    hf_quant.quantize(str(tiny_llama), HfQuantConfig(bits=4, group_size=32), directory)
    evaluate_directory(directory, str(tiny_llama), **OPTIONS)
    return directory


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    """Its GGUF file, in a directory with a card."""
    convert(source, tmp_path / "tiny-gguf", "gguf")
    write_card(tmp_path / "tiny-gguf", base_model="org/base")
    return tmp_path / "tiny-gguf"


def test_the_card_says_whose_figures_these_are(exported: Path, source: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert {"gguf", "hf-quant", "int4"} <= set(metadata["tags"]) and metadata["base_model"] == "org/base"
    assert metadata["base_model_relation"] == "quantized" and metadata["pipeline_tag"] == "text-generation"
    assert "model-index" not in metadata and "library_name" not in metadata, "nobody measured these files"
    assert f"checkpoint that these files were converted from** (SHA-256 `{checkpoint_digest(source)}`)" in text
    assert "every quantized weight has exactly the value that it has there" in text
    results = (source / RESULTS_FILE).read_bytes()
    assert (exported / RESULTS_FILE).read_bytes() == results
    assert "KL(float ‖ quantized)" in text and "tokens/s" not in text and "Speed and memory hold" not in text
    assert "hf-quant convert tiny-gguf-compressed-tensors tiny-gguf --to gguf" in text
    assert "tiny-gguf-Q4_0.gguf" in text and "ollama run hf.co/tiny-gguf" in text


def test_the_printed_snippet_runs(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(exported.parent)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_it_verifies_and_damage_is_named(exported: Path) -> None:
    report = hf_quant.verify(exported, progress=False)
    assert report.ok, report.problems
    assert any("converted from" in finding.problem for finding in report.notes)
    check_publishable(exported)
    with pytest.raises(CheckpointError, match="gguf files, which cannot be evaluated"):
        hf_quant.verify(exported, metrics=True, progress=False)
    file = next(exported.glob("*.gguf"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert [finding.subject for finding in hf_quant.verify(exported, progress=False).problems] == [file.name]
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        check_publishable(exported)


def test_results_of_something_else_are_refused(exported: Path, source: Path, tiny_llama: Path) -> None:
    other = exported.parent / "other"
    hf_quant.quantize(str(tiny_llama), HfQuantConfig(bits=8, group_size=32), other)
    evaluate_directory(other, str(tiny_llama), **OPTIONS)
    (exported / RESULTS_FILE).write_bytes((other / RESULTS_FILE).read_bytes())
    with pytest.raises(CardError, match="measured on another checkpoint"):
        write_card(exported)
    (exported / RESULTS_FILE).unlink()
    with pytest.raises(CardError, match="checkpoint that it was converted from, and convert again"):
        write_card(exported)


def test_a_changed_source_passes_no_results_on(source: Path, tmp_path: Path) -> None:
    import shutil

    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / "generation_config.json").write_text("{}")
    done = convert(changed, tmp_path / "out", "gguf")
    assert any("results are not taken along" in note for note in done.notes)
    assert not (tmp_path / "out" / RESULTS_FILE).exists()
    assert read_manifest(tmp_path / "out").provenance["export"]["source_digest"] is None
    write_card(tmp_path / "out", allow_unmeasured=True)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "had not been evaluated" in text and "accuracy was not measured" in text


def test_they_are_not_loaded_as_checkpoints(exported: Path, tiny_llama: Path) -> None:
    with pytest.raises(EvaluationError, match="holds gguf files"):
        evaluate(exported, str(tiny_llama), **OPTIONS)
    with pytest.raises(CheckpointError, match="holds gguf files"):
        hf_quant.load(exported)


def test_onnx_files_too(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    convert(source, tmp_path / "onnx", "onnx")
    write_card(tmp_path / "onnx")
    text = (tmp_path / "onnx" / "README.md").read_text(encoding="utf-8")
    assert "ORTModelForCausalLM.from_pretrained(repo_id)" in text and "- onnx" in text
    report = hf_quant.verify(tmp_path / "onnx", progress=False)
    assert report.ok, report.problems
    assert "model.onnx_data" in check_publishable(tmp_path / "onnx").files


@pytest.mark.parametrize(
    ("name", "files", "wanted"),
    [
        ("openvino", ("openvino_model.bin", "openvino_tokenizer.xml"), ("OVModelForCausalLM", "LLMPipeline")),
        ("openvino", ("openvino_model.bin",), ("OVModelForCausalLM",)),
        ("modelopt", ("model.safetensors",), ("trtllm-serve org/model", "never ran it")),
    ],
)
def test_other_runtimes_have_their_commands(name: str, files: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    checkpoint = CheckpointFacts("model", "org/model", "LlamaForCausalLM", "llama", tuple((f, 7) for f in files))
    export = Export(name, "compressed-tensors", {"exact": True}, checkpoint, kind_of("LlamaForCausalLM"))
    assert all(part in export.usage for part in wanted)
    assert ("LLMPipeline" in export.usage) == ("openvino_tokenizer.xml" in files)
    assert export.weight_bytes == 7


def test_every_command_gets_the_name_of_the_repository() -> None:
    lines: Callable[[str], str] = lambda name: (  # noqa: E731
        f'<!-- hf-quant: snippets load "{name}" -->\n\n```bash\nhf download {name} a.gguf --local-dir .\n'
        f"ollama run hf.co/{name}\ntrtllm-serve {name}\nvllm serve {name}\n```\n"
        f'```python\nrepo_id = "{name}"\n```\n'
    )
    assert with_repo_id(lines("tiny"), "org/tiny-gguf") == lines("org/tiny-gguf")
