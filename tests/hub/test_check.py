"""What is refused before anything is sent: stray files, secrets, damage, wrong cards and formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hf_quant.checkpoint import checkpoint_digest, write_manifest
from hf_quant.errors import CardError, CheckpointError, HubError
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.hub import check_publishable
from hf_quant.hub.check import MAX_FILE_BYTES, find_secret


@pytest.mark.parametrize(
    "name", ["train.py", "optimizer.pt", "pytorch_model.bin", ".env", "notes.txt", "plots/data.csv", "sub/config.json"]
)
def test_stray_files(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("{}")
    with pytest.raises(HubError, match=f"{name} does not belong"):
        check_publishable(checkpoint)
    write_manifest(checkpoint, {}, progress=False)
    assert name in check_publishable(checkpoint, include=[name]).files


def test_code_travels_only_with_a_model_that_needs_it(checkpoint: Path, make: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Model"}}))
    (checkpoint / "modeling.py").write_text("class Model: ...\n")
    make.finish(checkpoint)
    assert "modeling.py" in check_publishable(checkpoint).files


def test_what_a_download_leaves_is_not_published(checkpoint: Path) -> None:
    (checkpoint / ".cache/huggingface/download").mkdir(parents=True)
    (checkpoint / ".cache/huggingface/download/config.json.metadata").write_text("")
    (checkpoint / ".gitattributes").write_text("")
    assert not [name for name in check_publishable(checkpoint).files if name.startswith(".")]


def test_a_shard_that_no_loader_reads(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model-00003-of-00003.safetensors", checkpoint / "model-00004-of-00004.safetensors")
    with pytest.raises(HubError, match="not one of the files that a loader would read"):
        check_publishable(checkpoint)


def test_damage_is_found_before_anything_is_sent(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed: model-00002-of-00003\.safetensors"):
        check_publishable(checkpoint)
    shard.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="is truncated"):
        check_publishable(checkpoint)


# Put together here so that no scanner takes this file for a leak.
SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an AWS access key": "AKIA" + "ABCD1234" * 2,
    "an AWS secret key": "aws_secret_access_key = " + "aB3/" * 10,
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "a GitHub token": "ghp_" + "aB3d" * 9,
    "a Google API key": "AIza" + "aB3d5" * 7,
    "an OpenAI or Anthropic key": "sk-ant-" + "aB3d" * 8,
    "a Slack token": "xoxb-" + "1234567890" * 3,
}


@pytest.mark.parametrize("what", SECRETS)
def test_secrets(checkpoint: Path, what: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(f"{{# first #}}\n{{# {SECRETS[what]} #}}\n")
    assert find_secret(f"AWS_SECRET_ACCESS_KEY={'x' * 40}".encode()) == ("an AWS secret key", 1)
    with pytest.raises(HubError, match=rf"chat_template\.jinja seems to hold {what} \(line 2\)") as caught:
        check_publishable(checkpoint)
    assert SECRETS[what] not in str(caught.value), "an error message is no place for a secret"


def test_a_secret_in_the_metadata_of_a_shard(tiny_llama: Path, tmp_path: Path, make: Any) -> None:
    target = tmp_path / "checkpoint"
    shutil.copytree(tiny_llama, target)
    tensors = load_file(target / "model.safetensors")
    save_file(tensors, target / "model.safetensors", {"format": "pt", "note": SECRETS["a Hugging Face token"]})
    with pytest.raises(HubError, match=r"model\.safetensors seems to hold a Hugging Face token"):
        check_publishable(make.quantized(target, tmp_path / "quantized"))


@pytest.mark.parametrize(
    "text",
    ["hf_quant", "hf_" + "a" * 20, "xAKIA" + "ABCD1234" * 2, "BEGIN PRIVATE KEY", "sk-learn-ant", "chf_" + "a" * 40],
)
def test_what_is_no_secret(text: str) -> None:
    assert find_secret(text.encode()) is None


def test_links_are_not_followed_out_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    (checkpoint / "LICENSE").symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        check_publishable(checkpoint)


def test_a_card_is_needed_and_checked(checkpoint: Path, make: Any) -> None:
    make.card(checkpoint, base_model="/home/me/models/x")
    with pytest.raises(CardError, match="base_model"):
        check_publishable(checkpoint)
    (checkpoint / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        check_publishable(checkpoint)
    (checkpoint / "README.md").unlink()
    with pytest.raises(HubError, match=r"has no README\.md.*hf-quant card"):
        check_publishable(checkpoint)


@pytest.mark.parametrize("quantization", [None, {}, {"bits": 4}, {"quant_method": "hf_quant"}, "int4"])
def test_only_stock_formats_are_published(checkpoint: Path, make: Any, quantization: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    make.finish(checkpoint)
    with pytest.raises(HubError, match="stock loaders cannot read"):
        check_publishable(checkpoint)


def test_results_must_be_of_this_checkpoint(checkpoint: Path) -> None:
    def write(digest: str | None) -> None:
        interval = {"value": 1.0, "low": 0.9, "high": 1.1}
        intervals = ("perplexity_float", "perplexity_quantized", "perplexity_increase_percent", "kl", "top1_agreement")
        sizes = ("float_disk_bytes", "quantized_disk_bytes", "float_memory_bytes", "quantized_memory_bytes")
        measured = {
            "name": "t",
            "source": "s",
            "sha256": "0" * 64,
            "tokens": 8,
            "kl_p99": 0.1,
            "noise_floor": None,
            **dict.fromkeys(intervals, interval),
        }
        result = {
            "created": "now",
            "candidate": "c",
            "candidate_digest": digest,
            "reference": "r",
            "reference_revision": None,
            "reference_dtype": "float32",
            "protocol": {
                "windows": 1,
                "length": 8,
                "dtype": "float32",
                "device": "cpu",
                "seed": 0,
                "bootstrap_samples": 10,
            },
            "texts": [measured],
            "size": {**dict.fromkeys(sizes, 1), "bits_per_weight": 4.5},
            "speed": [],
            "environment": {
                "machine": "m",
                "cpu": "c",
                "cores": 2,
                "accelerator": None,
                "python": "3",
                "versions": {},
            },
            "command": None,
        }
        EvaluationResult.model_validate_json(json.dumps(result))  # else the test would pass for the wrong reason
        (checkpoint / "evaluation.json").write_text(json.dumps(result))

    for digest in (checkpoint_digest(checkpoint), None):
        write(digest)
        assert "evaluation.json" in check_publishable(checkpoint).files
    write("0" * 64)
    with pytest.raises(HubError, match="results of another checkpoint"):
        check_publishable(checkpoint)


def test_a_file_too_large_for_the_hub(checkpoint: Path) -> None:
    rows = MAX_FILE_BYTES // 1024 + 1
    name = "model-00004-of-00004.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [rows, 1024], "data_offsets": [0, rows * 1024]}}).encode()
    with (checkpoint / name).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 1024)  # a hole: takes no space
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = name
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="the Hub takes files of at most 50,000,000,000"):
        check_publishable(checkpoint)
