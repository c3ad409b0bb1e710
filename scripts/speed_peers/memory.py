"""Serves the read bandwidth of this machine, from a process that waits between the contenders' turns."""

from __future__ import annotations

from typing import Any

import torch

from hf_quant.evaluation.machine import read_bandwidth
from scripts.speed_peers.protocol import serve


def measure(threads: int) -> dict[str, Any]:
    """GB/s of reading memory once with ``threads`` threads."""
    torch.set_num_threads(threads)
    return {"gigabytes_per_second": read_bandwidth()}


if __name__ == "__main__":
    serve({"measure": measure})
