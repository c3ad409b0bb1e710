"""The peers' rows: other quantizers on the same float model, calibration tokens and evaluator as hf-quant's own rows.

usage: python scripts/bench_peers.py --model DIR --envs DIR [--json FILE] [--only REGEX] [--samples N] [--threads N]

Every peer runs in a process of its own, in its own virtual environment under --envs (made on first use: pip, a C++
compiler and cmake for llama.cpp; pinned versions, the CPU build of torch first, so that no CUDA wheels come along).
All read the same token ids from one safetensors file: half documentation, half prose, from the part of the built-in
texts that no evaluation window is cut from; --tokens takes other ids. What a peer saved is loaded again by the peer's
own code, expanded to float32 and put into a copy of the float model, so that all rows are measured by the evaluator of
scripts/bench_accuracy.py on the same windows, and differ from the float model in the quantized layers only: embeddings
and head stay float everywhere.

Bits per weight are counted in the saved file: codes and scales (the zero points and group indices that symmetric GPTQ
files also hold are constants). Seconds are wall-clock time from loading the float model to the saved checkpoint, with
the time of quantizing alone in parentheses; imports and the expansion are not in it. Memory is the peak of the resident
set of the largest process. A peer that cannot be installed or fails is a row with the reason; exit code 3 then.
With --json, rows that the file has are not run again unless they failed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_answers,
    float_model,
    label_of,
    measure,
    publish,
    record,
    recorded,
)
from peer_environments import PeerError, checked, llama_cpp, make_environment  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import hf_quant
from hf_quant.evaluation import environment
from hf_quant.evaluation.divergence import Reference
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN, cut_windows, load_text

ROOT = Path(__file__).resolve().parents[1]
FAILED = 3  # exit code
MARKS = ("<!-- table:peers -->", "<!-- /table:peers -->")
# What each environment is made of, besides torch. GPTQModel 7.7 wants a newer torch.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "gptqmodel": ("gptqmodel==7.6.0", "transformers==5.23.0"),
    "autoround": ("auto-round==0.16.1", "transformers==5.23.0"),
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "llamacpp": ("transformers==5.23.0", "numpy", "safetensors", "sentencepiece", "PyYAML"),
}


@dataclass(frozen=True)
class Peer:
    """One row: ``module`` under scripts/peers with its options; no ``environment`` means this interpreter."""

    name: str
    layout: str
    module: str
    environment: str | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name} | {self.layout}"


def peers() -> list[Peer]:
    """All rows."""
    found = [Peer("GPTQModel", f"int4 sym g{group}", "gptqmodel", "gptqmodel", {"group": group}) for group in (64, 32)]
    found.append(Peer("AutoRound", "int4 sym g64, 50 steps", "autoround", "autoround", {"group": 64, "iters": 50}))
    found += [
        Peer("llm-compressor GPTQ", f"int4 sym g{group}", "llmcompressor", "llmcompressor", {"group": group})
        for group in (64, 32)
    ]
    found += [
        Peer("llama.cpp + imatrix", name, "llamacpp", "llamacpp", {"type": name})
        for name in ("Q4_0", "IQ4_NL", "Q4_K_M")
    ]
    found.append(Peer("bitsandbytes", "nf4 g64 dq", "bitsandbytes", None, {"double": True}))
    return found


def interpreter(peer: Peer, envs: Path) -> tuple[Path, dict[str, str]]:
    """The peer's Python and its extra environment variables; makes the environment on first use."""
    if peer.environment is None:
        return Path(sys.executable), {}
    python = make_environment(peer.environment, ENVIRONMENTS[peer.environment], envs)
    if peer.environment != "llamacpp":
        return python, {}
    return python, llama_cpp(envs / "llamacpp", python, ("llama-imatrix", "llama-quantize"))


def calibration(tokenizer: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    """Token ids int64 ``[samples, length]``: the built-in texts in equal parts, from their calibration part."""
    shares = [samples // len(BUILT_IN) + (number < samples % len(BUILT_IN)) for number in range(len(BUILT_IN))]
    parts = [
        cut_windows(load_text(name, "calibration"), tokenizer, share, length, seed).ids
        for name, share in zip(BUILT_IN, shares, strict=True)
    ]
    return torch.cat(parts)


def quantize(peer: Peer, model: Path, tokens: Path, folder: Path, envs: Path, threads: int) -> dict[str, Any]:
    """Run a peer; its dequantized checkpoint is ``folder/out`` afterwards. Returns the runner's report."""
    python, extra = interpreter(peer, envs)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        **extra,
    }
    # GPTQModel 7.6 sizes a thread pool by the machine's cores and refuses to start with fewer than four.
    env.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, threads)))
    work, report = folder / "work", folder / "report.json"
    work.mkdir(parents=True)
    arguments = {"model": model, "tokens": tokens, "work": work, "out": folder / "out", "report": report}
    command = [str(python), "-m", f"scripts.peers.{peer.module}"]
    command += [part for name, path in arguments.items() for part in (f"--{name}", str(path.absolute()))]
    command += ["--options", json.dumps(peer.options), "--threads", str(threads)]
    log = envs / f"{peer.module}-{'-'.join(str(value) for value in peer.options.values())}.log"
    checked(command, f"{peer.module} failed", env, log, work)  # some peers leave logs where they run
    figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return figures


def table(data: dict[str, Any]) -> list[str]:
    """Markdown of every row, failures included."""
    texts = data["texts"]
    header = ["peer", "version", "format", "bits per weight", *(f"KL {name}" for name in texts)]
    header += ["seconds (quantizing)", "threads", "peak memory"]
    body = []
    for row in data["rows"]:
        if "failed" in row:
            reason = row["failed"].replace("\n", " ")
            body.append([row["peer"], "", row["layout"], "", *("" for _ in texts), f"failed: {reason}", "", ""])
            continue
        kl = [f"{row['texts'][name]['kl']['value']:.3g}" for name in texts]
        seconds = f"{sum(row['seconds'].values()):.0f} ({row['seconds']['quantize']:.0f})"
        memory = f"{row['peak_bytes'] / 1e9:.2f} GB"
        bits = f"{row['bits_per_weight']:.2f}"
        body.append([row["peer"], row["version"], row["layout"], bits, *kl, seconds, str(row["threads"]), memory])
    return [*markdown_table(header, body), "", note(data)]


def note(data: dict[str, Any]) -> str:
    """What a reader needs to know to trust the table."""
    samples, length = data["calibration"]["shape"]
    return (
        f"{data['model']}; KL(float ‖ quantized) in nats per token on {' / '.join(data['texts'])}, {data['windows']} × "
        f"{data['length']} tokens each; calibrated on {samples} × {length} tokens "
        f"(sha256 {data['calibration']['sha256'][:12]}), the same for every peer (bitsandbytes uses none)."
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--label", help="how the table calls the model")
    parser.add_argument("--envs", type=Path, required=True, help="folder for the peers' environments and logs")
    parser.add_argument("--work", type=Path, help="folder for checkpoints while they are needed (default: temporary)")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--calibration-length", type=int, default=512, help="tokens in each")
    parser.add_argument("--tokens", type=Path, help="safetensors file with input_ids [samples, length] to calibrate on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="run only rows whose 'peer | format' matches this regex")
    parser.add_argument("--json", type=Path, help="write the figures here after every row, and go on from there")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    return parser.parse_args()


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every wanted row that the JSON file lacks."""
    model: Path = arguments.model
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = folder / "tokens.safetensors"
    if arguments.tokens:
        ids = load_file(arguments.tokens)["input_ids"].to(torch.int64)
    else:
        ids = calibration(tokenizer, arguments.samples, arguments.calibration_length, arguments.seed)
    save_file({"input_ids": ids.contiguous()}, tokens)
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    protocol = {
        "model": arguments.label,
        "texts": list(BUILT_IN),
        "windows": arguments.windows,
        "length": arguments.length,
        "seed": arguments.seed,
        "calibration": {"shape": list(ids.shape), "sha256": digest},
        "threads": arguments.threads,
    }
    done = recorded(arguments.json, protocol)
    wanted = [peer for peer in peers() if re.search(arguments.only, peer.key)]
    missing = [peer for peer in wanted if peer.key not in done or "failed" in done[peer.key]]
    data = {**protocol, "hf_quant": hf_quant.__version__, "environment": environment.describe().model_dump()}

    def collected() -> dict[str, Any]:
        order = [peer.key for peer in peers()]
        return {**data, "rows": sorted(done.values(), key=lambda row: order.index(row["key"]))}

    references: dict[str, Reference] = {}
    for number, peer in enumerate(missing, 1):
        print(f"{number}/{len(missing)} {peer.key}", file=sys.stderr, flush=True)
        place = folder / f"row-{number}"
        row: dict[str, Any] = {"key": peer.key, "peer": peer.name, "layout": peer.layout}
        try:
            row |= quantize(peer, model, tokens, place, arguments.envs.absolute(), arguments.threads)
            if not references:
                cuts = built_in_windows(tokenizer, arguments.windows, arguments.length, arguments.seed)
                references = float_answers(model, cuts)
            stream = LogitStream(float_model(place / "out"), peer.key)
            row["texts"] = measure(references, stream, arguments.seed)
        except PeerError as error:
            row["failed"] = str(error)
            print(f"  {error}", file=sys.stderr, flush=True)
        done[peer.key] = row
        shutil.rmtree(place, ignore_errors=True)
        gc.collect()
        record(arguments.json, collected())
    return collected()


def main() -> None:
    """Measure, print, write, and say which rows failed."""
    arguments = parse()
    transformers.logging.set_verbosity_error()
    arguments.label = arguments.label or label_of(arguments.model)
    arguments.model = arguments.model or default_model()
    torch.set_num_threads(arguments.threads)
    arguments.envs.mkdir(parents=True, exist_ok=True)
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-peers-", dir=arguments.work) as folder, quiet_loading():
        data = run(arguments, Path(folder))
    publish(table(data), arguments.markdown, arguments.fill, MARKS)
    failed = [row["key"] for row in data["rows"] if "failed" in row]
    print(f"\n{len(data['rows'])} rows in {time.perf_counter() - start:.0f} s" + (f"; FAILED: {failed}" * bool(failed)))
    sys.exit(FAILED if failed else 0)


if __name__ == "__main__":
    main()
