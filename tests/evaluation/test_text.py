"""Windows of held-out text: they do not overlap, and what is too short says what fits."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import processors

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.text import Text, cut_windows, load_text


def test_windows_do_not_overlap_and_spread(tiny_tokenizer):
    text = load_text("prose")
    ids = tiny_tokenizer(text.content, verbose=False)["input_ids"]
    cut = cut_windows(text, tiny_tokenizer, 16, 128, seed=0)
    assert cut.ids.shape == (16, 128) and cut.ids.dtype == torch.int64 and not cut.bos
    tiles = len(ids) // 128
    places = []
    for row in cut.ids.tolist():
        found = [i for i in range(tiles) if ids[i * 128 : (i + 1) * 128] == row]
        assert len(found) == 1
        places += found
    assert places == sorted(set(places))
    assert all(tiles * i // 16 <= place < tiles * (i + 1) // 16 for i, place in enumerate(places))
    assert torch.equal(cut.ids, cut_windows(text, tiny_tokenizer, 16, 128, seed=0).ids)
    assert not torch.equal(cut.ids, cut_windows(text, tiny_tokenizer, 16, 128, seed=1).ids)


def test_windows_start_with_bos_where_the_tokenizer_adds_it(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    text = Text("t", "test", "many words and words " * 200)
    cut = cut_windows(text, tokenizer, 4, 32, seed=0)
    assert cut.bos and cut.ids.shape == (4, 32)
    assert (cut.ids[:, 0] == 1).all() and (cut.ids[:, 1:] != 1).all()


def test_too_short_says_how_many_windows_fit(tiny_tokenizer):
    text = Text("notes.txt", "test", "x" * 1000)
    tokens = len(tiny_tokenizer(text.content)["input_ids"])
    with pytest.raises(EvaluationError, match=rf"{tokens} tokens: {tokens // 100} windows of 100 fit") as caught:
        cut_windows(text, tiny_tokenizer, 64, 100, seed=0)
    assert f"windows={tokens // 100}" in caught.value.fix
    for count, length in ((1, 10), (4, 1)):
        with pytest.raises(EvaluationError):
            cut_windows(text, tiny_tokenizer, count, length, seed=0)
