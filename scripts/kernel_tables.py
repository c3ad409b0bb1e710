"""Tables of scripts/bench_kernels.py: every contender of a cell, and a summary for the README."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """One contender in one cell; times in microseconds, None when it was too slow to run."""

    shape: tuple[int, int]
    rows: int
    dtype: str
    scheme: str
    contender: str
    note: str
    read_bytes: int
    calls: int
    median_us: float | None
    best_us: float | None
    speed: float | None

    @property
    def gigabytes(self) -> float | None:
        return None if self.median_us is None else self.read_bytes / self.median_us / 1e3


def show(timings: list[Timing], read: float, markdown: bool, console: Console) -> None:
    """Print one table."""
    head = ["shape", "rows", "dtype", "scheme", "contender", "median us", "best us", "x dense", "GB/s", "of bandwidth"]
    body = []
    for t in timings:
        rate = t.gigabytes
        body.append(
            [
                f"{t.shape[0]}x{t.shape[1]}",
                str(t.rows),
                t.dtype,
                t.scheme,
                t.contender,
                "too slow" if t.median_us is None else f"{t.median_us:.0f}",
                "" if t.best_us is None else f"{t.best_us:.0f}",
                "" if t.speed is None else f"{t.speed:.2f}",
                "" if rate is None else f"{rate:.1f}",
                "" if rate is None else f"{rate / read:.0%}",
            ]
        )
    if markdown:
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in body]
        print("\n".join(lines), flush=True)
        return
    table = Table(*head)
    for row in body:
        table.add_row(*row, end_section=row[4] == body[-1][4])
    console.print(table)


def summary(timings: list[Timing], read: float) -> list[str]:
    """Per scheme and rows: ours beside the best of everything else, in GB/s (one row) or against dense F.linear."""
    head = ["weights", "rows", "exact", "int8 activations", "best other (which)", "dense F.linear"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for scheme, rows in dict.fromkeys((t.scheme, t.rows) for t in timings):
        cells = {t.contender: t for t in timings if (t.scheme, t.rows) == (scheme, rows) and t.median_us}
        dense = cells.pop("dense F.linear")
        native = {"int8 activations" in name: t for name, t in cells.items() if name.startswith("kernel native")}
        others = [t for name, t in cells.items() if not name.startswith("kernel ") or name == "kernel bitsandbytes"]
        best = min(others, key=lambda t: t.median_us or 0.0)

        def text(timing: Timing | None, rows: int = rows) -> str:
            if timing is None:
                return ""
            if rows == 1:
                assert timing.gigabytes is not None
                return f"{timing.gigabytes:.1f} GB/s ({timing.gigabytes / read:.0%})"
            return f"{timing.speed:.2f} ×"

        other = f"{text(best)} ({best.contender})"
        lines.append(
            f"| {scheme} | {rows} | {text(native.get(False))} | {text(native.get(True))} | {other} | {text(dense)} |"
        )
    return lines
