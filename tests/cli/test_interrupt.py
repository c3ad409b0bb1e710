"""Ctrl-C and kill, sent to real processes: the right exit code, and nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_quantize_leaves_nothing_behind(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    model = tiny_checkpoint("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    command = ["quantize", str(model), "-o", str(tmp_path / "deep" / "out"), "--preset", "fast"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_quant.cli", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stderr is not None
    shown = b""
    while b"Loading weights" not in shown and process.poll() is None:  # transformers' bar: the work has begun
        shown += process.stderr.read(64)
    assert process.poll() is None, shown.decode()
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, (shown + rest).decode()
    assert b"Traceback" not in shown + rest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_writing_leaves_nothing_behind(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Interrupted as soon as the first file appears in the unfinished directory beside the output."""
    model = tiny_checkpoint("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_quant.cli", "quantize", str(model), "-o", str(out), "--method", "absmax"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not list(tmp_path.glob(".*/*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert (process.returncode, left) in [(130, []), (0, ["out"])], errors.decode()
