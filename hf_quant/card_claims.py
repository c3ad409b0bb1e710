"""The sentences of a card that draw conclusions: the claim at its top, its accuracy rows, its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_quant import card_samples
from hf_quant.card_facts import LABEL, Facts, other_reference
from hf_quant.card_text import amount, code, listing, markdown, significant, value_only, with_interval
from hf_quant.evaluation.results import EvaluationResult, Figures, Protocol, TextResult
from hf_quant.provenance import EXPORT

_MOST_TEXTS = 3
_EXPERT = re.compile(r"\.experts\.\d+\.")
_METHODS = {
    "gptq": "rounds a weight column by column under the Hessian of its inputs on the calibration data (GPTQ), aiming "
    "at the float model's outputs, with searched and refitted scales",
    "search": "looks, without data, for the scale (and zero point) of each group that loses least",
    "absmax": "takes each scale from the largest weight of its group (round to nearest)",
}


def in_words(label: str) -> str:
    """``int4 sym g32`` -> ``int4, symmetric, one scale per 32 weights``."""
    match = LABEL.fullmatch(label)
    if match is None:
        return label
    parts = [match["grid"].upper() if match["grid"] in ("nf4", "fp4") else match["grid"]]
    if match["zero"]:
        parts.append("symmetric" if match["zero"] == "sym" else "asymmetric (with zero points)")
    group = match["group"]
    parts.append("one scale per output channel" if group == "per-channel" else f"one scale per {group[1:]} weights")
    if match["nested"]:
        parts.append("scales stored in 8 bits")
    return ", ".join(parts)


def methods(facts: Facts) -> list[tuple[str, str]]:
    """(name, what it does) of every method used; the second is empty for a method that this version does not know."""
    return [(name, _METHODS.get(name, "")) for name in dict.fromkeys(row.method for row in facts.quantized) if name]


def scheme_summary(facts: Facts) -> str:
    """Every scheme in words, with its share of the quantized weights where there are several."""
    counts = facts.weights_by_label
    if len(counts) == 1:
        return in_words(next(iter(counts)))
    total = facts.quantized_weights
    return "; ".join(f"{in_words(label)} ({100 * count / total:.0f} %)" for label, count in counts.items())


def grids(facts: Facts) -> str:
    """The grids of its weights, most first: ``int4 and int8``."""
    return " and ".join(dict.fromkeys(in_words(label).split(",")[0] for label in facts.weights_by_label))


def claim(facts: Facts) -> str:
    """One line of Markdown: what it is, how much smaller, what it costs, how fast; only what was measured."""
    results = facts.results
    bits = facts.bits_per_weight if results is None else results.size.bits_per_weight
    head = f"{grids(facts)} weights, {significant(bits)} bits each with their scales"
    if results is None:
        return f"{head}; accuracy, memory and speed were not measured"
    size = results.size
    parts = [_size_claim(size.float_disk_bytes, size.quantized_disk_bytes, results.reference_stored_dtype)]
    texts = results.texts[:_MOST_TEXTS]
    if texts:
        changes = [f"{value_only(t.perplexity_increase_percent, sign=True)} % on {markdown(t.name)}" for t in texts]
        losses = listing([value_only(text.kl) for text in texts])
        parts.append(f"perplexity {listing(changes)} (KL {losses} nats)")
    parts += card_samples.claims(results)
    if speed := _speed_claim(facts):
        parts.append(f"{speed} on {markdown(results.environment.cpu)}")
    return f"{head}: {', '.join(parts)}"


def _size_claim(before: int, after: int, dtype: str | None) -> str:
    stored = f"{amount(before)} in {dtype}" if dtype else amount(before)
    if after <= 0 or before <= after:
        return f"{amount(after)} on disk, no smaller than the float model ({stored})"
    return f"{significant(before / after, 2)}× smaller on disk than the float model ({stored} → {amount(after)})"


def _speed_claim(facts: Facts) -> str:
    """Decode and prefill against the float model: both, because one can gain what the other loses."""
    before, after = facts.speed("float"), facts.speed("quantized")
    if facts.results is not None and facts.results.throughput:
        return card_samples.speed_claim(facts.results)
    if before is None or after is None:
        return ""
    if not before.decode_tokens_per_second > 0 or not before.prefill_tokens_per_second > 0:
        return ""
    decode = significant(after.decode_tokens_per_second / before.decode_tokens_per_second, 2)
    prefill = significant(after.prefill_tokens_per_second / before.prefill_tokens_per_second, 2)
    runtime = ", on hf-quant's kernels," if facts.kernels else ""  # other loaders have speeds of their own
    return f"{decode}× the decode and {prefill}× the prefill speed of the float model in {before.dtype}{runtime}"


@dataclass(frozen=True)
class TextRow:
    """One line of the accuracy table."""

    text: str
    model: str
    perplexity: str
    increase: str
    kl: str
    kl_p99: str
    agreement: str


def text_rows(results: EvaluationResult | None) -> list[TextRow]:
    """The accuracy table: per text the float model, the quantized one and, if it was measured, the noise floor."""
    rows: list[TextRow] = []
    for text in results.texts if results is not None else ():
        assert results is not None
        rows.append(
            TextRow(
                markdown(text.name),
                f"float ({results.reference_dtype})",
                with_interval(text.perplexity_float),
                "",
                "",
                "",
                "",
            )
        )
        rows.append(
            TextRow(
                "",
                "**quantized**",
                with_interval(text.perplexity_quantized),
                with_interval(text.perplexity_increase_percent, " %", sign=True),
                with_interval(text.kl),
                significant(text.kl_p99),
                with_interval(text.top1_agreement, " %", factor=100),
            )
        )
        others: tuple[tuple[str, Figures | None], ...] = (
            ('quantized, with `activations="int8"`', text.int8_activations),
            (f"noise floor: float in {text.noise_floor.dtype}" if text.noise_floor else "", text.noise_floor),
        )
        for label, found in others:
            if found is not None:
                perplexity, kl = with_interval(found.perplexity), with_interval(found.kl)
                agreement = with_interval(found.top1_agreement, " %", factor=100)
                rows.append(TextRow("", label, perplexity, "", kl, "", agreement))
    return rows


def vllm_reads(facts: Facts) -> bool:
    """Whether vLLM has kernels for this layout: one 4-bit integer scheme in compressed-tensors for every linear but the
    head, rows and columns in multiples of 32. (vLLM fuses neighbouring projections, so they must all be alike.) Experts
    were never run there, so nothing is claimed of them."""
    if any(_EXPERT.search(row.name) for row in facts.quantized):
        return False
    labels = list(facts.weights_by_label)
    match = LABEL.fullmatch(labels[0]) if len(labels) == 1 else None
    if not facts.is_compressed_tensors or match is None or match["grid"] != "int4" or match["group"] == "per-channel":
        return False
    if int(match["group"][1:]) % 2 or any(size % 32 for row in facts.quantized for size in row.shape):
        return False
    if any(row.kind != "Linear" or row.rule != "default" for row in facts.quantized):
        return False
    return all(row.rule == "default skip" for row in facts.rows if row.kind == "Linear" and not row.is_quantized)


def limits(facts: Facts, generates: bool) -> list[str]:
    """What the reader must not conclude, as Markdown sentences.

    Args:
        facts: of the checkpoint.
        generates: it writes text, and so has a cache.
    """
    found = []
    results = facts.results
    if results is None:
        found.append("The accuracy of this checkpoint was not measured. Evaluate it before you rely on it.")
    elif not results.texts and not results.samples:
        found.append("Accuracy was not measured: the results hold no text.")
    if results is not None and results.texts:
        tokens = sum(text.tokens for text in results.texts)
        names = listing([markdown(text.name) for text in results.texts])
        found.append(
            f"Accuracy was measured on {tokens:,} tokens of {names}, in windows of {results.protocol.length} tokens. "
            "Other languages, domains, tasks and longer contexts were not measured."
        )
        found += [sentence for text in results.texts if (sentence := _significance(text))]
        found += [sentence for text in results.texts if (sentence := _estimated(text, results.protocol))]
    if results is not None:
        found += card_samples.limits(results)
        if other := other_reference(facts.provenance, results.reference):
            found.append(
                f"It was measured against a model named {code(results.reference)}; that this is its base model "
                f"({code(other)}) is its maker's word."
            )
    if EXPORT in facts.provenance:
        pass  # its runtime is another one; what the card says of that stands before these
    elif results is not None and (results.speed or results.throughput):
        found.append("Speed and memory hold for the machine, threads and kernels named above and for no other.")
    elif results is not None:
        found.append("Speed was not measured.")
    kept = "Activations and the KV cache keep" if generates else "Activations keep"
    found.append(f"Only weights are quantized. {kept} the dtype of the loaded model.")
    if facts.is_compressed_tensors:
        found.append(
            "Stock transformers expands compressed-tensors weights to the model's dtype at load or in the first "
            "forward pass: the file is small there, the memory is not; what is saved after that is no longer quantized."
        )
    found.append("It inherits the limits, biases and terms of use of its base model; quantization mends none of them.")
    return found


def _estimated(text: TextResult, protocol: Protocol) -> str:
    """A sentence for a divergence that was not computed from all logits; else empty."""
    if text.kl_error is None:
        return ""
    return (
        f"On {markdown(text.name)} the KL divergence is estimated: per position from the float model's "
        f"{protocol.kept_tokens} likeliest tokens and {protocol.drawn_tokens} tokens drawn from the others. That moves "
        f"its mean by less than {significant(text.kl_error)} (95 %) and makes its percentiles noisier. All other "
        "figures are exact."
    )


def _significance(text: TextResult) -> str:
    """A sentence for a text on which the loss could not be told from nothing; else empty."""
    if text.noise_floor is not None and text.kl.low <= text.noise_floor.kl.high:
        return f"On {markdown(text.name)} the KL divergence is within the noise floor: no loss could be measured there."
    change = text.perplexity_increase_percent
    if change.low <= 0 <= change.high:
        return f"On {markdown(text.name)} the change of perplexity cannot be told from zero (its interval holds zero)."
    return ""
