"""The built-in tasks: what they ask is in the held-out text, the right answer is right, and everybody gets the same."""

from __future__ import annotations

import json

import pytest
import yaml

from hf_quant.errors import EvaluationError
from hf_quant.evaluation import task_set
from hf_quant.texts import load_text

EVERY = task_set.names(task_set.SET_NAME)


def words(text: str, part: str = "evaluation") -> str:
    return " ".join(load_text(text, part).content.split())


def test_names():
    assert len(EVERY) == 4 and task_set.names("hfq-cloze") == ("hfq-cloze-docs", "hfq-cloze-prose")
    assert task_set.names("hfq-continuation-prose") == ("hfq-continuation-prose",)
    assert task_set.names("arc_easy") == task_set.names("hfq") == ()
    with pytest.raises(EvaluationError, match="no built-in task 'hfq-poetry'"):
        task_set.items("hfq-poetry")


@pytest.mark.parametrize("name", EVERY)
def test_items_come_from_the_held_out_text(name):
    rows = task_set.items(name)
    assert rows == task_set.items(name)
    assert task_set.ITEMS + task_set.SHOTS >= len(rows) >= 80 + task_set.SHOTS
    assert len({row["context"] for row in rows}) == len(rows)
    text = words(name.rpartition("-")[2])
    for row in rows:
        right = row["target"] if "target" in row else row["choices"][row["label"]]
        assert f"{row['context']} {right}" in text
        if "target" in row:
            before = row["context"].split()
            assert f"{before[-1]} {right}" in row["context"] and len(right) >= 4
        else:
            assert len(set(row["choices"])) == 4
            wrong = [choice for i, choice in enumerate(row["choices"]) if i != row["label"]]
            assert not any(f"{row['context']} {choice}" in text for choice in wrong)
    if "label" in rows[0]:
        counts = [sum(row["label"] == i for row in rows) for i in range(4)]
        assert min(counts) > 0.15 * len(rows)


def test_written_files_hold_the_same_items_and_no_code(tmp_path):
    files = task_set.write(tmp_path)
    assert [file.stem for file in files] == list(EVERY)
    for file in files:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        data = task["dataset_kwargs"]["data_files"]
        rows = [json.loads(line) for split in ("test", "train") for line in open(data[split], encoding="utf-8")]  # noqa: PTH123, SIM115
        assert rows == task_set.items(task["task"])
        assert sum(1 for _ in open(data["train"], encoding="utf-8")) == task_set.SHOTS  # noqa: PTH123, SIM115
