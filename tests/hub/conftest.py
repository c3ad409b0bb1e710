"""Fixtures for publishing: a Hub on loopback, a separate process that pushes to it, and a checkpoint fit to publish."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCardData

from hf_quant.checkpoint import write_manifest

_SPEC = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).parents[1] / "loopback_hub.py")
assert _SPEC is not None and _SPEC.loader is not None
loopback = importlib.util.module_from_spec(_SPEC)
sys.modules["loopback_hub"] = loopback  # dataclasses look their module up there
_SPEC.loader.exec_module(loopback)

# huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so pushes happen in a process of their own.
# One process serves all tests: it answers each line of JSON with one.
_WORKER = """
import dataclasses, json, sys, time, types
import huggingface_hub.utils._http

# the client waits seconds before it tries something again: not here
huggingface_hub.utils._http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})

def push(**arguments):
    from hf_quant.hub import push
    report = push(**arguments)
    return {**dataclasses.asdict(report), "text": str(report)}

def load(repo_id, token=None, revision=None):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(repo_id, token=token, revision=revision)
    return {"tensors": sorted(model.state_dict()), "norm": model.model.norm.weight.tolist()}

def snapshot(repo_id, token=None, revision=None):
    from huggingface_hub import snapshot_download
    return snapshot_download(repo_id, token=token, revision=revision)

def show(repo_id):
    from huggingface_hub import model_info
    info = model_info(repo_id)
    results = [
        [result["dataset"]["type"], metric["type"], metric["value"]]
        for entry in info.model_index for result in entry["results"] for metric in result["metrics"]
    ]
    base = info.card_data.base_model
    return {"tags": info.tags, "base_model": base, "pipeline_tag": info.pipeline_tag, "results": results}

def verify(source, **arguments):
    from hf_quant import verify
    return verify(source, progress=False, **arguments).plain()

def push_model(directory, repo_id, **arguments):
    import hf_quant
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(directory)
    return dataclasses.asdict(model.push_to_hub(repo_id, **arguments))

def push_quantized(directory, repo_id, **arguments):
    import hf_quant
    from transformers import AutoModelForCausalLM
    config = hf_quant.HfQuantConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    return dataclasses.asdict(model.push_to_hub(repo_id, **arguments))

def push_float(directory, repo_id, **arguments):
    import hf_quant
    from transformers import AutoModelForCausalLM
    return str(AutoModelForCausalLM.from_pretrained(directory).push_to_hub(repo_id, **arguments))

def check(directory):
    from hf_quant.checkpoint import check_directory, read_headers
    check_directory(directory)
    return len(read_headers(directory))

answers = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    call = json.loads(line)
    try:
        answer = {"result": globals()[call["do"]](**call["arguments"])}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["re:^no_such_module$"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": [],
}


class Failed(Exception):
    """An exception in the worker; ``kind`` is its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class World:
    """A Hub and a process that talks to it.

    Attributes:
        hub, url: the state of the Hub and its address.
        write_token, read_token: what it knows.
        call: ``call(name, **arguments)`` runs a function of the worker.
        stderr: what the worker wrote there since it was asked last.
    """

    Blob = loopback.Blob
    write_token: str = loopback.WRITE_TOKEN
    read_token: str = loopback.READ_TOKEN

    def __init__(self, hub: Any, url: str, call: Callable[..., Any], stderr: Callable[[], str]) -> None:
        self.hub, self.url, self.call, self.stderr = hub, url, call, stderr

    def push(self, directory: Path, repo_id: str = "tester/tiny", **arguments: Any) -> dict[str, Any]:
        """Push in the worker; the report as a dictionary, with its text."""
        return self.call(
            "push", **{"directory": str(directory), "repo_id": repo_id, "token": self.write_token, **arguments}
        )

    def refused(self, directory: Path, match: str, **arguments: Any) -> str:
        """Push, which must raise a HubError that matches; its text."""
        with pytest.raises(Failed, match=match) as caught:
            self.push(directory, **arguments)
        assert caught.value.kind == "HubError"
        return str(caught.value)

    def served(self, repo_id: str = "tester/tiny", revision: str = "main") -> dict[str, bytes]:
        """What the Hub has, without its own .gitattributes."""
        files = self.hub.repos[repo_id].files(revision)
        return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("hf-home")
    with loopback.running() as (url, hub):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        told = home / "stderr.txt"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with (
            told.open("w") as errors,
            subprocess.Popen(
                [sys.executable, "-c", _WORKER], stderr=errors, text=True, env=environment, **pipes
            ) as worker,
        ):
            assert worker.stdin is not None and worker.stdout is not None

            def call(do: str, **arguments: Any) -> Any:
                worker.stdin.write(json.dumps({"do": do, "arguments": arguments}) + "\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
                if "error" in answer:
                    raise Failed(answer["error"], answer["text"])
                return answer["result"]

            def stderr() -> str:
                nonlocal read
                text = told.read_text(encoding="utf-8", errors="replace")
                read, new = len(text), text[read:]
                return new

            read = 0
            yield World(hub, url, call, stderr)
            worker.stdin.close()


@pytest.fixture(autouse=True)
def _fresh_hub(request: pytest.FixtureRequest) -> None:
    if "world" in request.fixturenames:
        hub = request.getfixturevalue("world").hub
        for state in (hub.repos, hub.objects, hub.calls, hub.log, hub.faults):
            state.clear()
        hub.after_commit = None


def _card(directory: Path, **metadata: Any) -> None:
    result = EvalResult("text-generation", "text", "held-out text", "perplexity", 13.5, metric_name="perplexity")
    data = ModelCardData(
        **{
            "base_model": "org/float",
            "base_model_relation": "quantized",
            "library_name": "transformers",
            "license": "apache-2.0",
            "pipeline_tag": "text-generation",
            "tags": ["hf-quant"],
            "model_name": "tiny",
            "eval_results": [result],
            **metadata,
        }
    )
    (directory / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n# tiny\n\nA test.\n", encoding="utf-8")


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded checkpoint with everything that a published one has; in several shards."""
    return _quantized(tiny_checkpoint("llama", shard="200KB"), tmp_path / "checkpoint")


def _quantized(source: Path, target: Path) -> Path:
    """A copy of a float checkpoint with a stock quantization_config that matches no layer, so it loads as it is."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION, "hf_quant": {}}))
    return _finish(target)


def _finish(directory: Path) -> Path:
    write_manifest(directory, {"format": "compressed-tensors"}, progress=False)
    _card(directory)
    return directory


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """``make.card(dir, **metadata)``, ``make.finish(dir)`` (manifest and card), ``make.quantized(float, target)``."""
    return SimpleNamespace(card=_card, finish=_finish, quantized=_quantized)
