"""A checkpoint in OpenAI compatible servers: are the answers those of ``generate``, and how fast are they?

    python scripts/serve_check.py OUT [--only REGEX] [--python vllm=PYTHON ...] [--json FILE] [--fill README.md]

Every row starts a server as its recipe in scripts/servers/ does, asks it with the ``openai`` package, streaming, one
chat after the other and then ``--chats`` at once, and stops it. Answers are compared with greedy ``generate`` of the
same checkpoint on hf-quant, in the dtype that the server computes in; where they part, the float32 logits of the two
tokens say whether rounding can be the reason. llama.cpp reads the checkpoint as ``hf-quant convert --to gguf`` writes
it, and in one row the same weights expanded to float32, where only names, orders and templates could differ.

hf-quant's server and transformers' run in this Python, which needs ``pip install ".[serving]" compressed-tensors``, or
in one that ``--python`` names; for vLLM and llama.cpp environments are made under ``--envs`` on first use. With
``--json`` a run goes on where the file ends. Exit code 1 when an answer is not streamed to its end, or when a server
that computes as ``generate`` does answers something else.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import label_of, publish, record, recorded  # type: ignore[import-not-found]
from peer_environments import LLAMA_CPP, VLLM, make_environment  # type: ignore[import-not-found]
from serve_client import Answer, ask, ask_together, serving  # type: ignore[import-not-found]
from transformers import AutoTokenizer

import hf_quant
from hf_quant.convert import convert
from hf_quant.evaluation import environment
from hf_quant.export import gguf_file
from hf_quant.nn.swap import put_float

_MARKS = ("<!-- table:serve -->", "<!-- /table:serve -->")
WARM_UP = "Say hello."
QUESTIONS = (
    "Name three rivers.",
    "What is the capital of France?",
    "Count from one to ten.",
    "Which animals live in the sea?",
    "Write a sentence about the moon.",
    "What is two plus two?",
    "Tell me a short story.",
    "What colour is the sky?",
)
_BATCHING = ("--continuous-batching", "--cb-num-blocks", "64")
_VLLM = ("--dtype", "bfloat16", "--max-model-len", "2048")
_PLAIN = {"repeat_penalty": 1.0}  # llama-cpp-python's server makes tokens that were there before less likely
_KEYS_IN_FLOAT32 = ("--type_k", "0", "--type_v", "0")
_HEAD = (
    "| server | computes in | answers of `generate` in that dtype | in float32 | largest gap where they part | "
    "1 chat: first token | tok/s | {chats} chats: first token | tok/s in all |"
)
_RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Server:
    """One row.

    Attributes:
        label: first column.
        recipe: in scripts/servers/.
        dtype: that activations have; answers are compared with ``generate`` in it.
        options: of the recipe.
        file: what is served: the checkpoint itself, its ``gguf`` file, or one with the weights ``expanded``.
        exact: whether other answers than those of ``generate`` are an error.
        variables: of the environment that the server gets besides.
        extra: fields of its own that requests need.
    """

    label: str
    recipe: str
    dtype: str
    options: tuple[str, ...] = ()
    file: str = "checkpoint"
    exact: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def _dtype(name: str) -> tuple[str, ...]:
    return ("--dtype", name)


SERVERS = (
    Server("hf-quant serve", "hf-quant", "float32", _dtype("float32"), exact=True),
    Server("hf-quant serve", "hf-quant", "bfloat16", _dtype("bfloat16"), exact=True),
    Server("hf-quant serve, continuous batching", "hf-quant", "float32", (*_BATCHING, *_dtype("float32")), exact=True),
    Server("hf-quant serve, continuous batching", "hf-quant", "bfloat16", (*_BATCHING, *_dtype("bfloat16"))),
    Server("transformers serve", "transformers", "float32", _dtype("float32"), exact=True),
    Server("transformers serve", "transformers", "bfloat16", _dtype("bfloat16")),
    Server("transformers serve, continuous batching", "transformers", "bfloat16", (*_BATCHING, *_dtype("bfloat16"))),
    Server("vLLM, a core for its front end", "vllm", "bfloat16", _VLLM),
    Server("vLLM, all cores", "vllm", "bfloat16", _VLLM, variables={"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}),
    Server("llama-cpp-python, GGUF", "llama-cpp", "float32", file="gguf", extra=_PLAIN),
    Server(
        "llama-cpp-python, weights expanded",
        "llama-cpp",
        "float32",
        _KEYS_IN_FLOAT32,
        "expanded",
        exact=True,
        extra=_PLAIN,
    ),
)
PACKAGES = {"vllm": ("vllm", VLLM), "llama-cpp": ("llama-cpp-server", LLAMA_CPP.replace("==", "[server]==", 1))}


class Expected:
    """Greedy answers of ``generate`` on hf-quant, per dtype, and float32 logits."""

    def __init__(self, directory: Path, tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._directory = directory
        self._tokens = tokens
        self._answers: dict[str, list[str]] = {}

    def answers(self, dtype: str) -> list[str]:
        """The text that ``generate`` gives to every question."""
        if dtype not in self._answers:
            model = hf_quant.load(self._directory, dtype=getattr(torch, dtype))
            with torch.no_grad():
                self._answers[dtype] = [self._answer(model, question) for question in QUESTIONS]
        return self._answers[dtype]

    def _prompt(self, question: str) -> torch.Tensor:
        messages = [{"role": "user", "content": question}]
        made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        return made["input_ids"]

    def _answer(self, model: Any, question: str) -> str:
        ids = self._prompt(question)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self._tokens)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    def gap(self, index: int, text: str) -> float:
        """How much less than the likeliest token the float32 logits give to the one with which ``text`` leaves the
        float32 answer; 0.0 where it does not."""
        question, expected = QUESTIONS[index], self.answers("float32")[index]
        ours, theirs = (self.tokenizer(said, add_special_tokens=False)["input_ids"] for said in (expected, text))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None:
            return 0.0
        model = hf_quant.load(self._directory, dtype=torch.float32)
        ids = torch.cat([self._prompt(question), torch.tensor([ours[:same]], dtype=torch.int64)], dim=1)
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        return float(logits.max() - logits[theirs[same]])


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a checkpoint with a chat template")
    parser.add_argument("--only", default="", help="regular expression: rows to measure")
    parser.add_argument("--python", action="append", default=[], metavar="RECIPE=PYTHON", help="an environment to use")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hf-quant" / "envs")
    parser.add_argument("--chats", type=int, default=8, choices=range(1, len(QUESTIONS) + 1))
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="of the chats at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is not left behind
    directory = options.directory.resolve()
    pythons = dict(given.split("=", 1) for given in options.python)
    protocol = {"model": label_of(directory), "chats": options.chats, "tokens": options.tokens}
    protocol |= {"threads": torch.get_num_threads(), "cpu": environment.describe().cpu}
    rows = recorded(options.json, protocol)
    expected = Expected(directory, options.tokens)
    for server in SERVERS:
        key = f"{server.label}, {server.dtype}"
        if key not in rows and re.search(options.only, key):
            rows[key] = {"key": key, **measure(server, directory, pythons, options, expected)}
            record(options.json, {**protocol, "rows": list(rows.values())})
            print(json.dumps(rows[key]), file=sys.stderr, flush=True)
    done = [rows[key] for server in SERVERS if (key := f"{server.label}, {server.dtype}") in rows]
    lines = [_HEAD.format(chats=options.chats), _RULE, *(line_of(row) for row in done), "", note(protocol, done)]
    publish(lines, options.markdown, options.fill, _MARKS)
    return int(any(row["broken"] or row["wrong"] for row in done))


def measure(
    server: Server, directory: Path, pythons: dict[str, str], options: argparse.Namespace, expected: Expected
) -> dict[str, Any]:
    """Start the server, ask it, and compare what it says."""
    python = pythons.get(server.recipe) or _environment(server.recipe, options.envs)
    with (
        served(server, directory) as model,
        serving(server.recipe, model, server.options, python, server.variables) as address,
    ):
        ask(address, model, WARM_UP, 8)
        alone = [ask(address, model, question, options.tokens, server.extra) for question in QUESTIONS]
        rounds = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            answers = ask_together(address, model, QUESTIONS[: options.chats], options.tokens, server.extra)
            rounds.append((time.perf_counter() - started, answers))
    together = [answer for _, answers in rounds for answer in answers]
    count = expected.tokenizer
    figures = {
        "first": median(answer.first_seconds for answer in alone),
        "speed": median((size(answer, count) - 1) / (answer.seconds - answer.first_seconds) for answer in alone),
        "first_together": median(answer.first_seconds for answer in together),
        "speed_together": median(sum(size(answer, count) for answer in found) / spent for spent, found in rounds),
    }
    texts = [(i, answer.text) for i, answer in enumerate(alone)]
    texts += [(i, answer.text) for _, answers in rounds for i, answer in enumerate(answers)]
    same = sum(text == expected.answers(server.dtype)[i] for i, text in texts)
    exactly = sum(text == expected.answers("float32")[i] for i, text in texts)
    return {
        "label": server.label,
        "dtype": server.dtype,
        "file": server.file,
        "answers": len(texts),
        "same": same,
        "same_float32": exactly,
        "gap": max(expected.gap(i, text) for i, text in set(texts)),
        "broken": sum(not answer.is_whole for answer in [*alone, *together]),
        "wrong": len(texts) - same if server.exact else 0,
        **figures,
    }


def _environment(recipe: str, envs: Path) -> Path:
    if recipe not in PACKAGES:
        return Path(sys.executable)
    name, package = PACKAGES[recipe]
    return make_environment(name, (package,), envs)


@contextmanager
def served(server: Server, directory: Path) -> Iterator[str]:
    """The path that the server is given; GGUF files are written for it and removed afterwards."""
    if server.file == "checkpoint":
        yield str(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        if server.file == "gguf":
            convert(directory, Path(folder) / "gguf", "gguf", round_scales=True)
            (file,) = (Path(folder) / "gguf").glob("*.gguf")
        else:
            model = hf_quant.load(directory, kernel="reference", dtype=torch.float32)
            put_float(model, torch.float32)
            file = gguf_file.write(model, directory, Path(folder), "expanded").file
        yield str(file)


def size(answer: Answer, tokenizer: Any) -> int:
    """Tokens of an answer: what the server says, or what its text has where it says nothing."""
    return answer.tokens or len(tokenizer(answer.text, add_special_tokens=False)["input_ids"])


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    gap = f"{row['gap']:.2g}" if row["gap"] else ""
    return (
        f"| {row['label']} | {row['dtype']} | {row['same']} of {row['answers']} | {row['same_float32']} | {gap} "
        f"| {row['first'] * 1000:.0f} ms | {row['speed']:.0f} "
        f"| {row['first_together'] * 1000:.0f} ms | {row['speed_together']:.0f} |"
    )


def note(protocol: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What was measured on what."""
    broken = sum(row["broken"] for row in rows)
    whole = f"{broken} were not streamed to their end" if broken else "all were streamed to their end"
    return (
        f"{protocol['model']}; {protocol['cpu']}, {protocol['threads']} threads; greedy answers of at most "
        f"{protocol['tokens']} tokens to chats of about 35 tokens through the `openai` package: {whole}. Medians; "
        f"speed of one chat after its first token, of {protocol['chats']} at once from asking to the last end. Gap: "
        "float32 logit of the likeliest token less that of the server's, where its answer leaves the one of float32."
    )


if __name__ == "__main__":
    sys.exit(main())
