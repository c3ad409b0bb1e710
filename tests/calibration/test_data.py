"""The data itself: what is counted and digested, where it is cut, how unequal samples become batches."""

from __future__ import annotations

import pytest
import torch

from hf_quant.calibration import CalibrationData, from_batches
from hf_quant.calibration.data import in_batches
from hf_quant.errors import CalibrationError


def _data(*shapes: tuple[int, int]) -> CalibrationData:
    total = 0
    batches = []
    for rows, length in shapes:
        batches.append({"input_ids": torch.arange(total, total + rows * length).reshape(rows, length)})
        total += rows * length
    return CalibrationData.make(batches, "test", 7)


def test_counts_and_record():
    data = _data((4, 8), (2, 8))
    assert (data.samples, data.tokens, data.seed) == (6, 48, 7)
    assert data.record() == {"source": "test", "sha256": data.sha256, "samples": 6, "tokens": 48, "seed": 7}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    padded = from_batches([{"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": mask}])
    assert padded.tokens == 5
    images = from_batches([{"pixel_values": torch.zeros(3, 3, 8, 8)}])
    assert (images.samples, images.tokens) == (3, 0)


def test_digest_sees_values_dtypes_shapes_names_and_order():
    ids = torch.arange(12).reshape(2, 6)
    batches = [
        [{"input_ids": ids}],
        [{"input_ids": ids.flip(0)}],
        [{"input_ids": ids.int()}],
        [{"input_ids": ids.reshape(3, 4)}],
        [{"labels": ids}],
        [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}],
        [{"input_ids": ids[1:]}, {"input_ids": ids[:1]}],
    ]
    assert len({from_batches(batch).sha256 for batch in batches}) == len(batches)
    assert from_batches(batches[0]).sha256 == from_batches([{"input_ids": ids.clone()}], source="other").sha256
    assert (
        from_batches([{"x": torch.ones(2, dtype=torch.bfloat16)}]).sha256 != from_batches([{"x": torch.ones(2)}]).sha256
    )


@pytest.mark.parametrize("held_out", [1, 2, 3, 5])
def test_split_keeps_every_sample_once_and_in_order(held_out):
    data = _data((4, 8), (2, 8))
    train, held = data.split(held_out)
    assert (train.samples, held.samples) == (6 - held_out, held_out)
    rows = torch.cat([batch["input_ids"] for part in (train, held) for batch in part.batches])
    assert torch.equal(rows, torch.arange(48).reshape(6, 8))
    assert train.sha256 != held.sha256 != data.sha256 and train.tokens + held.tokens == 48


@pytest.mark.parametrize("held_out", [0, 6, 7, -1])
def test_split_that_leaves_nothing(held_out):
    with pytest.raises(CalibrationError, match="6 calibration samples of 'test' cannot be held out"):
        _data((4, 8), (2, 8)).split(held_out)


def test_a_batch_whose_tensors_are_not_rows_is_not_cut():
    # As Qwen2-VL has it: the patches of all images of a batch in one dimension.
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "pixel_values": torch.zeros(10, 6)}
    data = from_batches([batch, batch])
    assert [part.samples for part in data.split(2)] == [2, 2]
    with pytest.raises(CalibrationError, match="cannot be cut"):
        data.split(1)


def test_samples_of_unequal_length_share_no_batch():
    samples = [{"input_ids": torch.full((1, length), i)} for i, length in enumerate([3, 5, 3, 3, 5, 4])]
    batches = in_batches(samples, 2)
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[0, 2], [1, 4], [3], [5]]
    assert [batch["input_ids"].shape[1] for batch in batches] == [3, 5, 3, 4]


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([], "no samples"),
        ([{}], "empty"),
        ([{"input_ids": [[1, 2]]}], "'input_ids' is list"),
        ([{"input_ids": torch.ones(2, 3)}], "torch.float32"),
        ([{"input_ids": torch.ones(3, dtype=torch.int64)}], r"\[3\]"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}], "attention_mask"),
        ([{"pixel_values": torch.full((1, 3), torch.nan)}], "NaN"),
        ([{"pixel_values": torch.zeros(0, 3)}], "empty"),
    ],
)
def test_batches_that_are_refused(batches, problem):
    with pytest.raises(CalibrationError, match=problem):
        from_batches(batches)
