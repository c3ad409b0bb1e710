"""A server of scripts/servers/ started and stopped, and chats with it through the OpenAI client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

RECIPES = Path(__file__).parent / "servers"
START_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """What came back for one chat.

    Attributes:
        text: of the whole answer.
        pieces: in how many parts it was streamed.
        tokens: that the server says it generated; None where it says nothing.
        finish: why it stopped: ``stop`` or ``length``.
        first_seconds: from asking to the first part.
        seconds: from asking to the end.
    """

    text: str
    pieces: int
    tokens: int | None
    finish: str | None
    first_seconds: float
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether it was streamed, to its end."""
        return self.pieces > 1 and self.finish in ("stop", "length")


@contextmanager
def serving(
    recipe: str,
    model: str | os.PathLike[str],
    options: Sequence[str] = (),
    python: str | os.PathLike[str] = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Inside, ``bash scripts/servers/RECIPE.sh MODEL OPTIONS`` runs and answers at the address given.

    Raises:
        RuntimeError: it ended, or did not answer within START_SECONDS; with the end of what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["bash", str(RECIPES / f"{recipe}.sh"), os.fspath(model), "--host", "127.0.0.1", "--port", str(port)]
    variables = {**os.environ, "PYTHON": os.fspath(python), **(environment or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT, env=variables)
        try:
            _await(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(address: str, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        # llama-cpp-python has no /health; transformers' /v1/models fails where there is no Hub cache
        if any(_is_well(address + path) for path in ("/health", "/v1/models")):
            return
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the server did not come up (exit code {process.poll()}):\n{log.read()[-4000:]}")


def _is_well(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False


def ask(address: str, model: str, question: str, tokens: int, extra: Mapping[str, Any] | None = None) -> Answer:
    """One chat, streamed, with the likeliest token every time; ``extra`` fields of the request are the server's own."""
    from openai import OpenAI

    text, pieces, count, finish, first = "", 0, None, None, None
    with OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0) as client:
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        for chunk in stream:
            count = chunk.usage.completion_tokens if chunk.usage else count
            for choice in chunk.choices:
                piece = choice.delta.content or ""
                first = time.perf_counter() if piece and first is None else first
                text += piece
                pieces += bool(piece)
                finish = choice.finish_reason or finish
        ended = time.perf_counter()
    return Answer(text, pieces, count, finish, (first or ended) - started, ended - started)


def ask_together(
    address: str, model: str, questions: Sequence[str], tokens: int, extra: Mapping[str, Any] | None = None
) -> list[Answer]:
    """All chats at the same time."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(address, model, question, tokens, extra), questions))
