"""Run once on a machine with a GPU: does every bitsandbytes op that we rely on do what we rely on, and how fast is it?

    python scripts/check_cuda.py [--json FILE] [--no-timings]

Prints one line per contract, each checked against float64 arithmetic over many shapes, groups and dtypes, then timings
beside bitsandbytes' own layers and bfloat16 matmuls. Exit status: 0 all hold, 1 something failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from hf_quant.checkpoint.atomic import atomic_write
from hf_quant.grids import DOUBLE_QUANT_BLOCK, PER_CHANNEL, GridName, Scheme, levels
from hf_quant.kernels import registry
from hf_quant.tensor import DoubleQuant, QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# ||y - y64|| / ||y64||. Half precision: the weight, each op's inner products and the output are rounded once each.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}
WIDTHS = (32, 2880, 4096)
BLOCKS = (32, 64, 128)
GROUPS = (*BLOCKS, PER_CHANNEL)
ROWS = (1, 2, 17, 128)
DEVICE = "cuda"
OUT = 260  # a multiple of 4, of no larger power of two
TABLES: tuple[GridName, ...] = ("nf4", "fp4")
KINDS = (
    *(Scheme(bits=bits, symmetric=symmetric) for bits in (4, 8) for symmetric in (True, False)),
    *(Scheme(grid, double_quant=nested) for grid in TABLES for nested in (False, True)),
)
TIMED_SCHEMES = (
    *(Scheme("nf4", group_size=64, double_quant=nested) for nested in (False, True)),
    *(Scheme(group_size=32, symmetric=symmetric) for symmetric in (True, False)),
    *(Scheme(bits=8, group_size=128, symmetric=symmetric) for symmetric in (True, False)),
)
TIMED_SHAPES = ((4096, 4096), (14336, 4096))
TIMED_ROWS = (1, 16, 512)
CACHE_BYTES = 200 << 20  # weights rotate over more than any L2 cache holds

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Contract:
    """One line of the report: a claim, and how it fared over its cases."""

    claim: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0
    limit: float = 0.0
    worst_case: str = ""

    @property
    def holds(self) -> bool:
        """No case failed, and there was one."""
        return self.cases > 0 and not self.failures

    def record(self, case: str, error: float, limit: float) -> None:
        """Count a case; ``error`` above ``limit`` (or NaN) fails it. The worst one is that nearest its limit."""
        self.cases += 1
        if not error <= limit:
            self.failures.append(f"{case}: {error:.3g} > {limit:.3g}")
        if not self.worst_case or not error * max(self.limit, 1e-30) <= self.worst * max(limit, 1e-30):
            self.worst, self.limit, self.worst_case = error, limit, case


def random_tensor(scheme: Scheme, out: int, columns: int, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Random codes, zero points and signed scales in canonical packing, on the GPU."""
    seeded = torch.Generator(DEVICE).manual_seed(1000 * columns + scheme.group(columns))
    groups = scheme.groups(columns)

    def integers(top: int, width: int) -> torch.Tensor:
        return torch.randint(0, top, (out, width), dtype=torch.uint8, generator=seeded, device=DEVICE)

    codes = integers(1 << scheme.bits, columns)
    zero = None if scheme.symmetric else integers(1 << scheme.bits, groups)
    if not scheme.double_quant:
        scale = torch.randn(out, groups, generator=seeded, device=DEVICE).mul_(0.02).to(scale_dtype)
        return QuantizedTensor.from_codes(codes, scale, zero, scheme)
    absmax = torch.rand(-(-out * groups // DOUBLE_QUANT_BLOCK), generator=seeded, device=DEVICE).mul_(0.02)
    table, offset = torch.linspace(-1, 1, 256, device=DEVICE), torch.tensor(0.003, device=DEVICE)
    return QuantizedTensor.from_codes(codes, DoubleQuant(integers(256, groups), absmax, offset, table), zero, scheme)


def exact(tensor: QuantizedTensor) -> torch.Tensor:
    """The weight ``[out, in]`` in float64."""
    wide = tensor.codes().double().view(tensor.shape[0], -1, tensor.scheme.group(tensor.shape[1]))
    if tensor.scheme.grid == "int":
        zero = tensor.scheme.implied_zero_point if tensor.zero_point is None else tensor.zero_point.double()[..., None]
        wide = wide - zero
    else:
        wide = levels(tensor.scheme.grid, DEVICE).double()[wide.long()]
    return (wide * tensor.scales().double()[..., None]).view(tensor.shape)


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with a mean, as activations have, so that zero-point corrections matter."""
    seeded = torch.Generator(DEVICE).manual_seed(rows + columns)
    return (torch.randn(rows, columns, generator=seeded, device=DEVICE) + 0.3).to(dtype)


def distance(y: torch.Tensor, y64: torch.Tensor) -> float:
    """Relative error; infinite when any element is far off, so that one wrong output among many cannot hide."""
    gap = (y.double() - y64).abs()
    scale = y64.norm() / max(y64.numel(), 1) ** 0.5
    if y64.numel() and not float(gap.max() / scale) < 0.1:
        return float("inf")
    return float(gap.norm() / y64.norm().clamp_min(1e-30))


def name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def check_ops() -> Iterator[Contract]:
    """bitsandbytes' ops called directly, from our canonical packing."""
    ops = torch.ops.bitsandbytes
    gemv = Contract("gemv_4bit reads a linear 16-entry table (1 row)")
    bytes8 = Contract("dequantize_blockwise, linear table: int8 exact")
    planes = Contract("dequantize_blockwise, two tables: packed int4 exact")
    kinds = [kind for kind in KINDS if kind.grid != "int"]
    tables = {kind: Contract(f"dequantize_4bit {kind.label.replace(' g32', '')}: exact") for kind in kinds}
    fused = {kind: Contract(f"gemm_4bit {kind.label.replace(' g32', '')}") for kind in kinds}
    byte = torch.arange(256, device=DEVICE)
    high, low, whole = (t.float() for t in ((byte >> 4) - 8, (byte & 15) - 8, byte - 128))
    for columns, block, dtype in [(k, b, d) for k in WIDTHS for b in BLOCKS if k % b == 0 for d in DTYPES]:
        case = f"K={columns} block={block} {name(dtype)}"
        four = random_tensor(Scheme(group_size=block), OUT, columns, torch.float32)
        swapped = (four.packed << 4) | (four.packed >> 4)
        x = activations(1, columns, dtype)
        y = ops.gemv_4bit(x, swapped, four.shape, four.scales(), (byte[:16] - 8).float(), block)
        gemv.record(case, distance(y, x.double() @ exact(four).t()), TOLERANCE[dtype])
        even, odd = (ops.dequantize_blockwise(swapped, four.scales(), t, block // 2, dtype) for t in (high, low))
        merged = torch.stack((even, odd), -1).view(four.shape)
        planes.record(case, float((merged != four.dequantize(dtype)).sum()), 0)
        eight = random_tensor(Scheme(bits=8, group_size=block), OUT, columns, torch.float32)
        got = ops.dequantize_blockwise(eight.packed, eight.scales(), whole, block, dtype)
        bytes8.record(case, float((got != eight.dequantize(dtype)).sum()), 0)
        for kind in kinds:
            tensor = random_tensor(replace(kind, group_size=block), OUT, columns, torch.float32)
            flat = ((tensor.packed << 4) | (tensor.packed >> 4)).view(-1, 1)
            got = ops.dequantize_4bit(flat, tensor.scales().view(-1), block, kind.grid, tensor.shape, dtype)
            tables[kind].record(case, float((got != tensor.dequantize(dtype)).sum()), 0)
            inner = tensor.nested
            absmax = tensor.scales().view(-1) if inner is None else inner.absmax
            extra = (None, None, None) if inner is None else (inner.codes.view(-1), inner.table, inner.offset)
            for rows in ROWS:
                x = activations(rows, columns, dtype)
                y = ops.gemm_4bit(x, flat, tensor.shape, absmax, block, kind.grid, None, *extra)
                fused[kind].record(f"{case} M={rows}", distance(y, x.double() @ exact(tensor).t()), TOLERANCE[dtype])
    yield from (gemv, planes, bytes8, *tables.values(), *fused.values())


def check_kernels() -> Iterator[Contract]:
    """Every scheme through our kernels: product, weight, saved codes; layers that they refuse must be refused."""
    kernels = [registry.get(kernel) for kernel in ("bitsandbytes", "reference")]
    refusals = Contract("kernel bitsandbytes refuses what it cannot hold, with a reason")
    for kind in KINDS:
        label = kind.label.replace(" g32", "")
        contracts = {kernel.name: Contract(f"kernel {kernel.name}: {label}") for kernel in kernels}
        layers = [(replace(kind, group_size=group), k, d) for group in GROUPS for k in WIDTHS for d in DTYPES]
        for scheme, columns, dtype in [layer for layer in layers if layer[1] % layer[0].group(layer[1]) == 0]:
            spec = registry.LayerSpec(scheme, OUT, columns, DEVICE, dtype)
            tensor = random_tensor(scheme, OUT, columns, dtype if scheme.grid == "int" else torch.float32)
            weight, bias = exact(tensor), activations(1, OUT, dtype)[0]
            for kernel in kernels:
                contract, case = contracts[kernel.name], f"K={columns} group={scheme.group_size} {name(dtype)}"
                why_not = registry.refusal(kernel, spec)
                if why_not is not None:
                    contract.record(f"{case} refused: {why_not}", float("inf"), 0)
                    continue
                prepared = kernel.prepare(tensor, spec)
                contract.record(f"{case} codes", float((kernel.restore(prepared, spec) != tensor.packed).sum()), 0)
                unequal = kernel.dequantize(prepared, spec, dtype) != tensor.dequantize(dtype)
                contract.record(f"{case} weight", float(unequal.sum()), 0)
                for rows in ROWS:
                    x = activations(rows, columns, dtype)
                    y64 = x.double() @ weight.t() + bias.double()
                    error = distance(kernel.linear(x, prepared, spec, bias), y64)
                    contract.record(f"{case} M={rows}", error, TOLERANCE[dtype])
        yield from contracts.values()
    odd = [(Scheme(group_size=48), 576), (Scheme("nf4", group_size=16), 64), (Scheme(bits=8, group_size=72), 576)]
    odd += [(replace(kind, group_size=block), k) for kind in KINDS for block in BLOCKS for k in WIDTHS if k % block]
    for scheme, columns in odd:
        spec = registry.LayerSpec(scheme, OUT, columns, DEVICE, torch.bfloat16)
        refusals.record(f"{scheme.label} K={columns}", float(kernels[0].unsupported(spec) is None), 0)
    yield refusals


def check_behaviour() -> Iterator[Contract]:
    """Odd inputs, gradients, compilation and graph capture, for one scheme of each kind."""
    strided = Contract("strided, misaligned, 3-d and empty inputs; out_features not a multiple of 4")
    gradient = Contract("gradients reach x and bias")
    compiled = Contract("torch.compile in one graph equals eager")
    captured = Contract("CUDA graph capture replays the same numbers")
    kernel = registry.get("bitsandbytes")
    dtype, columns, limit = torch.bfloat16, 2880, TOLERANCE[torch.bfloat16]
    for scheme in [replace(kind, group_size=64) for kind in KINDS]:
        for out in (OUT, OUT + 1):
            tensor = random_tensor(scheme, out, columns, torch.float32)
            weight, spec = exact(tensor), registry.LayerSpec(scheme, out, columns, DEVICE, dtype)
            prepared = kernel.prepare(tensor, spec)
            wide = activations(6, 3 * columns, dtype)
            inputs = {"every third column": wide[:, ::3], "transposed": activations(columns, 5, dtype).t()}
            inputs |= {"slice": wide[:, 5 : 5 + columns], "one misaligned row": wide[:1, 3 : 3 + columns]}
            inputs |= {"3-d": wide.view(2, 9, columns), "vector": wide[0, :columns], "empty": wide[:0, :columns]}
            for case, x in inputs.items():
                y = kernel.linear(x, prepared, spec)
                right_shape = y.shape == (*x.shape[:-1], out) and y.dtype == dtype
                error = distance(y, x.double() @ weight.t()) if right_shape else float("inf")
                strided.record(f"{scheme.label} out={out} {case}", error, limit)
            if out != OUT:
                continue
            for rows in (1, 17):
                case = f"{scheme.label} M={rows}"
                x = activations(rows, columns, dtype).requires_grad_()
                bias = torch.randn(out, device=DEVICE, dtype=dtype).requires_grad_()
                upstream = torch.randn(rows, out, device=DEVICE, dtype=dtype)
                kernel.linear(x, prepared, spec, bias).backward(upstream)
                if x.grad is None or bias.grad is None:
                    gradient.record(case, float("inf"), limit)
                else:
                    gradient.record(case, distance(x.grad, upstream.double() @ weight), limit)
                    gradient.record(f"{case} bias", distance(bias.grad, upstream.double().sum(0)), limit)
                still = x.detach()
                plain = kernel.linear(still, prepared, spec)
                torch.compiler.reset()  # one scheme after another would count as recompilations
                run = torch.compile(partial(product, kernel, prepared, spec), fullgraph=True, backend="aot_eager")
                compiled.record(case, distance(run(still), plain.double()), limit)
                graph, outputs = capture([partial(product, kernel, prepared, spec, still)])
                graph.replay()
                captured.record(case, distance(outputs[0], plain.double()), limit)
    yield from (strided, gradient, compiled, captured)


def product(
    kernel: registry.Kernel, prepared: registry.Prepared, spec: registry.LayerSpec, x: torch.Tensor
) -> torch.Tensor:
    """The product with x as the last argument."""
    return kernel.linear(x, prepared, spec)


def capture(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A CUDA graph of all calls, warmed up first, and its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_all(calls)
        run_all(calls)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run_all(calls)
    return graph, outputs


def run_all(calls: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """Launch every call in order."""
    return [call() for call in calls]


def median_us(run: Callable[[], Any], calls: int, repeats: int = 15) -> float:
    """Median of CUDA-event timings of ``run``, in microseconds per call."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[3:])


def timed_layers(out: int, columns: int) -> dict[str, tuple[float, Callable[[], Forward]]]:
    """What is timed: label -> bits per weight, and a maker of one more layer."""
    import bitsandbytes as bnb

    def dense() -> Forward:
        return partial(functional.linear, weight=torch.randn(out, columns, device=DEVICE, dtype=torch.bfloat16))

    def theirs(nested: bool) -> Forward:
        layer = bnb.nn.Linear4bit(
            columns, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4"
        )
        forward: Forward = layer.to(DEVICE).requires_grad_(False)
        return forward

    def ours(scheme: Scheme, kernel_name: str) -> Forward:
        tensor = random_tensor(scheme, out, columns, torch.bfloat16 if scheme.grid == "int" else torch.float32)
        spec = registry.LayerSpec(scheme, out, columns, DEVICE, torch.bfloat16)
        kernel = registry.get(kernel_name)
        return partial(product, kernel, kernel.prepare(tensor, spec), spec)

    layers: dict[str, tuple[float, Callable[[], Forward]]] = {"bf16 F.linear": (16, dense)}
    for nested in (False, True):
        layers[f"bitsandbytes Linear4bit nf4 g64{' dq' if nested else ''}"] = (4, partial(theirs, nested))
    for scheme in TIMED_SCHEMES:
        layers[f"ours {scheme.label}"] = (scheme.bits, partial(ours, scheme, "bitsandbytes"))
    layers[f"reference {Scheme().label}"] = (4, partial(ours, Scheme(), "reference"))
    return layers


@torch.inference_mode()
def time_layers() -> list[dict[str, Any]]:
    """Microseconds per product: on the GPU alone (graph replay) and as eager PyTorch launches it."""
    results: list[dict[str, Any]] = []
    for out, columns in TIMED_SHAPES:
        for label, (bits, make) in timed_layers(out, columns).items():
            layers = [make() for _ in range(1 + int(CACHE_BYTES * 8 / (bits * out * columns)))]
            for rows in TIMED_ROWS:
                x = activations(rows, columns, torch.bfloat16)
                calls = [partial(layer, x) for layer in layers]
                graph, _ = capture(calls)
                times = {"gpu_us": median_us(graph.replay, len(calls))}
                times["eager_us"] = median_us(partial(run_all, calls), len(calls))
                results.append({"shape": [out, columns], "rows": rows, "layer": label, **times})
                del graph
            del layers, calls
            torch.cuda.empty_cache()
    return results


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    versions = {package: version(package) for package in ("torch", "bitsandbytes")}
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), **versions}


def show(console: Console, contracts: list[Contract], timings: list[dict[str, Any]]) -> None:
    """Two tables."""
    table = Table("", "contract", "cases", "failed", "worst error", "limit", "worst case", title="Contracts")
    for contract in contracts:
        mark = "[green]pass[/green]" if contract.holds else "[red]FAIL[/red]"
        numbers = (str(contract.cases), str(len(contract.failures)), f"{contract.worst:.2g}", f"{contract.limit:.2g}")
        table.add_row(mark, contract.claim, *numbers, contract.worst_case)
    console.print(table)
    for contract in contracts:
        for failure in contract.failures[:5]:
            console.print(f"FAIL {contract.claim}: {failure}", style="red", highlight=False)
    if not timings:
        return
    header = [f"{out}x{columns} M={rows}" for out, columns in TIMED_SHAPES for rows in TIMED_ROWS]
    table = Table("layer", *header, title="Microseconds: GPU alone / eager")
    for label in dict.fromkeys(result["layer"] for result in timings):
        cells = [f"{r['gpu_us']:.1f} / {r['eager_us']:.1f}" for r in timings if r["layer"] == label]
        table.add_row(label, *cells)
    console.print(table)


def main() -> int:
    """Check, time, show; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--no-timings", action="store_true", help="check the contracts only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU that this torch can use: nothing was checked.", file=sys.stderr)
        return 2
    why_not = registry.get("bitsandbytes").unavailable()
    if why_not is not None:
        print(f"The kernel bitsandbytes cannot run here: {why_not}.", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(" · ".join(f"{key} {value}" for key, value in machine().items()))
    contracts = [contract for check in (check_ops, check_kernels, check_behaviour) for contract in check()]
    timings = [] if arguments.no_timings else time_layers()
    show(console, contracts, timings)
    failed = sum(not contract.holds for contract in contracts)
    cases = sum(contract.cases for contract in contracts)
    console.print(f"{len(contracts) - failed} of {len(contracts)} contracts hold ({cases} cases).")
    if arguments.json is not None:
        report = {"machine": machine(), "contracts": [asdict(contract) for contract in contracts], "timings": timings}
        atomic_write(arguments.json, json.dumps(report, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
