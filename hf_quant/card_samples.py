"""What a card says of models that continue no text: embeddings, classes, answers; from the recorded results alone."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import EvalResult

from hf_quant.card_text import code, listing, markdown, one_line, plain_figure, significant, value_only, with_interval
from hf_quant.evaluation.results import EvaluationResult, Figure, Interval, SampleResult

_MOST = 3
_CLAIMED = 2  # figures per set of samples, the first ones


def section(results: EvaluationResult | None) -> str:
    """Markdown of the accuracy tables, one for every group of samples with the same figures; ends in a blank line."""
    groups: dict[tuple[str, ...], list[SampleResult]] = {}
    for samples in results.samples if results is not None else ():
        groups.setdefault(tuple(figure.title for figure in samples.figures), []).append(samples)
    lines: list[str] = []
    for titles, members in groups.items():
        lines += ["| Samples | Model |" + "".join(f" {markdown(_headed(title))} |" for title in titles)]
        lines += ["|---|---|" + "---|" * len(titles)]
        for samples in members:
            name = f"{markdown(samples.name)} ({samples.samples:,} {markdown(samples.unit)})"
            for label, values in samples.rows():
                shown = [_cell(figure, value) for figure, value in zip(samples.figures, values, strict=True)]
                bold = f"**{label}**" if label == "quantized" else markdown(label)
                lines += [f"| {name} | {bold} | {' | '.join(shown)} |"]
                name = ""
        lines += ["", *[f"{markdown(note[:1].upper() + note[1:])}." for note in _notes(members)], ""]
    if lines:
        assert results is not None
        nats = any(figure.unit == "nats" for samples in results.samples for figure in samples.figures)
        lines += [
            f"{'KL is in nats. ' if nats else ''}Brackets are 95 % confidence intervals (bootstrap over samples, "
            f"{results.protocol.bootstrap_samples} resamples). The noise floor is the float model in another float "
            "dtype against itself: a difference below it means nothing.",
            "",
        ]
        if made_up := [samples.name for samples in results.samples if samples.synthetic]:
            lines += [
                f"**{markdown(listing(made_up)).capitalize()} are made up by hf-quant: no real data was measured.**",
                "",
            ]
    return "\n".join(lines) + "\n" if lines else ""


def claims(results: EvaluationResult) -> list[str]:
    """The first figures of the first sets of samples, for the line at the top."""
    found = []
    for samples in results.samples[:_MOST]:
        said = [f"{markdown(figure.title)} {_short(figure)}" for figure in samples.figures[:_CLAIMED]]
        found.append(f"{listing(said)} on {markdown(samples.name)}")
    return found


def limits(results: EvaluationResult) -> list[str]:
    """What must not be concluded from them."""
    if not results.samples:
        return []
    names = listing(
        [f"{markdown(samples.name)} ({samples.samples:,} {markdown(samples.unit)})" for samples in results.samples]
    )
    found = [
        f"Accuracy was measured on {names}, against the float model and not against a truth. Other data and tasks were "
        "not measured."
    ]
    for samples in results.samples:
        if samples.synthetic:
            found.append(
                f"The {markdown(samples.name)} are made up. How far the two models differ on real data was not "
                "measured: evaluate with `--media` and a folder of your own."
            )
        for figure in samples.figures[:1]:
            floor = figure.noise_floor
            if floor is not None and figure.name in ("kl", "embedding_distance") and figure.value.low <= floor.high:
                found.append(
                    f"On {markdown(samples.name)} the {markdown(figure.title)} is within the noise floor: no loss "
                    "could be measured there."
                )
    return found


def how(results: EvaluationResult) -> list[str]:
    """One Markdown list item per set of samples, for the section on the protocol."""
    return [
        f"- Samples {code(samples.name)}: {markdown(one_line(samples.source))}, "
        f"{samples.samples:,} {markdown(samples.unit)}"
        + (f", {samples.tokens:,} tokens" if samples.tokens else "")
        + f", SHA-256 {code(samples.sha256)}"
        for samples in results.samples
    ]


def speed_claim(results: EvaluationResult) -> str:
    """How much faster than the float model; empty where it was not measured."""
    before, after = (
        next((run for run in results.throughput if run.model == model), None) for model in ("float", "quantized")
    )
    if before is None or after is None or not before.samples_per_second > 0:
        return ""
    times = significant(after.samples_per_second / before.samples_per_second, 2)
    return f"{times}× the speed of {before.dtype} ({markdown(after.unit)} per second, one at a time)"


def speed_table(results: EvaluationResult | None) -> str:
    """Markdown of the throughput; empty where it was not measured."""
    runs = results.throughput if results is not None else ()
    if not runs:
        return ""
    assert results is not None
    lines = [
        f"| Model | Dtype | Kernels (layers) | Threads | Load | {markdown(runs[0].unit).capitalize()} per second |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        kernels = ", ".join(f"{markdown(name)} ({count})" for name, count in run.kernels.items()) or "–"
        lines.append(
            f"| {run.model} | {markdown(run.dtype)} | {kernels} | {run.threads} | {significant(run.load_seconds)} s | "
            f"{significant(run.samples_per_second)} |"
        )
    where = results.environment
    lines += [
        "",
        f"Medians of {runs[0].repeats} round(s) of {runs[0].samples} forward passes at batch 1 on "
        f"{markdown(where.cpu)} ({where.cores} cores; {markdown(where.machine)}).",
        "",
    ]
    return "\n".join(lines) + "\n"


def index(results: EvaluationResult, task: str) -> list[EvalResult]:
    """The model index: every figure of the quantized model."""
    found = []
    for samples in results.samples:
        slug = "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in samples.name.lower()).split())
        for figure in samples.figures:
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=slug or f"samples-{samples.sha256[:8]}",
                    dataset_name=one_line(samples.name) or slug,
                    dataset_args={"sha256": samples.sha256, "samples": samples.samples, "unit": samples.unit},
                    metric_type=figure.name,
                    metric_name=one_line(f"{figure.title}, against the float model"),
                    metric_value=plain_figure(figure.value.value),
                    metric_args={
                        "confidence_interval_95": [plain_figure(figure.value.low), plain_figure(figure.value.high)]
                    },
                )
            )
    return found


def _headed(title: str) -> str:
    return title[:1].upper() + title[1:]


def _notes(members: Sequence[SampleResult]) -> list[str]:
    return list(dict.fromkeys(note for samples in members for note in samples.notes))


def _cell(figure: Figure, value: Interval | None) -> str:
    if value is None:
        return "–"
    if figure.unit == "share":
        return with_interval(value, " %", factor=100)
    return with_interval(value, " %", sign=True) if figure.unit == "percent" else with_interval(value)


def _short(figure: Figure) -> str:
    value = figure.value
    if figure.unit == "share":
        scaled = Interval(value=100 * value.value, low=100 * value.low, high=100 * value.high)
        return f"{value_only(scaled)} %"
    if figure.unit == "percent":
        return f"{value_only(value, sign=True)} %"
    return f"{value_only(value)}{' nats' if figure.unit == 'nats' else ''}"
