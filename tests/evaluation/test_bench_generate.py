"""The generation benchmark: what it counts, compares and prints; a contender that fails is a row with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scripts():
    """The scripts import each other as they do when they are run."""
    added = [str(ROOT / "scripts"), str(ROOT)]  # the servers are started from the root
    sys.path[:0] = added
    try:
        from speed_peers import contenders, report, workers

        from scripts.speed_peers import generate, llamacpp

        modules = (contenders, report, workers, generate, llamacpp)
        yield {module.__name__.rpartition(".")[2]: module for module in modules}
    finally:
        for folder in added:
            sys.path.remove(folder)


def sample(speed, number, run=1, others=0.0):
    return {"run": run, "round": number, "tokens_per_second": speed, "others": others}


def row(name, layout, **samples):
    return {"name": name, "layout": layout, "version": "1", "token_bytes": 10**9, "samples": samples}


def figures(**rows):
    return {
        "model": "tiny",
        "threads": 2,
        "prompt": 16,
        "tokens": 64,
        "batch_tokens": 32,
        "environment": {"cpu": "some processor"},
        "bandwidth": [20.0, 30.0, 25.0],
        "first_token": [],
        "rows": rows,
    }


def test_every_contender_has_a_server_and_an_environment(scripts):
    rows = scripts["contenders"].contenders(64)
    assert len({who.key for who in rows}) == len(rows)
    for who in rows:
        assert (ROOT / "scripts" / "speed_peers" / f"{who.module}.py").is_file()
        assert who.environment is None or who.environment in scripts["contenders"].ENVIRONMENTS
    plain = {who.name for who in rows if not who.extra}
    assert plain == {"hf-quant", "transformers", "bitsandbytes", "llama.cpp", "OpenVINO GenAI"}


def test_our_configs_are_valid_or_name_the_key_that_this_version_lacks(scripts):
    from hf_quant import HfQuantConfig

    ours = [who for who in scripts["contenders"].contenders(32) if who.name == "hf-quant"]
    assert {who.options["config"]["group_size"] for who in ours} == {32, 64, 128}
    for who in ours:
        assert HfQuantConfig(**who.options["config"]).method == "absmax"


def test_the_table_has_medians_spread_bandwidth_and_failures(scripts):
    ours = row("hf-quant", "int4 g64", **{"decode 1": [sample(v, n) for n, v in enumerate((9.0, 12.0, 10.0), 1)]})
    failed = {"name": "llama.cpp", "layout": "Q4_0", "samples": {}, "failed": "building llama.cpp:\nexit 1"}
    lines = scripts["report"].speeds(figures(a=ours, b=failed))
    assert lines[0].endswith("| decode, tok/s | decode GB/s (of bandwidth) |")
    assert lines[2] == "| **hf-quant** | 1 | int4 g64 | 1 GB | 10.0 (9.0 – 12.0) | 10.0 (40%) |"
    assert lines[3] == "| llama.cpp |  | Q4_0 |  | failed: building llama.cpp: exit 1 |  |"


def test_ratios_are_taken_within_rounds(scripts):
    report = scripts["report"]
    ours = row("hf-quant", "int4 g64", **{"decode 1": [sample(20.0, 1), sample(10.0, 2), sample(90.0, 1, run=2)]})
    peer = row("llama.cpp", "Q4_0", **{"decode 1": [sample(10.0, 1), sample(5.0, 2), sample(1.0, 3)]})
    assert report.ratio(ours, peer, "decode 1") == 2.0
    assert report.ratio(ours, peer, "prefill 512") is None
    table = report.against(figures(a=ours, b=peer))
    assert table[0] == "|  | decode: × llama.cpp Q4_0 |" and table[2] == "| hf-quant int4 g64 | 2.00 |"
    assert report.against(figures(b=peer)) == []


def test_rivals_are_not_their_compiled_or_longer_named_relatives(scripts):
    matches = scripts["report"].matches
    assert matches("int4 g64", "int4") and matches("bf16", "bf16")
    assert not matches("bf16, compiled", "bf16") and not matches("int48", "int4")


def test_measurements_are_ordered_by_size(scripts):
    one = row("a", "x", **{"prefill 512": [sample(1.0, 1)], "decode 8": [], "prefill 64": [], "decode 1": []})
    report = scripts["report"]
    assert report.measured(figures(a=one)) == ["decode 1", "decode 8", "prefill 64", "prefill 512"]
    assert report.title("decode 8") == "8 sequences, total tok/s"


def test_loading_is_held_against_reading_the_same_bytes(scripts):
    def pair(read, first, cold):
        held = {"load_seconds": first / 2, "anonymous_bytes": 7 * 10**8, "model_bytes": 8 * 10**8}
        return {
            "cold": cold,
            "read": {"bytes": 8 * 10**8, "seconds": read},
            "first_token": {"seconds": first, **held},
        }

    pairs = [pair(1.0, 1.5, True), pair(2.0, 2.2, True), pair(1.0, 1.4, True), pair(0.1, 0.5, False)]
    disk, cache = scripts["report"].loading(pairs)[2:]
    assert disk == "| from disk | 800 MB | 1.00 | 0.75 | 1.50 | 1.40 | 700 MB | 800 MB |"
    assert cache.startswith("| from the page cache | 800 MB | 0.10 | 0.25 | 0.50 | 5.00 |")


def test_the_note_says_how_quiet_the_machine_was(scripts):
    note = scripts["report"].note
    ours = row("hf-quant", "int4 g64", **{"decode 1": [sample(1.0, 1, others=0.02), sample(1.0, 2, others=1.5)]})
    text = note(figures(a=ours))
    assert "read bandwidth 25.0 (20.0 – 30.0) GB/s" in text and "0.76 cores busy (at most 1.50)" in text
    assert "same run" not in text
    ours["samples"]["decode 1"].append(sample(1.0, 1, run=2))
    assert text != note(figures(a=ours)) and "not all rows were measured in the same run" in note(figures(a=ours))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_the_same_for_the_same_figures(scripts, tmp_path, suffix):
    data = figures(
        a=row("hf-quant", "int4 g64", **{"decode 1": [sample(9.0, 1), sample(11.0, 2)]}),
        b=row("llama.cpp", "Q4_0", **{"decode 1": [sample(8.0, 1)], "prefill 512": [sample(300.0, 1)]}),
    )
    target = tmp_path / f"plot{suffix}"
    scripts["report"].draw(data, target)
    first = target.read_bytes()
    scripts["report"].draw(data, target)
    assert target.read_bytes() == first and len(first) > 1000
    with pytest.raises(ValueError, match="no figures"):
        scripts["report"].draw(figures(), target)


def test_a_worker_answers_fails_hangs_and_dies(scripts, tmp_path):
    workers = scripts["workers"]
    (tmp_path / "served.py").write_text(
        "import os, sys, time\nfrom scripts.speed_peers.protocol import serve\n"
        "def echo(**given):\n    print('noise'); os.system('echo noise'); return given\n"
        "def fail():\n    raise KeyError('no such thing')\n"
        "serve({'echo': echo, 'fail': fail, 'die': lambda: os._exit(7), 'sleep': lambda: time.sleep(60) or {},\n"
        "       'threads': lambda: {name: os.environ.get(name) for name in ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY')}})"
    )
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    log = tmp_path / "log"
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
    try:
        with workers.Worker(Path(sys.executable), "served", ROOT, 3, log, PYTHONPATH=path) as worker:
            assert worker.ask("echo", 60, x=[1, "ä"]) == {"x": [1, "ä"]}
            assert worker.ask("threads", 60) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": None}
            with pytest.raises(workers.WorkerError, match="fail: KeyError: 'no such thing'"):
                worker.ask("fail", 60)
            assert worker.ask("echo", 60) == {}
            with pytest.raises(workers.WorkerError, match="exit code 7"):
                worker.ask("die", 60)
        with workers.Worker(Path(sys.executable), "served", ROOT, 1, log, PYTHONPATH=path) as worker:
            worker.ask("echo", 60)
            with pytest.raises(workers.WorkerError, match="no answer in time"):
                worker.ask("sleep", 0.2)
    finally:
        os.environ.pop("OMP_WAIT_POLICY") if before is None else os.environ.update(OMP_WAIT_POLICY=before)
    assert "noise" in log.read_text() and "Traceback" in log.read_text()


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs /proc")
def test_other_programs_are_told_from_ones_own(scripts):
    quiet = scripts["workers"].Quiet
    busy = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.5: pass"
    with quiet(os.getpid()) as found:
        subprocess.run([sys.executable, "-c", busy], check=True)  # a child that was waited for is the process's own
    with quiet(1) as other:
        subprocess.run([sys.executable, "-c", busy], check=True)
    assert found.others is not None and other.others is not None and other.others > 0.1


def test_bytes_of_a_token_leave_out_an_embedding_that_is_only_looked_up(scripts, tiny_model):
    token_bytes, unique = scripts["generate"].token_bytes, scripts["generate"].unique
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    everything = sum(p.nbytes for p in tied.parameters()) + sum(b.nbytes for b in tied.buffers())
    assert token_bytes(tied) == everything == token_bytes(untied)
    assert sum(t.nbytes for t in unique(untied)) == everything + untied.get_input_embeddings().weight.nbytes


def test_figures_of_llama_batched_bench(scripts):
    batched_figures = scripts["llamacpp"].batched_figures
    line = json.dumps({"pp": 16, "tg": 32, "pl": 8, "t_pp": 1.0, "t_tg": 2.5, "speed_tg": 102.4})
    assert batched_figures(f"main: noise\n{line}\n\n") == {"tokens": 256, "seconds": 2.5}
    with pytest.raises(ValueError, match="no figures"):
        batched_figures("main: noise\n")


def test_reading_counts_the_weights_alone(scripts, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(20 << 20))
    (tmp_path / "config.json").write_bytes(bytes(100))
    for cold in (True, False):
        answer = scripts["generate"].Generator().read(str(tmp_path), cold)
        assert answer["bytes"] == 20 << 20 and answer["seconds"] > 0


@pytest.mark.slow
def test_measures_resumes_and_reports_what_failed(scripts, tiny_llama, tmp_path):
    file = tmp_path / "figures.json"
    envs = tmp_path / "envs"
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table:generate-tiny -->\n<!-- /table:generate-tiny -->\nb\n")

    def run(only: str, *more: str) -> subprocess.CompletedProcess[str]:
        sizes = ["--tokens", "3", "--batch-tokens", "2", "--prefill", "8", "--threads", "1", "--repeats", "2"]
        files = ["--envs", str(envs), "--json", str(file), "--fill", str(page), "--model", str(tiny_llama)]
        return subprocess.run(
            [
                sys.executable,
                str(ROOT / "scripts" / "bench_generate.py"),
                "--label",
                "tiny",
                *sizes,
                *files,
                "--only",
                only,
                *more,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    first = run(r"hf-quant . int4 g64$|bf16$")
    assert first.returncode == 0, first.stderr
    data = json.loads(file.read_text())
    ours = data["rows"]["hf-quant | int4 g64"]
    assert [s["round"] for s in ours["samples"]["decode 8"]] == [1, 2] and sum(ours["kernels"].values()) > 1
    assert ours["token_bytes"] < data["rows"]["transformers | bf16"]["token_bytes"]
    assert len(data["first_token"]) == 4 and len(data["bandwidth"]) == 2
    assert "decode: × transformers bf16" in page.read_text() and page.read_text().endswith("-->\nb\n")
    # An environment that claims to be ready and holds no interpreter: the reason is in the row, the rest stays.
    (envs / "openvino").mkdir()
    wanted = json.dumps(["torch==2.13.0", *scripts["contenders"].ENVIRONMENTS["openvino"]])
    (envs / "openvino" / "hf-quant-bench.json").write_text(wanted)
    second = run("bf16$|OpenVINO GenAI . int8")
    assert second.returncode == 3, second.stderr
    after = json.loads(file.read_text())
    assert after["rows"]["hf-quant | int4 g64"] == ours and after["bandwidth"] == data["bandwidth"]
    assert "No such file" in after["rows"]["OpenVINO GenAI | int8"]["failed"]
    assert "failed:" in second.stdout and "failed:" in page.read_text()
    again = run("nothing", "--tokens", "4")
    assert again.returncode != 0 and "another protocol" in again.stderr
