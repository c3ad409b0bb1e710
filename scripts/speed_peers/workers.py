"""The benchmark's side of the contenders' processes: start one, ask it, stop it, and see who else was computing."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

# What the caller's shell sets would reach some contenders and not others, or overrule what a row is called after.
_NOT_PASSED_ON = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTHONPATH", "VIRTUAL_ENV")
_OVERRULING = ("HF_QUANT_KERNEL", "HF_QUANT_ACTIVATIONS")


class WorkerError(Exception):
    """Why a process gave no answer."""


class Worker:
    """A process that serves requests (see protocol.py); a context manager that ends it."""

    def __init__(self, python: Path, module: str, root: Path, threads: int, log: Path, **variables: str) -> None:
        """Start ``python -m module`` with ``threads`` threads; what it prints goes to the end of ``log``.

        Raises WorkerError when there is no such interpreter.
        """
        self.module = module
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [str(python), "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env=clean_environment(root, threads) | variables,
                    bufsize=0,
                )
        except OSError as error:
            raise WorkerError(str(error)) from error
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._rest = b""

    @property
    def _out(self) -> Any:
        return self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The reply to a request. Raises WorkerError when it says why it failed, dies, or takes longer (seconds)."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except BrokenPipeError as error:
            raise WorkerError(f"{self.module} ended with exit code {self._process.wait()}") from error
        reply = json.loads(self._line(do, time.monotonic() + timeout))
        if "failed" in reply:
            raise WorkerError(f"{do}: {reply['failed']}")
        return dict(reply)

    def _line(self, do: str, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                self.close()
                raise WorkerError(f"{do}: no answer in time, stopped")
            part = os.read(self._out.fileno(), 1 << 16)
            if not part:
                raise WorkerError(f"{do}: {self.module} ended with exit code {self._process.wait()}")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._selector.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def clean_environment(root: Path, threads: int) -> dict[str, str]:
    """The caller's variables without its thread settings, offline, with ``root`` to import from."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_PASSED_ON + _OVERRULING)}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": str(threads),
    }


class Quiet:
    """Cores that processes other than one were using meanwhile: ``with Quiet(pid) as quiet: ...``, ``quiet.others``.

    None where the system has no ``/proc``. The figure includes programs that the process ran and waited for as its own.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.others: float | None = None

    def __enter__(self) -> Quiet:
        self._before = _busy_seconds(), _own_seconds(self.pid), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        busy, own, start = self._before
        after, own_after = _busy_seconds(), _own_seconds(self.pid)
        if None not in (busy, own, after, own_after):
            passed = time.perf_counter() - start
            self.others = max(0.0, ((after - busy) - (own_after - own)) / passed)  # type: ignore[operator]


def _busy_seconds() -> float | None:
    """Processor seconds that the whole machine has spent since it started, idling and waiting not counted."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except FileNotFoundError:
        return None
    user, nice, system, _, _, irq, softirq = (int(part) for part in first.split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds(pid: int) -> float | None:
    """Processor seconds of a process, its threads and the children it waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return sum(int(part) for part in fields[11:15]) / os.sysconf("SC_CLK_TCK")
