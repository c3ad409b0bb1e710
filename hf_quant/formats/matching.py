"""Lists of module names in configs: written compactly, and never matching more than they were made from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from hf_quant.errors import FormatError

REGEX = "re:"
_NUMBER = "#"


def compact(names: Iterable[str], universe: Collection[str]) -> list[str]:
    """Targets (exact names or ``re:`` patterns) that match ``names`` and nothing else in ``universe``.

    Names that differ only in numbers become one pattern: ``\\d+`` when every name of that form is meant, else an
    alternation of the numbers. Order follows ``names``.

    Args:
        names: module names, all in ``universe``.
        universe: every module name of the model that holds a weight.
    """
    forms: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        forms.setdefault(_form(name), []).append(name)
    targets: list[str] = []
    for form, members in forms.items():
        candidates = [] if len(members) == 1 else [_pattern(form, r"\d+")]
        if candidates and form.count(_NUMBER) == 1:
            position = form.index(_NUMBER)
            values = sorted({int(member.split(".")[position]) for member in members})
            candidates.append(_pattern(form, "(" + "|".join(map(str, values)) + ")"))
        meant = set(members)
        exact = (target for target in candidates if {name for name in universe if matches(target, name)} == meant)
        pattern = next(exact, None)
        targets += members if pattern is None else [pattern]
    return targets


def matches(target: str, name: str) -> bool:
    """compressed-tensors' rule: ``re:`` patterns match from the start of the name, anything else is the whole name.

    Raises:
        FormatError: the pattern is not a regular expression.
    """
    if not target.startswith(REGEX):
        return target == name
    try:
        return re.match(target[len(REGEX) :], name) is not None
    except re.error as error:
        raise FormatError(f"target {target!r} is not a regular expression: {error}.", "mend the config.") from error


def skip_keys(floats: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """``llm_int8_skip_modules`` that skips every name in ``floats`` and none in ``quantized``.

    A key is read as a regular expression at the start of a name *and* as a suffix, so ``fc1`` would skip every ``fc1``;
    names that do so (or that are no plain expression) are written as anchored expressions.
    """
    others = list(quantized)

    def key_of(name: str) -> str:
        is_plain = re.fullmatch(r"[\w.-]+", name) is not None
        if is_plain and not any(is_skipped(other, [name]) for other in others):
            return name
        return f"^{re.escape(name)}$"

    return [key_of(name) for name in floats]


def is_skipped(name: str, keys: Sequence[str]) -> bool:
    """transformers' rule (should_convert_module): a key skips ``name`` when it ends it, or matches its start up to a
    module boundary as a regular expression.

    Raises:
        FormatError: a key is not a regular expression.
    """
    for key in keys:
        try:
            if name.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name):
                return True
        except re.error as error:
            raise FormatError(f"llm_int8_skip_modules has {key!r}: {error}.", "mend the config.") from error
    return False


def _form(name: str) -> tuple[str, ...]:
    return tuple(_NUMBER if part.isdecimal() else part for part in name.split("."))


def _pattern(form: tuple[str, ...], number: str) -> str:
    parts = [number if part == _NUMBER else re.escape(part) for part in form]
    return REGEX + "^" + r"\.".join(parts) + "$"
