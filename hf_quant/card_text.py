"""Small pieces of a card's text: escaping, paths that must not leak, figures with their uncertainty, grouped layers."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from hf_quant.errors import CardError
from hf_quant.evaluation.results import Interval

# An absolute path with at least two parts (POSIX), a drive or share (Windows), or a file URL. A URL's path does not
# count (it follows a host), nor does a rooted Markdown link or an HTTP endpoint such as /v1/chat/completions.
_PATH_CHAR = r"[^\s/\\'\"`|<>()\[\]{},;:*?]"
LOCAL_PATH = re.compile(
    rf"file://\S+"
    rf"|(?<![\w:/\\.~])[A-Za-z]:[\\/](?![\\/])(?:{_PATH_CHAR}+[\\/]?)+"
    rf"|(?<![\w\\])\\\\{_PATH_CHAR}+(?:\\{_PATH_CHAR}+)+"
    rf"|(?<![\w/\\.\-)\]}}>‖*<])(?<!\]\()(?!/(?:v\d+|api|docs)/)~?(?:/{_PATH_CHAR}+){{2,}}/?"
)
_MARKDOWN = re.compile(r"([\\`*\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word is only text
_MAX_RANGES = 6
_MAX_PATTERNS = 4


def file_name(path: str) -> str:
    """The last part of a POSIX or Windows path."""
    plain = path.removeprefix("file://").rstrip("/\\")
    pure = PureWindowsPath(plain) if "\\" in plain or re.match(r"[A-Za-z]:", plain) else PurePosixPath(plain)
    return pure.name or "local"


def without_paths(text: str) -> str:
    """``text`` with every absolute path of a machine replaced by its last part."""
    return LOCAL_PATH.sub(lambda match: file_name(match.group()), text)


def one_line(text: object) -> str:
    """``text`` without line breaks, control characters and paths of this machine."""
    return without_paths(" ".join("".join(c if c.isprintable() else " " for c in str(text)).split()))


def markdown(text: object) -> str:
    """``text`` as plain Markdown prose: nothing in it is read as markup, a table border or HTML."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def code(text: object, in_table: bool = False) -> str:
    """``text`` as inline code (``in_table``: inside a cell, where a bar would end it)."""
    plain = one_line(text)
    if in_table:
        plain = plain.replace("|", "\\|")
    if not plain:
        return "–"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def literal(text: str) -> str:
    """``text`` as a string in Python code."""
    return json.dumps(text, ensure_ascii=False)


def amount(nbytes: float) -> str:
    """Bytes in decimal units with three significant digits: ``538 MB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{significant(nbytes / size)} {unit}"
    return f"{nbytes:.0f} B"


def count_of(number: int) -> str:
    """A number of parameters in words: ``135 million``."""
    for unit, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{significant(number / size)} {unit}"
    return f"{number:,}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent unless it is tiny or huge."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if not -6 < exponent < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def plain_figure(value: float) -> float:
    """A number with six significant digits, for metadata."""
    return float(f"{value:.6g}")


def _decimals(interval: Interval) -> int:
    """Decimals that show one or two digits of the interval's half width, and one more where the value would otherwise
    have less than three digits; without an interval, three digits of the value."""
    width = (interval.high - interval.low) / 2
    if not any((interval.value, interval.low, interval.high)):
        return 0
    if not math.isfinite(width) or width <= 0:
        width = abs(interval.value) / 30 or 0.01
    told = -math.floor(math.log10(width / 3))
    three = 2 - math.floor(math.log10(abs(interval.value))) if interval.value else told
    return min(8, max(0, told, min(told + 1, three)))


def with_interval(interval: Interval, unit: str = "", sign: bool = False, factor: float = 1.0) -> str:
    """``value [low, high] unit``, rounded to what the interval can tell."""
    scaled = Interval(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)
    spec = _spec(scaled, sign)
    return f"{scaled.value:{spec}}{unit} [{scaled.low:{spec}}, {scaled.high:{spec}}]"


def _spec(interval: Interval, sign: bool) -> str:
    decimals = _decimals(interval)
    return f"{'+' if sign else ''}{f',.{decimals}f' if decimals < 7 else '.1e'}"


def value_only(interval: Interval, sign: bool = False) -> str:
    """The value alone, with the digits that its interval allows."""
    return f"{interval.value:{_spec(interval, sign)}}"


def listing(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


@dataclass(frozen=True)
class LayerRow:
    """One weight of the plan, as the manifest records it, with the bytes that the checkpoint holds for it.

    ``stored_bytes`` is read from the checkpoint's headers; None when they were not consulted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    label: str
    method: str
    rule: str
    note: str
    float_bytes: int
    planned_bytes: int
    stored_bytes: int | None = None

    @property
    def is_quantized(self) -> bool:
        return bool(self.label) and self.label != "float"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_now(self) -> int:
        return self.planned_bytes if self.stored_bytes is None else self.stored_bytes


def _layer_row(row: Mapping[str, Any]) -> LayerRow:
    try:
        return LayerRow(
            name=str(row["name"]),
            kind=str(row["kind"]),
            shape=tuple(int(size) for size in row["shape"]),
            label=str(row.get("label") or ""),
            method=str(row.get("method") or ""),
            rule=str(row.get("rule") or ""),
            note=str(row.get("note") or ""),
            float_bytes=int(row["float_bytes"]),
            planned_bytes=int(row["planned_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CardError(
            f"the plan's row of {row.get('name')!r} is not whole ({type(error).__name__}: {error}).",
            "restore the manifest, or quantize again.",
        ) from error


def layer_rows(rows: Iterable[Mapping[str, Any]], tensors: Mapping[str, int] | None = None) -> list[LayerRow]:
    """Plan rows joined with the bytes of the checkpoint's tensors (name -> bytes).

    A tensor belongs to the longest row name that it starts with; where the files use other names, see below.
    """
    parsed = [_layer_row(row) for row in rows]
    if tensors is None:
        return parsed
    names = {row.name for row in parsed}
    stored: dict[str, int] = defaultdict(int)
    for tensor, nbytes in tensors.items():
        owner = tensor
        while owner and owner not in names:
            owner = owner.rpartition(".")[0]
        stored[owner] += nbytes
    if any(row.is_quantized and not stored[row.name] for row in parsed):
        # The files use other names than the modules. If they hold to the byte what was planned, so does every layer;
        # else the plan's bytes are all that can be told.
        if sum(tensors.values()) != sum(row.planned_bytes for row in parsed):
            return parsed
        stored.update({row.name: row.planned_bytes for row in parsed})
    return [LayerRow(**{**row.__dict__, "stored_bytes": stored[row.name]}) for row in parsed]


@dataclass(frozen=True)
class Family:
    """Layers that were treated alike: one line of the card's table."""

    patterns: tuple[str, ...]
    count: int
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    label: str
    method: str
    rule: str
    note: str
    float_bytes: int
    bytes_now: int

    @property
    def names(self) -> str:
        """The patterns as inline code."""
        shown = [code(pattern, in_table=True) for pattern in self.patterns[:_MAX_PATTERNS]]
        more = len(self.patterns) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    @property
    def sizes(self) -> str:
        """The shapes, ``576×1536``; at most three."""
        shown = ["×".join(map(str, shape)) or "scalar" for shape in self.shapes[:3]]
        more = len(self.shapes) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def families(rows: Sequence[LayerRow], model: Sequence[LayerRow], across_parents: bool = False) -> list[Family]:
    """Group ``rows`` of a ``model``: numbers in names become ``*`` (or the numbers, where not all layers of that name
    share the treatment), leaves under one parent become ``{a,b}``; ``across_parents`` also joins different parents.
    Order: by first appearance."""
    everyone: dict[str, set[int]] = defaultdict(set)
    for row in model:
        skeleton, number = _skeleton(row.name)
        everyone[skeleton].add(number)
    by_name: dict[tuple[str, tuple[str, ...]], list[LayerRow]] = defaultdict(list)
    for row in rows:
        skeleton, _ = _skeleton(row.name)
        by_name[skeleton, (row.kind, row.label, row.method, row.rule, row.note)].append(row)
    by_leaf: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, list[LayerRow]]]] = defaultdict(list)
    for (skeleton, treatment), members in by_name.items():
        numbers = {_skeleton(row.name)[1] for row in members}
        some = _ranges(sorted(numbers))
        which = "*" if numbers == everyone[skeleton] else some if len(numbers) == 1 else f"[{some}]"
        parent, _, leaf = skeleton.replace("*", which, 1).rpartition(".")
        by_leaf[parent, "" if across_parents else leaf if not parent else "", treatment].append((leaf, members))
    merged: dict[Any, list[tuple[str, list[LayerRow]]]] = defaultdict(list)
    for (parent, own, treatment), leaves in by_leaf.items():
        names = [leaf for leaf, _ in leaves]
        joined = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        pattern = f"{parent}.{joined}" if parent else joined
        members = [row for _, found in leaves for row in found]
        merged[treatment if across_parents else (parent, own, treatment)].append((pattern, members))
    return [_family(parts) for parts in merged.values()]


def _family(parts: Sequence[tuple[str, list[LayerRow]]]) -> Family:
    members = [row for _, found in parts for row in found]
    first = members[0]
    return Family(
        patterns=tuple(pattern for pattern, _ in parts),
        count=len(members),
        kind=first.kind,
        shapes=tuple(dict.fromkeys(row.shape for row in members)),
        label=first.label,
        method=first.method,
        rule=first.rule,
        note=first.note,
        float_bytes=sum(row.float_bytes for row in members),
        bytes_now=sum(row.bytes_now for row in members),
    )


def _skeleton(name: str) -> tuple[str, int]:
    """The name with every numeric part as ``*``, and its first number (-1 without one)."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return ".".join("*" if part.isdecimal() else part for part in parts), numbers[0] if numbers else -1


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,7`` for sorted numbers; cut after a few ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:_MAX_RANGES]]
    return ",".join(shown) + (",…" if len(runs) > _MAX_RANGES else "")
