"""Peak anonymous memory and time of quantize-on-load, against the quantized model's bytes plus the interpreter.

usage: python scripts/bench_memory.py MODEL_DIR [--bits 4] [--grid int] [--json FILE]       (Linux: reads /proc)

The load runs in a child process. This process samples the child's RssAnon: file pages of the mapped checkpoint are not
counted, because the kernel drops them when it needs the room. Three figures matter: ``baseline`` (the child with torch,
transformers and hf_quant imported), ``peak``, and ``model`` (bytes of all parameters and buffers afterwards). Bars:
(peak - baseline) / model <= 1.25, and 90 s. Exit code 1 when one of them is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RATIO_BAR = 1.25
SECONDS_BAR = 90.0
SAMPLE_SECONDS = 0.005

CHILD = """
import gc, json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
import hf_quant
from hf_quant import HfQuantConfig
path, settings = sys.argv[1], json.loads(sys.argv[2])
config = HfQuantConfig(**settings)
torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))  # the pools that any first use allocates
gc.collect()
print("ready", flush=True)
sys.stdin.readline()
start, used = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
seconds, used = time.perf_counter() - start, time.process_time() - used
storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())}
print(json.dumps({"seconds": seconds, "processor_seconds": used, "model_bytes": sum(storages.values()),
                  "quantized_layers": sum(type(m).__name__ == "QuantLinear" for m in model.modules())}), flush=True)
sys.stdin.readline()
"""


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def measure(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the child and sample it; figures in bytes and seconds."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        return {**_watch(child), "ratio_bar": RATIO_BAR, "seconds_bar": SECONDS_BAR, "config": settings}
    finally:
        child.kill()
        child.wait()


def _watch(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdin and child.stdout
    if child.stdout.readline().strip() != "ready":
        sys.exit("the child process failed before loading (see above)")
    time.sleep(0.2)
    baseline = anonymous_bytes(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)
    peak = 0
    while not selector.select(timeout=SAMPLE_SECONDS):
        peak = max(peak, anonymous_bytes(child.pid))
    line = child.stdout.readline()
    if not line:
        sys.exit("the child process failed while loading (see above)")
    after = anonymous_bytes(child.pid)
    result = json.loads(line)
    peak = max(peak, after)
    return {
        **result,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "after_bytes": after,
        "ratio": (peak - baseline) / result["model_bytes"],
    }


def main() -> None:
    """Measure, print, compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--grid", default="int")
    parser.add_argument("--method", default="search")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"bits": arguments.bits, "grid": arguments.grid, "method": arguments.method}
    if arguments.asymmetric:
        settings["symmetric"] = False
    figures = measure(arguments.model, settings)
    for key in ("baseline_bytes", "model_bytes", "peak_bytes", "after_bytes"):
        print(f"{key:16} {figures[key] / 1e6:10.1f} MB")
    good = figures["ratio"] <= RATIO_BAR and figures["seconds"] <= SECONDS_BAR
    print(f"(peak - baseline) / model  {figures['ratio']:.3f}   bar {RATIO_BAR}")
    print(f"seconds                    {figures['seconds']:.1f}    bar {SECONDS_BAR:.0f}")
    print(f"processor seconds          {figures['processor_seconds']:.1f}    (all threads; tells a busy machine apart)")
    print(f"{figures['quantized_layers']} quantized layers; {'PASS' if good else 'FAIL'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
