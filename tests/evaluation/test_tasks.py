"""Tasks end to end: built in, from files, merged into results; what is refused; the real model on the built-in set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.errors import DependencyError, EvaluationError
from hf_quant.evaluation import EvaluationResult, evaluate_directory, task_loading, task_set
from hf_quant.evaluation.task_results import TaskRun, headline, merged

pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "hf-quant[tasks]")')
from hf_quant.evaluation.task_loading import load_tasks
from hf_quant.evaluation.tasks import add_tasks, evaluate_tasks

CONTEXT = {"max_position_embeddings": 2048}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    return tiny_checkpoint("llama", **CONTEXT)


@pytest.fixture(scope="module")
def noisy(reference, tmp_path_factory):
    """The reference with noise on its linear layers."""
    path = tmp_path_factory.mktemp("noisy") / "tiny-noisy"
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two tasks and a group in a directory, on eight questions each."""
    rows = [{"q": f"{i} and {i} make", "choices": ["nothing", "a pair", "three"], "gold": i % 3} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3},
    }
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("pairs_a", "pairs_b"):
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **base}))
    group = {"group": "pairs", "task": ["pairs_a", "pairs_b"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tasks / "pairs.yaml").write_text(yaml.safe_dump(group))
    return tasks


def test_built_in_tasks_and_their_files_give_the_same(reference, noisy, tmp_path):
    run = evaluate_tasks(noisy, reference, ["hfq-cloze-prose", "hfq-continuation-docs"], limit=12, **QUIET)
    assert TaskRun.model_validate_json(run.model_dump_json()) == run
    assert [task.name for task in run.tasks] == ["hfq-cloze-prose", "hfq-continuation-docs"]
    for task in run.tasks:
        assert task.items == 12 < task.items_available and task.source == "hf-quant" and not task.runs_code
        assert task.num_fewshot == 0 and len(task.items_sha256) == len(task.config_sha256) == 64
    choice = run.tasks[1]
    assert [metric.metric for metric in choice.metrics] == ["acc", "acc_norm"]
    for metric in choice.metrics:
        pair = metric.paired
        assert pair.items == 12
        change = pair.wrong_to_right - pair.right_to_wrong
        assert pair.difference == pytest.approx(change / 12) == metric.quantized_value - metric.float_value
    task_set.write(tmp_path)
    again = evaluate_tasks(
        noisy,
        reference,
        [tmp_path / "hfq-cloze-prose.yaml", tmp_path / "hfq-continuation-docs.yaml"],
        limit=12,
        **QUIET,
    )
    assert [task.items_sha256 for task in again.tasks] == [task.items_sha256 for task in run.tasks]
    assert [task.metrics for task in again.tasks] == [task.metrics for task in run.tasks]
    assert again.tasks[0].source == "hfq-cloze-prose.yaml" and str(tmp_path) not in again.model_dump_json()


def test_a_model_against_itself_flips_nothing(reference):
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    run = evaluate_tasks(model, reference, ["hfq-continuation-prose"], limit=8, num_fewshot=2, **QUIET)
    task = run.tasks[0]
    assert task.num_fewshot == 2
    for metric in task.metrics:
        assert metric.paired.right_to_wrong == metric.paired.wrong_to_right == 0 and metric.paired.p_value == 1
        assert metric.float_value == metric.quantized_value


def test_shots_and_the_chat_template_change_the_prompts(reference):
    def items(**options):
        return (
            evaluate_tasks(reference, reference, ["hfq-cloze-prose"], limit=4, **QUIET, **options).tasks[0].items_sha256
        )

    plain = items()
    assert len({plain, items(num_fewshot=1), items(chat_template=True)}) == 3 and items() == plain


def test_a_directory_with_a_group(folder, reference, noisy):
    run = evaluate_tasks(noisy, reference, [folder], **QUIET)
    assert [task.name for task in run.tasks] == ["pairs_a", "pairs_b"] and run.tasks[0].version == "3"
    assert run.tasks[0].items == run.tasks[0].items_available == 8
    (group,) = run.groups
    assert group.name == "pairs" and group.metrics[0].paired.items == 16
    assert group.metrics[0].float_value == pytest.approx(sum(t.metrics[0].float_value for t in run.tasks) / 2)
    assert [item.name for item, _ in headline(run)] == ["pairs"]
    one = evaluate_tasks(noisy, reference, [folder / "pairs_b.yaml"], **QUIET)
    assert one.tasks[0].metrics == run.tasks[1].metrics and one.groups == ()


def test_functions_of_a_file_run_and_are_named(folder, reference, caplog):
    (folder / "helper.py").write_text("def ask(doc):\n    return 'So ' + doc['q']\n")
    text = (folder / "pairs_a.yaml").read_text()
    (folder / "own.yaml").write_text("include: pairs_a.yaml\ntask: own\ndoc_to_text: !function helper.ask\n")
    with caplog.at_level("WARNING", "hf_quant"):
        run = evaluate_tasks(reference, reference, [folder / "own.yaml"], **QUIET)
    assert run.tasks[0].runs_code and "own.yaml runs Python code of its own: helper.ask" in caplog.text
    plain = evaluate_tasks(reference, reference, [folder / "pairs_a.yaml"], **QUIET).tasks[0]
    assert not plain.runs_code and plain.items_sha256 != run.tasks[0].items_sha256
    assert "So" not in text


def test_unsafe_tasks_are_refused_before_their_code_is_imported(folder, tmp_path):
    mark = tmp_path / "imported"
    (folder / "danger.py").write_text(f"open({str(mark)!r}, 'w')\n\ndef ask(doc):\n    return doc['q']\n")
    (folder / "unsafe.yaml").write_text(
        "include: pairs_a.yaml\ntask: unsafe\nunsafe_code: true\ndoc_to_text: !function danger.ask\n"
    )
    with pytest.raises(EvaluationError, match="'unsafe' runs code that the model writes"):
        load_tasks([folder / "unsafe.yaml"])
    with pytest.raises(EvaluationError, match="'unsafe' runs code that the model writes"):
        load_tasks([folder])
    assert not mark.exists()
    assert list(load_tasks([folder / "unsafe.yaml"], unsafe_code=True).tasks) == ["unsafe"]
    assert mark.exists()


def test_what_cannot_be_loaded_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match=r"no task 'hfq-cloce'; close to it are hfq-cloze"):
        load_tasks(["hfq-cloce"])
    with pytest.raises(EvaluationError, match="the task 'arc_easy' cannot be loaded"):
        load_tasks(["arc_easy"])
    with pytest.raises(EvaluationError, match=r"gone\.yaml does not exist"):
        load_tasks([folder / "gone.yaml"])
    with pytest.raises(EvaluationError, match="named twice"):
        load_tasks(["hfq-cloze", "hfq-cloze-docs"])
    with pytest.raises(EvaluationError, match="no task was named"):
        load_tasks([])
    (folder / "needs.yaml").write_text(
        "include: pairs_a.yaml\ntask: needs\ndoc_to_text: !function absent_package.ask\n"
    )
    with pytest.raises(DependencyError, match=r"'needs\.yaml' needs a package that is missing.*absent_package"):
        load_tasks([folder / "needs.yaml"])
    (folder / "broken.yaml").write_text("task: [unclosed\n")
    with pytest.raises(EvaluationError, match=r"broken\.yaml is no readable YAML file"):
        load_tasks([folder])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EvaluationError, match="has no task"):
        load_tasks([empty])
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(DependencyError, match="lm-eval cannot be imported") as caught:
        load_tasks(["builtin"])
    assert "hf-quant[tasks]" in caught.value.fix
    monkeypatch.setattr(task_loading.metadata, "version", lambda name: "3.6.0")
    with pytest.raises(DependencyError, match=r"datasets 3\.6\.0 can run code"):
        load_tasks(["builtin"])


def test_numbers_that_make_no_sense(reference, tiny_model, tiny_tokenizer):
    for options, what in (
        ({"limit": 1}, "limit=1"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(EvaluationError, match=what):
            evaluate_tasks(reference, reference, ["builtin"], **options)
    with pytest.raises(EvaluationError, match="num_fewshot=-1"):
        evaluate_tasks(reference, reference, ["builtin"], num_fewshot=-1)
    plain = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    with pytest.raises(EvaluationError, match="no chat template"):
        evaluate_tasks(reference, reference, ["hfq-cloze-docs"], tokenizer=plain, chat_template=True)


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tiny-int4"
    hf_quant.quantize(reference, HfQuantConfig(bits=4), path)
    return path


def test_tasks_join_results_and_survive_another_evaluation(checkpoint, reference, noisy):
    with pytest.raises(EvaluationError, match="does not exist"):
        add_tasks(checkpoint, reference, ["hfq-cloze-docs"], limit=4, **QUIET)
    quick = {"windows": 2, "length": 32, "speed": False, "noise_floor": False, "bootstrap_samples": 50, **QUIET}
    first = evaluate_directory(checkpoint, reference, **quick)
    assert first.tasks == ()
    added = add_tasks(checkpoint, reference, ["hfq-cloze"], limit=4, command="one", **QUIET)
    assert added.texts == first.texts and EvaluationResult.read(checkpoint / "evaluation.json") == added
    again = add_tasks(checkpoint, reference, ["hfq-cloze-docs"], limit=6, command="two", **QUIET)
    left = [(run.command, [task.name for task in run.tasks]) for run in again.tasks]
    assert left == [("one", ["hfq-cloze-prose"]), ("two", ["hfq-cloze-docs"])]
    assert sum(again.tasks[0].kernels.values()) >= 14
    assert evaluate_directory(checkpoint, reference, **quick).tasks == again.tasks
    with pytest.raises(EvaluationError, match="not tiny-noisy"):
        add_tasks(checkpoint, noisy, ["hfq-cloze-docs"], limit=4, **QUIET)
    path = checkpoint / "evaluation.json"
    path.write_text(again.model_copy(update={"candidate_digest": "0" * 64}).model_dump_json())
    with pytest.raises(EvaluationError, match="another checkpoint than this one"):
        add_tasks(checkpoint, reference, ["hfq-cloze-docs"], limit=4, **QUIET)
    assert evaluate_directory(checkpoint, reference, **quick).tasks == ()


def test_a_group_that_lost_a_task_is_dropped(folder, reference):
    run = evaluate_tasks(reference, reference, [folder], **QUIET)
    one = evaluate_tasks(reference, reference, [folder / "pairs_a.yaml"], **QUIET)
    before, after = merged((run,), one)
    assert [task.name for task in before.tasks] == ["pairs_b"] and before.groups == () and after == one
    assert merged((one,), run) == (run,)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_model_knows_and_loses_little(smollm2_float: Path, tmp_path):
    hf_quant.quantize(smollm2_float, HfQuantConfig(bits=8, method="absmax"), tmp_path / "int8")
    run = evaluate_tasks(tmp_path / "int8", smollm2_float, ["builtin"], limit=8, **QUIET)
    scores = {task.name: task.metrics[0] for task in run.tasks}
    for kind, chance in (("hfq-cloze", 0.05), ("hfq-continuation", 0.4)):
        for text in ("docs", "prose"):
            assert scores[f"{kind}-{text}"].float_value > chance
    flips = sum(m.paired.right_to_wrong + m.paired.wrong_to_right for m in scores.values())
    assert flips <= 4  # of 32: int8 hardly moves the probabilities
