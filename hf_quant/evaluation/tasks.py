"""lm-evaluation-harness tasks on a candidate and its float reference, side by side and item by item."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.accuracy import AUTO_KERNEL, environment_of, forces, name_of
from hf_quant.evaluation.results import RESULTS_FILE, EvaluationResult
from hf_quant.evaluation.run import write_results
from hf_quant.evaluation.sources import Origin, Source, checked_device, load_tokenizer, opened, quiet_loading
from hf_quant.evaluation.speed import kernels
from hf_quant.evaluation.task_loading import BUILT_IN_SOURCE, LoadedTasks, functions_of, load_tasks, quiet_harness
from hf_quant.evaluation.task_pairs import combine, compare_items
from hf_quant.evaluation.task_record import check_same
from hf_quant.evaluation.task_results import GroupResult, MetricResult, TaskResult, TaskRun, merged
from hf_quant.kernels import registry

BATCH_SIZE = 8
_PACKAGES = ("lm-eval", "datasets", "torch", "transformers")
_Values = dict[tuple[str, str], dict[int, Any]]  # (metric, filter) -> item -> value


def evaluate_tasks(
    candidate: Source,
    reference: Source,
    tasks: Sequence[str | Path] | LoadedTasks,
    *,
    tokenizer: Any = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = BATCH_SIZE,
    chat_template: bool = False,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    kernel: str = AUTO_KERNEL,
    activations: str = registry.FLOAT,
    unsafe_code: bool = False,
    trust_remote_code: bool = False,
    reference_revision: str | None = None,
    progress: bool = True,
    command: str | None = None,
) -> TaskRun:
    """Run tasks on both models, one model in memory at a time, with the same prompts and items.

    Args:
        candidate: a directory or Hub id that transformers can load, or a model in memory.
        reference: the float model, likewise.
        tasks: names, YAML files and directories (see :func:`~hf_quant.evaluation.task_loading.load_tasks`), or what
            that has loaded.
        tokenizer: default: the reference's, else the candidate's; both models read the same tokens.
        num_fewshot: examples before each item; default: what each task says.
        limit: the first so many items of each task, or a share of them (below 1).
        batch_size: sequences per forward pass.
        chat_template: put prompts through the tokenizer's chat template.
        dtype: of both models; default float32, or the dtype of a model in memory.
        device: default ``cpu``.
        seed: of few-shot examples and of the bootstrap.
        kernel: force one of our kernels for the candidate.
        activations: ``int8`` allows our kernels to round the candidate's activations.
        unsafe_code: allow tasks that run code which the model wrote, or metrics whose code comes from the Hub.
        trust_remote_code: run Python code that comes with the models.
        reference_revision: of a Hub id.
        progress: lm-eval's bars on stderr.
        command: recorded in the results.

    Raises:
        DependencyError: lm-eval (``hf-quant[tasks]``) or a package that a task needs is not installed.
        EvaluationError: no such task, data that cannot be had, no chat template, figures that are no numbers.
        KernelError: the kernel that was asked for cannot run.
    """
    _check_numbers(num_fewshot, limit, batch_size)
    device = checked_device(device)
    asked = forces(kernel, activations)
    if asked is not None and isinstance(candidate, PreTrainedModel):
        raise EvaluationError(f"{asked} for a model in memory.", "load it with that, or pass a directory.")
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, unsafe_code)
    given = next((model.dtype for model in (reference, candidate) if isinstance(model, PreTrainedModel)), torch.float32)
    dtype = dtype or given
    with ExitStack() as stack:
        stack.enter_context(quiet_loading())
        stack.enter_context(quiet_harness())
        if kernel != AUTO_KERNEL:
            stack.enter_context(environment_of(registry.ENVIRONMENT_VARIABLE, kernel))
        if activations != registry.FLOAT:
            stack.enter_context(environment_of(registry.ACTIVATIONS_VARIABLE, activations))
        origins = [
            stack.enter_context(
                opened(reference, "reference", trust_remote_code=trust_remote_code, revision=reference_revision)
            ),
            stack.enter_context(opened(candidate, "candidate", trust_remote_code=trust_remote_code)),
        ]
        for origin in origins:
            if not origin.kind.answers_text:
                raise EvaluationError(f"{origin.label} does not continue text.", "tasks are for models that do.")
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(*origins)
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise EvaluationError("the tokenizer has no chat template.", "run the tasks without it.")
        _set_shots(loaded, num_fewshot)
        answers = []
        ran: dict[str, int] = {}
        for role, origin in zip(("float", "quantized"), origins, strict=True):
            if progress:
                Console(stderr=True, highlight=False).print(f"{role} model: {', '.join(loaded.tasks)}")
            model = _load(origin, dtype, device)
            answers.append(
                _answers(model, tokenizer, loaded, limit, batch_size, chat_template, seed, unsafe_code, progress)
            )
            ran = kernels(model)
            del model
            gc.collect()  # transformers' models hold reference cycles
    results = tuple(_task_result(name, loaded, answers[0][name], answers[1][name], seed) for name in loaded.tasks)
    return TaskRun(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={package: metadata.version(package) for package in _PACKAGES},
        dtype=name_of(dtype),
        device=device,
        kernels=ran,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
        tasks=results,
        groups=_groups(loaded, {result.name: result for result in results}),
        command=command,
    )


def add_tasks(
    directory: Path | str, reference: Source, tasks: Sequence[str | Path] | LoadedTasks, **options: Any
) -> EvaluationResult:
    """:func:`evaluate_tasks` on an evaluated checkpoint directory, added to its ``evaluation.json``.

    What was measured before stays; tasks that are measured again are replaced.

    Raises:
        EvaluationError: also when there are no results yet, or they are of another checkpoint or reference.
    """
    directory = Path(directory)
    before = EvaluationResult.read(directory / RESULTS_FILE)
    revision = options.get("reference_revision")
    with opened(
        reference, "reference", trust_remote_code=options.get("trust_remote_code", False), revision=revision
    ) as origin:
        check_same(before, directory, origin, revision)
    run = evaluate_tasks(directory, reference, tasks, **options)
    result = before.model_copy(update={"tasks": merged(before.tasks, run)})
    write_results(directory, result)
    return result


def _check_numbers(num_fewshot: int | None, limit: float | None, batch_size: int) -> None:
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot={num_fewshot}.", "it is a number of examples.")
    if limit is not None and not (0 < limit < 1 or (limit >= 2 and float(limit).is_integer())):
        raise EvaluationError(f"limit={limit:g}.", "give at least 2 items, or a share of them between 0 and 1.")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}.", "it is a number of sequences.")


def _load(origin: Origin, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model = origin.load(dtype, device) if origin.model is None else origin.model
    if origin.model is not None and model.dtype != dtype:
        raise EvaluationError(
            f"{origin.label} is in {name_of(model.dtype)}, but tasks are to run in {name_of(dtype)}.",
            "load it in that dtype, or pass the directory instead of the model.",
        )
    return model


def _set_shots(loaded: LoadedTasks, num_fewshot: int | None) -> None:
    """lm-evaluation-harness's own rule: a task that insists on no examples gets none."""
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _answers(
    model: PreTrainedModel,
    tokenizer: Any,
    loaded: LoadedTasks,
    limit: float | None,
    batch_size: int,
    chat_template: bool,
    seed: int,
    unsafe_code: bool,
    progress: bool,
) -> dict[str, list[dict[str, Any]]]:
    """lm_eval's record of every item (and filter), by task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(seed=seed)
    with _bars(progress):
        harness = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",  # sums of 16-bit logarithms would decide ties
        )
        found = evaluate(
            lm=harness,
            task_dict={"tasks": dict(loaded.tasks), "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=unsafe_code,
        )
    return dict(found["samples"])


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """lm_eval's bars cannot all be turned off: they go nowhere instead."""
    if shown:
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def _task_result(
    name: str, loaded: LoadedTasks, floats: Sequence[dict[str, Any]], quantized: Sequence[dict[str, Any]], seed: int
) -> TaskResult:
    task = loaded.tasks[name]
    seen = [_digest_of_items(samples) for samples in (floats, quantized)]
    if seen[0] != seen[1]:
        raise EvaluationError(
            f"the task {name!r} gave the two models different items or prompts.",
            "it draws them at random: give it a seed, or leave it out.",
        )
    values = [_values(samples) for samples in (floats, quantized)]
    aggregates, directions = task.aggregation(), task.higher_is_better()
    metrics = []
    for key in values[0]:
        both = [item for item in values[0][key] if item in values[1].get(key, {})]
        if not both:
            raise EvaluationError(
                f"{key[0]} of the task {name!r} has no item that both models answered.", "leave the task out."
            )
        pairs = [(values[0][key][item], values[1][key][item]) for item in both]
        aggregate: Callable[[list[Any]], float] = aggregates.get(key[0]) or _mean
        metrics.append(compare_items(name, *key, bool(directions.get(key[0], True)), pairs, aggregate, seed))
    config = task.config
    return TaskResult(
        name=name,
        source=loaded.sources[name],
        dataset=_without_folder(config.dataset_path),
        dataset_config=config.dataset_name,
        split=config.test_split or config.validation_split,
        version=str(task.VERSION),
        config_sha256=_digest_of_config(task, loaded.sources[name]),
        items_sha256=seen[0],
        runs_code=bool(functions_of(_foreign(vars(config), loaded.sources[name]))),
        output_type=str(task.OUTPUT_TYPE),
        num_fewshot=int(config.num_fewshot or 0),
        items=len({sample["doc_id"] for sample in floats}),
        items_available=len(task.eval_docs),
        metrics=tuple(metrics),
    )


def _groups(loaded: LoadedTasks, results: Mapping[str, TaskResult]) -> tuple[GroupResult, ...]:
    """The groups that say how to average their tasks."""
    found = []
    for name, group in loaded.groups.items():
        members = [results[task.task_name] for task in group.get_all_tasks()]
        metrics = []
        for wanted in group.aggregate_metric_list or ():
            parts: dict[str, list[tuple[MetricResult, int]]] = {}
            for member in members:
                for metric in member.metrics:
                    if metric.metric == wanted.metric and (wanted.filter_list or [metric.filter]).count(metric.filter):
                        parts.setdefault(metric.filter, []).append((metric, member.items))
            for some in parts.values():
                weights = [items if wanted.weight_by_size else 1 for _, items in some]
                metrics.append(combine([metric for metric, _ in some], weights))
        found.append(GroupResult(name=name, tasks=tuple(member.name for member in members), metrics=tuple(metrics)))
    return tuple(found)


def _values(samples: Sequence[dict[str, Any]]) -> _Values:
    found: _Values = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return found


def _mean(values: list[Any]) -> float:
    return float(np.mean(values))


def _digest_of_items(samples: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
    return digest.hexdigest()


def _digest_of_config(task: Any, source: str) -> str:
    """Of what the task does: its configuration with its functions' source, without where it lies on this machine."""
    config = _foreign(task.dump_config(), source)
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _foreign(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A configuration without our own function: the one that makes the data of a built-in task."""
    return {key: value for key, value in config.items() if source != BUILT_IN_SOURCE or key != "custom_dataset"}


def _without_folder(dataset: str | None) -> str | None:
    """A data set's name; of a path on this machine its last part."""
    return Path(dataset).name if dataset and Path(dataset).exists() else dataset
