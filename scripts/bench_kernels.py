"""Time every kernel beside dense F.linear, dequantize + F.linear and torch's own int4/int8 ops, on this machine's CPU.

usage: python scripts/bench_kernels.py [--shapes 2048x2048,576x576] [--rows 1,8,64,512] [--schemes int4-sym-g64,nf4-g64]
                                       [--dtypes bfloat16,float32] [--seconds 0.5] [--json FILE] [--markdown]
                                       [--fill README.md]
       python scripts/bench_kernels.py --crossover      (up to how many rows torch's ops win; sets the limits of `cpu`)

Every contender of a cell is called in turn, so that a busy machine is unfair to none. Each rotates over copies of its
weight that together exceed 256 MB, so that weights come from memory as they do in a model. Columns: median and best
time of a call, speed against dense F.linear, and GB/s of weight, scales and zeros read, beside the read bandwidth
measured in the same run. What is too slow to repeat (an op whose product would take more than --patience) is left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional

from hf_quant.evaluation.machine import read_bandwidth
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.kernels import cpu, int4pack, registry
from hf_quant.kernels.registry import FLOAT, INT8, LayerSpec
from hf_quant.tensor import QuantizedTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as `python scripts/bench_kernels.py`

from scripts.kernel_tables import Timing, show, summary
from scripts.measuring import fill_between

ROTATE_BYTES = 256 << 20
SCHEMES = "int4-sym-g64,int4-asym-g64,int8-sym-g64,int8-sym-channel,nf4-g64"
SHAPES = "576x576,2048x2048,8192x2048,2048x8192"
MARKS = ("<!-- table:kernels -->", "<!-- /table:kernels -->")
Call = Callable[[int], torch.Tensor]


@dataclass
class Contender:
    """One way to multiply; ``call(i)`` uses the i-th copy of the weight. Not ``patient``: checked before it is run."""

    name: str
    note: str
    read_bytes: int
    call: Call
    patient: bool = True


def parse_scheme(text: str) -> Scheme:
    """``int4-asym-g64``, ``int8-sym-channel``, ``nf4-g64``."""
    parts = text.split("-")
    group = PER_CHANNEL if parts[-1] == "channel" else int(parts[-1].removeprefix("g"))
    if parts[0] == "nf4":
        return Scheme("nf4", group_size=group)
    if parts[0] == "fp4":
        return Scheme("fp4", group_size=group)
    return Scheme("int", int(parts[0].removeprefix("int")), parts[1] == "sym", group)


def make(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> QuantizedTensor:
    """Random codes, scales of 0.01-0.02, zero points near the middle as real weights have."""
    out, columns = shape
    groups, middle = scheme.groups(columns), 1 << (scheme.bits - 1)
    codes = torch.randint(0, 1 << scheme.bits, shape, dtype=torch.uint8)
    scale = (torch.rand(out, groups) * 0.01 + 0.01).to(scale_dtype if scheme.grid == "int" else torch.float32)
    zero = None if scheme.symmetric else torch.randint(middle - 2, middle + 3, (out, groups), dtype=torch.uint8)
    return QuantizedTensor.from_codes(codes, scale, zero, scheme)


def copies(nbytes: int) -> int:
    """How many copies of a weight exceed the caches together."""
    return max(2, -(-ROTATE_BYTES // nbytes))


def contenders(tensor: QuantizedTensor, dtype: torch.dtype) -> Iterator[Callable[[torch.Tensor], Contender]]:
    """For each way to multiply, a function that makes it for given rows of x. Weights are copied once, here."""
    out, columns = tensor.shape
    spec = LayerSpec(tensor.scheme, out, columns, "cpu", dtype)
    weight = tensor.dequantize(dtype)
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    yield lambda x: Contender(
        "dense F.linear", "", weight.nbytes, lambda i: functional.linear(x, dense[i % len(dense)])
    )

    packed = [tensor.to("cpu") for _ in range(copies(tensor.nbytes))]
    packed = [replace(one, packed=one.packed.clone()) for one in packed]
    yield lambda x: Contender(
        "dequantize + F.linear",
        "QuantizedTensor.dequantize",
        tensor.nbytes,
        lambda i: functional.linear(x, packed[i % len(packed)].dequantize(dtype)),
    )

    op = torch_op(tensor, dtype)
    if op is not None:
        title, weights, product, nbytes = op
        yield lambda x: Contender(title, "", nbytes, lambda i: product(x, weights[i % len(weights)]), False)

    if (s8 := onednn_s8(tensor, dtype)) is not None:
        yield s8
    for name in registry.names():
        kernel = registry.get(name)
        if registry.refusal(kernel, spec) is None:
            yield kernel_contender(kernel, tensor, spec)
        rounded = replace(spec, activations=INT8)
        if INT8 in kernel.activation_modes and kernel.activations(rounded) == INT8:
            yield kernel_contender(kernel, tensor, rounded)


def kernel_contender(
    kernel: registry.Kernel, tensor: QuantizedTensor, spec: LayerSpec
) -> Callable[[torch.Tensor], Contender]:
    """A kernel of the registry, marked when automatic selection takes it."""
    first = kernel.prepare(tensor, spec)
    nbytes = first.weight.nbytes + sum(extra.nbytes for key, extra in first.extras.items() if key != "pairs")
    prepared = [first, *(kernel.prepare(tensor, spec) for _ in range(copies(first.weight.nbytes) - 1))]
    chosen = spec.activations == FLOAT and registry.select(spec).kernel is kernel
    rounded = f", {spec.activations} activations" if spec.activations != FLOAT else ""
    return lambda x: Contender(
        f"kernel {kernel.name}{rounded}{' (auto)' if chosen else ''}",
        kernel.describe(spec),
        nbytes,
        lambda i: kernel.linear(x, prepared[i % len(prepared)], spec),
    )


def onednn_s8(tensor: QuantizedTensor, dtype: torch.dtype) -> Callable[[torch.Tensor], Contender] | None:
    """oneDNN's int8 product with a prepacked weight, one scale per channel; x is rounded beforehand."""
    scheme, (out, columns) = tensor.scheme, tensor.shape
    if not (scheme.grid == "int" and scheme.bits == 8 and scheme.symmetric and scheme.group(columns) == columns):
        return None
    assert tensor.scale is not None
    ops, scale = torch.ops.onednn, tensor.scale.float().reshape(-1)
    weight, zeros = (tensor.packed ^ 128).view(torch.int8), torch.zeros(out, dtype=torch.int64)
    packed = [ops.qlinear_prepack(weight, None) for _ in range(copies(weight.nbytes))]

    def make(x: torch.Tensor) -> Contender:
        step = float(x.abs().max()) / 127
        codes = (x.float() / step).round().add(128).to(torch.uint8)

        def call(i: int) -> torch.Tensor:
            w = packed[i % len(packed)]
            y: torch.Tensor = ops.qlinear_pointwise(
                codes, step, 128, w, scale, zeros, None, 1.0, 0, dtype, "none", [], ""
            )
            return y

        return Contender("torch oneDNN s8", "x quantized beforehand", weight.nbytes + scale.nbytes, call)

    return make


def torch_op(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> tuple[str, list[torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor], int] | None:
    """torch's own product for this scheme, called bare: (name, rotating weights, product, bytes read)."""
    scheme, (out, columns) = tensor.scheme, tensor.shape
    if scheme.grid != "int" or tensor.scale is None:
        return None
    scale = tensor.scale.to(dtype)
    group = scheme.group(columns)
    if scheme.bits == 4 and group in (32, 64, 128, 256) and out % 16 == 0:
        zero = torch.zeros_like(scale) if tensor.zero_point is None else (8 - tensor.zero_point.to(dtype)) * scale
        both = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()
        one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.codes().to(torch.int32), 1)
        weights = [one.clone() for _ in range(copies(one.nbytes))]
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        return "torch int4pack", weights, lambda x, w: op(x, w, group, both), one.nbytes + both.nbytes
    if scheme.bits == 8 and scheme.symmetric and group == columns and columns % 16 == 0:
        one = (tensor.packed ^ 128).view(torch.int8)
        weights = [one.clone() for _ in range(copies(one.nbytes))]
        flat, op = scale.reshape(-1).contiguous(), torch.ops.aten._weight_int8pack_mm
        return "torch int8pack", weights, lambda x, w: op(x, w, flat), one.nbytes + flat.nbytes
    return None


def race(entries: list[Contender], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, contenders taking turns."""
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for entry in entries:
        entry.call(0)
    start, turn = time.perf_counter(), 1
    while turn <= 3 or (time.perf_counter() - start < seconds * len(entries) and turn < 1000):
        for entry in entries:
            before = time.perf_counter()
            entry.call(turn)
            times[entry.name].append(time.perf_counter() - before)
        turn += 1
    return times


def cell(
    makers: list[Callable[[torch.Tensor], Contender]],
    tensor: QuantizedTensor,
    rows: int,
    dtype: torch.dtype,
    seconds: float,
    patience: float,
) -> list[Timing]:
    """All contenders for one weight and one number of rows."""
    one_row = torch.randn(1, tensor.shape[1]).to(dtype)
    x = torch.randn(rows, tensor.shape[1]).to(dtype)
    entries, dropped = [], []
    for maker in makers:
        probe = maker(one_row)
        if not probe.patient:  # scalar code: time grows with the rows
            probe.call(0)
            before = time.perf_counter()
            probe.call(1)
            if (time.perf_counter() - before) * rows > patience:
                dropped.append(probe)
                continue
        entries.append(maker(x))
    with torch.inference_mode():
        times = race(entries, seconds)
    dense = statistics.median(times["dense F.linear"])

    def timing(entry: Contender, values: list[float]) -> Timing:
        median = statistics.median(values) if values else None
        return Timing(
            tensor.shape,
            rows,
            str(dtype).removeprefix("torch."),
            tensor.scheme.label,
            entry.name,
            entry.note or ("" if values else f"left out: {rows} rows would take more than {patience:g} s"),
            entry.read_bytes,
            len(values),
            None if median is None else median * 1e6,
            min(values) * 1e6 if values else None,
            None if median is None else dense / median,
        )

    return [timing(entry, times.get(entry.name, [])) for entry in entries + dropped]


@contextmanager
def row_limit(limit: int) -> Iterator[None]:
    """Make the cpu kernel use torch's ops up to ``limit`` rows."""
    names = ("INT4_ROWS", "INT8_ROWS", "NIBBLES_ROWS")
    before = [getattr(cpu, name) for name in names]
    try:
        for name in names:
            setattr(cpu, name, limit)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(cpu, name, value)


def crossover(shapes: list[tuple[int, int]], schemes: list[Scheme], seconds: float, console: Console) -> None:
    """Best times of the op and of the dequantized product in the layout of the op, for growing rows."""
    kernel = registry.get("cpu")
    for shape in shapes:
        for scheme in schemes:
            spec = LayerSpec(scheme, *shape, "cpu", torch.bfloat16)
            if shape[1] % spec.group or registry.refusal(kernel, spec) or "torch int" not in kernel.describe(spec):
                continue
            tensor = make(scheme, shape, torch.bfloat16)
            for rows in (1, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64):
                x = torch.randn(rows, shape[1]).to(torch.bfloat16)
                base = kernel_contender(kernel, tensor, spec)(x)

                def limited(limit: int, call: Call) -> Call:
                    def run(i: int) -> torch.Tensor:
                        with row_limit(limit):
                            return call(i)

                    return run

                entries = [
                    Contender("op", "", 0, limited(1 << 30, base.call)),
                    Contender("dequantized", "", 0, limited(0, base.call)),
                ]
                with torch.inference_mode():
                    times = race(entries, seconds)
                op, dequantized = (min(times[entry.name]) * 1e6 for entry in entries)
                winner = "op" if op < dequantized else "dequantized"
                console.print(
                    f"{shape[0]}x{shape[1]} {scheme.label}: {rows:3d} rows  op {op:8.0f} us  "
                    f"dequantized {dequantized:8.0f} us  {winner}"
                )


def machine() -> dict[str, object]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "int4_block": int4pack.block_rows() if int4pack.available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def main() -> int:
    """Parse, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="out x in, comma separated")
    parser.add_argument("--rows", default="1,4,8,64,512", help="rows of x, comma separated")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the activations")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender and cell")
    parser.add_argument("--patience", type=float, default=2.0, help="leave out ops whose call would take longer")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--json", type=Path, default=None, help="also write every figure here")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--fill", type=Path, help=f"write a summary between the {MARKS[0]} marks of this Markdown file")
    parser.add_argument("--crossover", action="store_true", help="find the row limits of the cpu kernel instead")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=150)
    shapes = [(int(out), int(columns)) for out, columns in (s.split("x") for s in arguments.shapes.split(","))]
    schemes = [parse_scheme(text) for text in arguments.schemes.split(",")]
    if arguments.crossover:
        crossover(shapes, schemes, arguments.seconds, console)
        return 0
    about, read = machine(), read_bandwidth()
    console.print(f"{about}, read bandwidth {read:.1f} GB/s")
    results: list[Timing] = []
    for shape in shapes:
        for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
            for scheme in schemes:
                if shape[1] % scheme.group(shape[1]):
                    console.print(f"{scheme.label} left out for {shape[0]}x{shape[1]}: the group does not divide rows.")
                    continue
                tensor = make(scheme, shape, dtype)
                makers = list(contenders(tensor, dtype))
                found = []
                for rows in (int(text) for text in arguments.rows.split(",")):
                    found += cell(makers, tensor, rows, dtype, arguments.seconds, arguments.patience)
                show(found, read, arguments.markdown, console)
                results += found
    if arguments.json:
        document = {"machine": about, "read_gb_per_s": read, "results": [asdict(t) for t in results]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.fill:
        where = ", ".join(f"{out} x {columns}" for out, columns in shapes)
        caption = (
            f"Weights {where}, {arguments.dtypes}, {about['cpu']}, {about['threads']} threads: medians; one row in "
            f"GB/s of weights, scales and zeros (share of the {read:.1f} GB/s at which memory was read before), more "
            "rows against dense F.linear of the same dtype in the same run."
        )
        fill_between(arguments.fill, [*summary(results, read), "", caption], MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
