"""Tokens per second of generation: hf-quant beside transformers bf16, bitsandbytes, llama.cpp and OpenVINO GenAI.

usage: python scripts/bench_generate.py --envs DIR [--model DIR] [--json FILE] [--fill README.md] [--plot FILE.png]
                                        [--only REGEX] [--all] [--repeats 5] [--threads N] [--prefill 512] [--render]

Measured: decoding after a prompt of 16 tokens, 1 and 8 sequences at once (total), prefill of 512 tokens, and what a
fresh process needs from a saved int4 checkpoint to its first token beside the time to read the same bytes. Every
contender has a process of its own with the same number of threads; all stay loaded, and in every round each of them in
turn takes each measurement while the others wait, after one round to warm up. Medians over the rounds, with the lowest
and the highest; ratios are medians of the ratios within a round. GB/s are the bytes of weights that a token reads
(codes, scales, norms, head; an input embedding only when it is the head too) times tokens per second, beside the read
bandwidth measured in the same rounds. `others` in the JSON file is how many cores were busy with something else.

All models are in memory at once: with --all, a 1.24B one needs more than 24 GB, so run --only in turns there.

Environments are made under --envs on first use with pinned versions, as for scripts/bench_peers.py (llama.cpp: a C++
compiler, cmake and 20 minutes). llama.cpp is built with its defaults for this machine. On a CPU with AMX, gcc 12
miscompiles its tile configuration and it crashes: its rows then say so, and another compiler (CC, CXX) is needed.
hf-quant's rows quantize on load without data: their speed does not depend on the scales.

A contender that is not installed or fails is a row with the reason; exit code 3 then. With --json, a run goes on where
the file ends: rows that failed or lack rounds are measured, in rounds of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import default_model, fill_between, label_of  # type: ignore[import-not-found]
from peer_environments import PeerError, llama_cpp, make_environment  # type: ignore[import-not-found]
from rich.console import Console
from speed_peers import report  # type: ignore[import-not-found]
from speed_peers.contenders import ENVIRONMENTS, OURS, Contender, contenders  # type: ignore[import-not-found]
from speed_peers.workers import Quiet, Worker, WorkerError  # type: ignore[import-not-found]

from hf_quant.checkpoint import atomic_write
from hf_quant.evaluation import environment

ROOT = Path(__file__).resolve().parents[1]
FAILED = 3  # exit code
PROMPT = 16
REST_SECONDS = 0.5  # between turns: thread pools spin for up to 0.2 s after their last task
HOURS = 3 * 3600.0
LLAMA_PROGRAMS = ("llama-quantize", "llama-bench", "llama-batched-bench")


class Field:
    """The processes of one run: makes environments and converted models, keeps one worker per contender."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.envs: Path = arguments.envs.absolute()
        self.work: Path = arguments.work.absolute() if arguments.work else self.envs / "converted" / arguments.label
        self.work.mkdir(parents=True, exist_ok=True)

    def start(self, who: Contender, name: str = "") -> Worker:
        """A process for a contender. Raises PeerError when its environment cannot be made."""
        python, variables = self._interpreter(who.environment)
        log = self.envs / "logs" / f"{name or re.sub(r'[^a-zA-Z0-9]+', '-', who.key)}.log"
        log.parent.mkdir(exist_ok=True)
        module = f"scripts.speed_peers.{who.module}"
        return Worker(python, module, ROOT, self.arguments.threads, log, **variables)

    def _interpreter(self, name: str | None) -> tuple[Path, dict[str, str]]:
        if name is None:
            return Path(sys.executable), {}
        python = make_environment(name, ENVIRONMENTS[name], self.envs)
        return python, llama_cpp(self.envs / name, python, LLAMA_PROGRAMS) if name == "llamacpp" else {}

    def load(self, who: Contender, worker: Worker) -> dict[str, Any]:
        """Have the contender load the model, converted to its own format first where it has one."""
        model, threads, options = str(self.arguments.model.absolute()), self.arguments.threads, who.options
        if who.module in ("llamacpp", "genai"):
            name = "-".join(str(part) for part in (who.module, *options.values()))
            with self.converted(name) as (target, missing):
                if missing:
                    worker.ask("convert", HOURS, model=model, target=str(target), options=options, threads=threads)
            model = str(target)
        return dict(worker.ask("load", self.arguments.patience, model=model, threads=threads, options=options))

    @contextmanager
    def converted(self, name: str) -> Iterator[tuple[Path, bool]]:
        """Where a converted model lies, and whether it has yet to be made, because it is absent or of other weights."""
        target, stamp = self.work / name, self.work / f"{name}.json"
        files = sorted(self.arguments.model.glob("*.safetensors"))
        source = json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
        missing = not (target.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == source)
        if missing:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
        yield target, missing
        stamp.write_text(source, encoding="utf-8")


def tasks(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The measurements by name: what to ask for."""
    found: dict[str, dict[str, Any]] = {
        f"decode {sequences}": {
            "do": "decode",
            "sequences": sequences,
            "prompt": PROMPT,
            "tokens": arguments.tokens if sequences == 1 else arguments.batch_tokens,
        }
        for sequences in arguments.sequences
    }
    return found | {f"prefill {tokens}": {"do": "prefill", "tokens": tokens} for tokens in arguments.prefill}


def race(
    field: Field, wanted: list[Contender], data: dict[str, Any], bandwidth: Worker, stack: ExitStack
) -> Iterator[None]:
    """Load the contenders that lack rounds, and take rounds until none lacks any; yields whenever ``data`` changed."""
    arguments = field.arguments
    todo = tasks(arguments)
    rows: dict[str, dict[str, Any]] = data["rows"]
    running: dict[str, tuple[Contender, Worker]] = {}

    def lacks(key: str, task: str) -> bool:
        return len(rows[key]["samples"].get(task, [])) < arguments.repeats

    def fail(who: Contender, error: Exception) -> None:
        rows[who.key]["failed"] = str(error)
        print(f"  {who.key}: {error}", file=sys.stderr, flush=True)
        if who.key in running:
            running.pop(who.key)[1].close()

    def turn(who: Contender, worker: Worker, task: str) -> dict[str, Any]:
        time.sleep(REST_SECONDS)
        with Quiet(worker.pid) as quiet:
            figures = worker.ask(timeout=arguments.patience, **todo[task])
        speed = figures["tokens"] / figures["seconds"]
        others = None if quiet.others is None else round(quiet.others, 2)
        return {"run": data["runs"], "round": number, "tokens_per_second": speed, "others": others}

    for who in wanted:
        row = rows.setdefault(who.key, {"name": who.name, "layout": who.layout, "samples": {}})
        if "failed" not in row and not any(lacks(who.key, task) for task in todo):
            continue
        row.pop("failed", None)
        print(f"loading {who.key}", file=sys.stderr, flush=True)
        try:
            worker = stack.enter_context(field.start(who))
            running[who.key] = who, worker
            row |= field.load(who, worker)
        except (PeerError, WorkerError) as error:
            fail(who, error)
        yield
    data["runs"] += bool(running)
    for number in range(arguments.repeats + 1):  # the first to warm up
        if not any(lacks(key, task) for key in running for task in todo):
            return
        print(f"round {number} of {arguments.repeats}", file=sys.stderr, flush=True)
        if number:
            time.sleep(REST_SECONDS)
            answer = bandwidth.ask("measure", arguments.patience, threads=arguments.threads)
            data["bandwidth"].append(answer["gigabytes_per_second"])
        for task in todo:
            for who, worker in list(running.values()):
                if not lacks(who.key, task) or (number == 0 and who.module == "llamacpp"):  # it warms up by itself
                    continue
                try:
                    sample = turn(who, worker, task)
                except WorkerError as error:
                    fail(who, error)
                    continue
                if number:
                    rows[who.key]["samples"].setdefault(task, []).append(sample)
            yield
        if not number:
            for who, worker in list(running.values()):
                if who.name == OURS:  # which of our kernels ran, known once they did
                    rows[who.key] |= worker.ask("kernels", arguments.patience)


def first_tokens(field: Field, data: dict[str, Any]) -> None:
    """Fresh processes that read a saved int4 checkpoint, and that load it and generate a token, in turns."""
    arguments = field.arguments
    who = contenders(arguments.group_size)[0]
    with field.converted("hf-quant-int4") as (directory, missing):
        if missing:
            with field.start(who, "save") as worker:
                field.load(who, worker)
                worker.ask("save", arguments.patience, directory=str(directory))
    module = model_module(arguments.model)
    for number in range(arguments.repeats):
        for cold in (True, False):
            pair: dict[str, Any] = {"cold": cold}
            for do, more in (("read", {}), ("first_token", {"prompt": PROMPT})):
                with field.start(who, "first-token") as worker:
                    worker.ask("prepare", arguments.patience, threads=arguments.threads, module=module)
                    time.sleep(REST_SECONDS)
                    pair[do] = worker.ask(do, arguments.patience, directory=str(directory), cold=cold, **more)
            data["first_token"].append(pair)
        print(f"first token {number + 1} of {arguments.repeats}", file=sys.stderr, flush=True)


def model_module(model: Path) -> str:
    """The module of transformers with the model's class, which is imported before the clock runs."""
    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    return f"transformers.models.{kind}.modeling_{kind}"


def run(arguments: argparse.Namespace, wanted: list[Contender], data: dict[str, Any]) -> None:
    """Measure what ``data`` lacks; the file is written whenever it grows."""

    def save() -> None:
        if arguments.json:
            atomic_write(arguments.json, json.dumps(data, indent=1) + "\n")

    field = Field(arguments)
    with ExitStack() as stack:
        memory = stack.enter_context(field.start(Contender("memory", "", "memory")))
        for _ in race(field, wanted, data, memory, stack):
            save()
    if not arguments.no_first_token and len(data["first_token"]) < 2 * arguments.repeats:
        data["first_token"] = []
        try:
            first_tokens(field, data)
            data.pop("first_token_failed", None)
        except (PeerError, WorkerError) as error:
            data["first_token_failed"] = str(error)
            print(f"  first token: {error}", file=sys.stderr, flush=True)
    save()


def opened(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures so far: those of the JSON file, or none. Exits when the file has another protocol."""
    protocol = {
        "model": arguments.label,
        "threads": arguments.threads,
        "prompt": PROMPT,
        "tokens": arguments.tokens,
        "batch_tokens": arguments.batch_tokens,
        "group_size": arguments.group_size,
    }
    fresh = {"runs": 0, "rows": {}, "bandwidth": [], "first_token": []}
    if not (arguments.json and arguments.json.is_file()):
        return {**protocol, "environment": environment.describe().model_dump(), **fresh}
    data: dict[str, Any] = json.loads(arguments.json.read_text(encoding="utf-8"))
    if {key: data.get(key) for key in protocol} != protocol:
        sys.exit(f"{arguments.json} holds figures of another protocol: remove it or name another file")
    return data


def parse() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--label", help="how the table calls the model")
    parser.add_argument("--envs", type=Path, required=True, help="folder for environments, logs and converted models")
    parser.add_argument("--work", type=Path, help="folder for converted models (default: under --envs)")
    parser.add_argument("--only", help="measure only rows whose 'runtime | layout' matches this regex")
    parser.add_argument("--again", help="forget what --json has of the rows that match this regex, as after a change")
    parser.add_argument("--all", action="store_true", help="also float32, compiled rows, our other grids, torchao")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up")
    parser.add_argument("--tokens", type=int, default=64, help="timed steps of one sequence")
    parser.add_argument("--batch-tokens", type=int, default=32, help="timed steps of several sequences")
    parser.add_argument("--sequences", type=numbers, default=[1, 8], help="decoded at once, comma separated")
    parser.add_argument("--prefill", type=numbers, default=[512], help="prompt lengths, comma separated")
    parser.add_argument("--group-size", type=int, default=64, help="of our int4 rows (OpenVINO's int4 has the same)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--patience", type=float, default=900.0, help="seconds after which a measurement is given up")
    parser.add_argument("--no-first-token", action="store_true", help="leave out loading a saved checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures here, and go on from there")
    parser.add_argument("--render", action="store_true", help="measure nothing: print and draw what --json holds")
    parser.add_argument(
        "--fill", type=Path, help="write the tables between <!-- table:generate-LABEL --> marks of this"
    )
    parser.add_argument("--plot", type=Path, help="draw the bars into this file (.png or .svg)")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write, draw, and say which rows failed."""
    arguments = parse()
    arguments.label = arguments.label or label_of(arguments.model)
    arguments.envs.mkdir(parents=True, exist_ok=True)
    data = opened(arguments)
    start = time.perf_counter()
    everyone = contenders(arguments.group_size)
    if arguments.again is not None:
        data["rows"] = {key: row for key, row in data["rows"].items() if not re.search(arguments.again, key)}
    if not arguments.render:
        arguments.model = arguments.model or default_model()
        wanted = [who for who in everyone if (arguments.all or not who.extra) and arguments.only is None]
        wanted += [who for who in everyone if arguments.only is not None and re.search(arguments.only, who.key)]
        run(arguments, wanted, data)
    order = [who.key for who in everyone]
    data["rows"] = {key: data["rows"][key] for key in order if key in data["rows"]}
    lines = report.tables(data)
    if arguments.fill:
        name = f"table:generate-{arguments.label}"
        fill_between(arguments.fill, lines, (f"<!-- {name} -->", f"<!-- /{name} -->"))
    if arguments.plot:
        report.draw(data, arguments.plot)
    Console(width=10_000, soft_wrap=True, highlight=False, markup=False).print("\n".join(lines))
    failed = [key for key, row in data["rows"].items() if "failed" in row]
    failed += ["first token"] * ("first_token_failed" in data)
    print(f"\n{len(data['rows'])} rows in {time.perf_counter() - start:.0f} s" + (f"; FAILED: {failed}" * bool(failed)))
    sys.exit(FAILED if failed else 0)


if __name__ == "__main__":
    main()
