"""Does a checkpoint answer a real OpenAI client through ``hf-quant serve``, streaming and in several chats at once?

    python scripts/serve_check.py OUT --chats 8 --tokens 64

Needs ``pip install "hf-quant[serving]"``. The server is started, asked and stopped.
Exit code 1 when an answer is not streamed to its end.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 300
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


@dataclass(frozen=True)
class Answer:
    """What came back for one chat.

    Attributes:
        text: of the whole answer.
        pieces: in how many parts it was streamed.
        tokens: that the server says it generated; None where it says nothing.
        finish: why it stopped: ``stop`` or ``length``.
        seconds: from asking to the end.
    """

    text: str
    pieces: int
    tokens: int | None
    finish: str | None
    seconds: float


@contextmanager
def serving(directory: str | os.PathLike[str], options: Sequence[str] = ()) -> Iterator[str]:
    """Inside, ``hf-quant serve DIRECTORY`` runs and answers at the address given.

    Raises:
        RuntimeError: it ended, or did not answer within START_SECONDS; with the end of what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_quant.cli", "serve", os.fspath(directory), "--host", "127.0.0.1"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port), *options], stdout=log, stderr=subprocess.STDOUT)
        try:
            _await(f"http://127.0.0.1:{port}/health", process, log)
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
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urlopen(address, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the server did not come up (exit code {process.poll()}):\n{log.read()[-4000:]}")


def ask(address: str, model: str, question: str, tokens: int) -> Answer:
    """One chat, streamed, with the likeliest token every time."""
    from openai import OpenAI

    started = time.perf_counter()
    text, pieces, count, finish = "", 0, None, None
    with OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0) as client:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            count = chunk.usage.completion_tokens if chunk.usage else count
            for choice in chunk.choices:
                text += choice.delta.content or ""
                pieces += bool(choice.delta.content)
                finish = choice.finish_reason or finish
    return Answer(text, pieces, count, finish, time.perf_counter() - started)


def ask_together(address: str, model: str, questions: Sequence[str], tokens: int) -> list[Answer]:
    """All chats at the same time."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(address, model, question, tokens), questions))


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a checkpoint with a chat template")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--blocks", type=int, default=64, help="of 256 tokens each, for keys and values")
    given = parser.parse_args()
    model = str(given.directory.resolve())
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(given.chats)]
    with serving(model, ["--continuous-batching", "--cb-num-blocks", str(given.blocks)]) as address:
        first = ask(address, model, questions[0], given.tokens)
        print(f"alone: {first.text!r} ({first.pieces} pieces, {first.finish}, {first.seconds:.1f} s)")
        started = time.perf_counter()
        answers = ask_together(address, model, questions, given.tokens)
        seconds = time.perf_counter() - started
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question} -> {answer.text!r} ({answer.finish})")
    broken = [answer for answer in [first, *answers] if answer.pieces < 2 or answer.finish not in ("stop", "length")]
    total = sum(answer.tokens or answer.pieces for answer in answers)
    print(f"{len(answers)} chats at once: {total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s in all")
    print(
        f"{len(broken)} answers were not streamed to their end" if broken else "all answers were streamed to their end"
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
