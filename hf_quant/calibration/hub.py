"""Calibration texts and chats from a Hub dataset."""

from __future__ import annotations

from collections.abc import Iterator

from hf_quant.calibration.text import Document, read_row
from hf_quant.texts.hub import open_hub


def hub_documents(spec: str) -> Iterator[Document]:
    """The texts or chats of ``hub:name[@config][:split[:column]]`` (default split ``train``), streamed.

    The column is the named one, or else ``messages`` or ``text``, whichever the dataset has.

    Raises:
        DependencyError: the package `datasets` is not installed.
        TextError (a CalibrationError): the dataset cannot be had, or has no such column.
        CalibrationError: a row holds neither a text nor messages.
    """
    opened = open_hub(spec, "train")
    column = opened.column or ("messages" if "messages" in opened.columns else "text")
    opened.require(column)
    for number, row in enumerate(opened.rows):
        yield read_row(row, f"row {number} of dataset {opened.name!r}", column)
