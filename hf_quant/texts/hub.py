"""Hub datasets: one grammar for their names, rows that are read only as far as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_quant.errors import DependencyError, TextError

HUB_PREFIX = "hub:"
_FORM = f"{HUB_PREFIX}name[@config][:split[:column]]"
_TEXT_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class HubRows:
    """An opened split of a dataset.

    Attributes:
        name: of the dataset (``org/name``).
        source: dataset, config and split in words, precise enough to get them again.
        split: its name.
        column: the one that was asked for, or None.
        columns: the names of all columns.
        rows: streamed; nothing beyond what is consumed is downloaded, shard by shard.
    """

    name: str
    source: str
    split: str
    column: str | None
    columns: tuple[str, ...]
    rows: Iterator[dict[str, Any]]

    def require(self, column: str) -> str:
        """``column`` itself; raises TextError when the dataset has no such column."""
        if column not in self.columns:
            raise TextError(
                f"dataset {self.name!r} has no column {column!r}.",
                f"name one of {', '.join(self.columns)} after the split.",
            )
        return column


def open_hub(spec: str, default_split: str) -> HubRows:
    """Open ``hub:name[@config][:split[:column]]``, or ``hub:name:config:split:column``.

    Args:
        spec: with its prefix.
        default_split: where the name has none.

    Raises:
        DependencyError: the package `datasets` is not installed.
        TextError: there is no such dataset, config or split, or it cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            f"the text {spec!r} needs the package `datasets`, which is not installed.", "pip install datasets"
        ) from error
    name, *fields = spec.removeprefix(HUB_PREFIX).split(":")
    name, _, config = name.partition("@")
    if len(fields) == 3 and not config:
        config = fields.pop(0)
    if not name or len(fields) > 2:
        raise TextError(f"{spec!r} does not name a Hub dataset.", f"the form is {_FORM}.")
    split = fields[0] if fields and fields[0] else default_split
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        columns = tuple(rows.column_names or next(iter(rows)))
    except (OSError, ValueError, StopIteration) as error:  # the library's own errors derive from these
        offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise TextError(
            f"cannot load dataset {name!r}{f' ({config})' if config else ''}, split {split!r}: {error}.",
            f"check the name and the connection{offline}; the form is {_FORM}.",
        ) from error
    source = f"Hub dataset {name}{f', config {config}' if config else ''}, split {split}"
    column = fields[1] if len(fields) == 2 and fields[1] else None
    return HubRows(name, source, split, column, columns, iter(rows))


def hub_text(spec: str, default_split: str = "test", characters: int = _TEXT_CHARACTERS) -> tuple[str, str, str]:
    """Name, source and text of one column (by default ``text``): rows joined by blank lines.

    Args:
        spec: see :func:`open_hub`.
        default_split: where ``spec`` names none.
        characters: stop reading rows at this many.

    Raises:
        DependencyError, TextError: as :func:`open_hub`; or the column does not exist, is not text, or is empty.
    """
    opened = open_hub(spec, default_split)
    column = opened.require(opened.column or "text")
    pieces: list[str] = []
    size = 0
    for row in opened.rows:
        if not isinstance(row[column], str):
            raise TextError(f"column {column!r} of dataset {opened.name!r} is not text.", "name a column of strings.")
        if row[column].strip():
            pieces.append(row[column].strip())
            size += len(pieces[-1])
        if size >= characters:
            break
    if not pieces:
        raise TextError(
            f"dataset {opened.name!r}, split {opened.split!r} has no text.", "choose another split or column."
        )
    return opened.name.rsplit("/", 1)[-1], f"{opened.source}, column {column}", "\n\n".join(pieces)
