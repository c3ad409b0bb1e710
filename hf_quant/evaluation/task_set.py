"""The built-in tasks: last word and right continuation of held-out passages, generated from the built-in texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hf_quant.checkpoint import atomic_write
from hf_quant.errors import EvaluationError
from hf_quant.texts import BUILT_IN, load_text

SET_NAME = "builtin"
CLOZE, CONTINUATION = "hfq-cloze", "hfq-continuation"
ITEMS = 250  # at most; fewer where the text gives fewer
SHOTS = 16  # examples for few-shot prompts, never measured
_VERSION = 1
_CONTEXT_WORDS = 48
_CONTINUATION_WORDS = 12
_CHOICES = 4
_SHORTEST_TARGET = 4  # letters
_SEED = 0
_SPLITS = {"test_split": "test", "training_split": "train"}


def names(spec: str) -> tuple[str, ...]:
    """The built-in tasks that a name stands for: all, both texts of one kind, or one; empty for any other name."""
    every = tuple(f"{kind}-{text}" for kind in (CLOZE, CONTINUATION) for text in BUILT_IN)
    if spec == SET_NAME:
        return every
    return tuple(name for name in every if spec in (name, name.rpartition("-")[0]))


def config(name: str) -> dict[str, Any]:
    """lm-evaluation-harness's configuration of a built-in task, whose data is made when it is loaded."""
    return {**_form(name), "custom_dataset": partial(_splits, name), **_SPLITS}


def items(name: str) -> list[dict[str, Any]]:
    """All items of a built-in task, the same for everybody with the same texts; the last ``SHOTS`` are the examples.

    ``docs`` depends on the Python that runs this; the digest of the items that results record tells them apart.

    Raises:
        EvaluationError: there is no such task.
        TextError: this Python has no such text.
    """
    if name not in names(SET_NAME):
        raise EvaluationError(f"there is no built-in task {name!r}.", f"choose from {', '.join(names(SET_NAME))}.")
    kind, _, text = name.rpartition("-")
    words = load_text(text, "evaluation").content.split()
    generator = random.Random(f"{name}:{_SEED}")
    found = _cloze(words) if kind == CLOZE else _continuations(words, generator)
    generator.shuffle(found)  # a limit takes the first ones: they should be of the whole text
    return found[: ITEMS + SHOTS]


def write(directory: Path | str) -> list[Path]:
    """Write the tasks as files that lm-evaluation-harness runs by itself (``--include_path``): YAML and JSON lines.

    Returns:
        the YAML files.

    Raises:
        OutputError: they cannot be written.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names(SET_NAME):
        files = {}
        for split, rows in _split(items(name)).items():
            files[split] = str(directory / f"{name}.{split}.jsonl")
            atomic_write(Path(files[split]), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        task = {**_form(name), "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **_SPLITS}
        written.append(directory / f"{name}.yaml")
        atomic_write(written[-1], yaml.safe_dump(task, sort_keys=False, allow_unicode=True))
    return written


def _form(name: str) -> dict[str, Any]:
    """What a task asks and how it is scored."""
    metrics: Sequence[str] = ("acc",)
    if name.startswith(CLOZE):
        # lm-evaluation-harness puts a delimiter before choices, but not before the target of a log-likelihood
        form: dict[str, Any] = {"output_type": "loglikelihood", "doc_to_target": "{{' ' + target}}"}
    else:
        form = {
            "output_type": "multiple_choice",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "{{choices}}",
        }
        metrics = ("acc", "acc_norm")
    return {
        "task": name,
        **form,
        "doc_to_text": "{{context}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": _VERSION},
    }


def _splits(name: str, **_: Any) -> dict[str, Any]:
    """What lm-evaluation-harness calls for the data; it passes the task's metadata, which is not needed."""
    import datasets

    return {split: datasets.Dataset.from_list(rows) for split, rows in _split(items(name)).items()}


def _split(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"test": rows[:-SHOTS], "train": rows[-SHOTS:]}


def _cloze(words: list[str]) -> list[dict[str, Any]]:
    """Passages whose last word followed the same word before, so that who reads all of it has a chance."""
    found: list[dict[str, Any]] = []
    plain = [word.rstrip(".,;:!?") for word in words]
    start = 0
    while start + _CONTEXT_WORDS < len(words):
        # the passage ends at the first word from here on that can be asked for
        for end in range(start + _CONTEXT_WORDS, min(len(words), start + 2 * _CONTEXT_WORDS)):
            target = plain[end]
            if len(target) < _SHORTEST_TARGET or not target.isalpha():
                continue
            if any(words[k - 1] == words[end - 1] and plain[k] == target for k in range(start + 1, end)):
                found.append({"context": " ".join(words[start:end]), "target": target})
                break
        else:
            end = start + _CONTEXT_WORDS
        start = end + 1
    return found


def _continuations(words: list[str], generator: random.Random) -> list[dict[str, Any]]:
    """Passages with what follows and three continuations of other passages of the same text."""
    length = _CONTEXT_WORDS + _CONTINUATION_WORDS
    passages = [words[i : i + length] for i in range(0, len(words) - length + 1, length)]
    endings = [" ".join(passage[_CONTEXT_WORDS:]) for passage in passages]
    found = []
    for i, passage in enumerate(passages):
        others = [ending for k, ending in enumerate(endings) if k != i and ending != endings[i]]
        choices = generator.sample(others, _CHOICES - 1)
        label = generator.randrange(_CHOICES)
        choices.insert(label, endings[i])
        found.append({"context": " ".join(passage[:_CONTEXT_WORDS]), "choices": choices, "label": label})
    return found
