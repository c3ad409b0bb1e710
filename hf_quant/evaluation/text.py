"""Held-out text: built-in, from a file or from a Hub dataset, cut into fixed windows of tokens."""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from hf_quant.errors import DependencyError, EvaluationError

BUILT_IN = ("docs", "prose")
HUB_PREFIX = "hub:"
Part = Literal["evaluation", "calibration", "all"]

# The built-in texts are cut into blocks of characters; every third block is held out for evaluation, the two between
# are for calibration, whatever the tokenizer and the window length.
_BLOCK_CHARACTERS = 24_000
_HELD_OUT_EVERY = 3
_HUB_CHARACTERS = 4_000_000


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        name: short name for tables (``docs``, a file's name, a dataset's name).
        source: where it came from, precise enough to get it again.
        content: the text itself.
    """

    name: str
    source: str
    content: str

    @property
    def sha256(self) -> str:
        """Digest of the UTF-8 bytes of ``content``: the text that the windows are cut from."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Token windows of one text.

    Attributes:
        text: where they were cut from.
        ids: int64 ``[windows, length]`` on the CPU.
        bos: every window starts with the tokenizer's beginning-of-sequence token (because the tokenizer adds one).
    """

    text: Text
    ids: torch.Tensor
    bos: bool


def load_text(spec: str | Path, part: Part = "evaluation") -> Text:
    """Read a text.

    Args:
        spec: ``docs`` or ``prose`` (built in), the path of a UTF-8 text file, or
            ``hub:name[@config][:split[:column]]`` for a Hub dataset (by default split ``test``, column ``text``).
        part: which share of a *built-in* text: a third is held out for ``evaluation``, the rest is for
            ``calibration``. A user's own text is always read whole.

    Raises:
        EvaluationError: there is no such text, it is empty, or it is not UTF-8.
        DependencyError: a Hub dataset was asked for and `datasets` is not installed.
    """
    name = str(spec)
    if name == "docs":
        source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
        return _built_in(name, source, _docs(), part)
    if name == "prose":
        return _built_in(name, "Northanger Abbey, by Jane Austen (public domain; ships with hf-quant)", _prose(), part)
    if name.startswith(HUB_PREFIX):
        return _hub(name)
    return _file(Path(spec))


def cut_windows(text: Text, tokenizer: Tokenizer, count: int, length: int, seed: int) -> Windows:
    """Cut ``count`` windows of ``length`` tokens that do not overlap, spread over the text by ``seed``.

    The text is tokenized once and tiled; the tiles are divided into ``count`` runs, and each run gives one tile.
    Raises EvaluationError when the request makes no sense or the text is too short (saying how many windows fit).
    """
    if count < 2:
        raise EvaluationError(f"windows={count} gives no confidence interval.", "use at least 2 windows.")
    if length < 2:
        raise EvaluationError(f"length={length} scores no token.", "use windows of at least 2 tokens.")
    bos_id = _leading_bos(tokenizer)
    fresh = length - (bos_id is not None)
    ids: Sequence[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    fit = len(ids) // fresh
    if fit < count:
        raise EvaluationError(
            f"text {text.name!r} has {len(ids)} tokens: {fit} windows of {length} fit, {count} were asked for.",
            f"use a longer text, or {f'windows={fit}' if fit > 1 else 'a shorter length'}.",
        )
    generator = random.Random(seed)
    picks = [generator.randrange(fit * i // count, fit * (i + 1) // count) for i in range(count)]
    rows = torch.tensor([list(ids[pick * fresh : (pick + 1) * fresh]) for pick in picks], dtype=torch.int64)
    if bos_id is not None:
        rows = torch.cat((torch.full((count, 1), bos_id, dtype=torch.int64), rows), dim=1)
    return Windows(text, rows, bos_id is not None)


def _leading_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS id when the tokenizer puts one before a text (models trained with it are lost without it)."""
    start = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(start) > 0 and start[0] == bos else None


def _built_in(name: str, source: str, content: str, part: Part) -> Text:
    if part == "all":
        return Text(name, source, content)
    blocks = [content[i : i + _BLOCK_CHARACTERS] for i in range(0, len(content), _BLOCK_CHARACTERS)]
    held_out = part == "evaluation"
    chosen = [block for i, block in enumerate(blocks) if (i % _HELD_OUT_EVERY == 1) == held_out]
    return Text(name, f"{source}, {part} part", "".join(chosen))


def _docs() -> str:
    # A CPython built without its documentation has an empty table or none.
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EvaluationError(
            "this Python has no pydoc_data, which the text 'docs' is made of.", "use the text 'prose' or a file."
        ) from error
    # Topics include one another's sections; a paragraph that is there twice could be held out and calibrated on.
    seen: dict[str, None] = {}
    for key in sorted(topics):
        seen.update(dict.fromkeys(topics[key].strip().split("\n\n")))
    return "\n\n".join(seen)


def _prose() -> str:
    path = resources.files("hf_quant.evaluation") / "data" / "northanger_abbey.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def _file(path: Path) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise EvaluationError(
            f"cannot read the text {str(path)!r}: {error.strerror}.",
            f"give a text file, one of {', '.join(BUILT_IN)}, or {HUB_PREFIX}DATASET.",
        ) from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text: {error}.", "convert it to UTF-8.") from error
    if not content.strip():
        raise EvaluationError(f"the text {path} is empty.", "give a file with text in it.")
    return Text(path.name, f"file {path.name}", content)


def _hub(spec: str) -> Text:
    """``hub:name[@config][:split[:column]]``: rows are joined by blank lines, read only as far as they are needed."""
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            f"the text {spec!r} needs the package `datasets`, which is not installed.", "pip install datasets"
        ) from error
    name, _, rest = spec.removeprefix(HUB_PREFIX).partition(":")
    split, _, column = rest.partition(":")
    name, _, config = name.partition("@")
    split = split or "test"
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
    except (OSError, ValueError, StopIteration) as error:  # the library's own errors derive from these
        raise EvaluationError(
            f"cannot load dataset {name!r}{f' ({config})' if config else ''}, split {split!r}: {error}.",
            f"check the name and the connection; the form is {HUB_PREFIX}name[@config][:split[:column]].",
        ) from error
    column = column or "text"
    if column not in columns:
        raise EvaluationError(
            f"dataset {name!r} has no column {column!r}.", f"name one of {', '.join(columns)} after the split."
        )
    pieces: list[str] = []
    size = 0
    for row in rows:
        if not isinstance(row[column], str):
            raise EvaluationError(f"column {column!r} of dataset {name!r} is not text.", "name a column of strings.")
        if row[column].strip():
            pieces.append(row[column].strip())
            size += len(pieces[-1])
        if size >= _HUB_CHARACTERS:
            break
    if not pieces:
        raise EvaluationError(f"dataset {name!r}, split {split!r} has no text.", "choose another split or column.")
    source = f"Hub dataset {name}{f', config {config}' if config else ''}, split {split}, column {column}"
    return Text(name.rsplit("/", 1)[-1], source, "\n\n".join(pieces))
