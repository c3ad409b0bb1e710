"""The model card: a pure function of the recorded results, the provenance and the plan; only measured numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from hf_quant import card_samples, plots
from hf_quant.card_claims import claim, grids, limits, methods, scheme_summary, text_rows, vllm_reads
from hf_quant.card_depth import section as depth_section
from hf_quant.card_export import export_of
from hf_quant.card_facts import CheckpointFacts, Facts, copy_name, is_local, shown_base
from hf_quant.card_metadata import (
    INHERITED_KEYS,
    LIBRARY,
    TAG,
    BaseCard,
    check_finite,
    datasets_of,
    eval_results,
    hub_id,
    inherited,
    read_base_card,
    validate_card,
)
from hf_quant.card_snippets import Snippet, quantize_command, recipe_yaml, with_repo_id
from hf_quant.card_sources import (
    PROVENANCE_KEYS,
    check_provenance,
    check_whole,
    context_of,
    find_base_card,
    has_chat_template,
    read_results,
)
from hf_quant.card_tasks import section as task_section
from hf_quant.card_text import (
    amount,
    code,
    count_of,
    families,
    file_name,
    layer_rows,
    markdown,
    one_line,
    significant,
)
from hf_quant.checkpoint import (
    MANIFEST_FILE,
    README_FILE,
    RESULTS_FILE,
    atomic_write,
    read_headers,
    read_json,
    read_manifest,
    record_evidence,
)
from hf_quant.checkpoint.contents import UNRECORDED, list_files, matches
from hf_quant.errors import CardError
from hf_quant.evaluation.kinds import kind_of
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.provenance import EXPORT
from hf_quant.version import __version__

PLOTS_DIR = "plots"
TEMPLATE = "card_template.md"  # in the wheel; model_cards/template.md in the repository
BUDGET_PLOT = "budget"  # drawn when the budget was kept, from what is known only then

__all__ = [
    "BaseCard",
    "CardInputs",
    "CheckpointFacts",
    "compose",
    "read_base_card",
    "record_card",
    "render",
    "validate_card",
    "with_repo_id",
    "write_card",
]


@dataclass(frozen=True)
class CardInputs:
    """What a card is made from besides the files of its checkpoint; recorded, so that anybody can make it again.

    Attributes:
        name: title of the card.
        repo_id: what the snippets load.
        known: keys that replace those of the recorded provenance (the base model's Hub id).
        base: what is inherited from the base model's card; base_problem: why it could not be read.
        quantized_by: who made it.
        tags: beside those that follow from the checkpoint.
        measured: the card states results.
        version: of hf-quant, which words it.
    """

    name: str
    repo_id: str
    known: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    base_problem: str = ""
    quantized_by: str | None = None
    tags: Sequence[str] = ()
    measured: bool = True
    version: str = __version__


def render(
    results: EvaluationResult | None,
    provenance: Mapping[str, Any],
    plan_rows: Sequence[Mapping[str, Any]],
    checkpoint: CheckpointFacts,
    base: BaseCard | None = None,
) -> str:
    """The text of the card; reads nothing but its arguments.

    Args:
        results: what ``hf-quant evaluate`` measured; None makes a card that says that nothing was.
        provenance: the manifest's provenance.
        plan_rows: the manifest's plan: name, kind, shape, label, method, rule, note, float_bytes, planned_bytes.
        checkpoint: names, files and sizes.
        base: the base model's card; None when nobody looked.

    Raises:
        CardError: a fact that the card needs is missing, or a figure is not finite.
    """
    provenance = {"data": None, "base_revision": None, **provenance}
    missing = [key for key in PROVENANCE_KEYS if key not in provenance]
    if missing:
        raise CardError(f"the provenance lacks {', '.join(missing)}.", "quantize again with this version of hf-quant.")
    rows = layer_rows(plan_rows, checkpoint.tensors)
    if not any(row.is_quantized for row in rows):
        raise CardError("the plan names no quantized layer.", "quantize again with this version of hf-quant.")
    if results is not None:
        check_finite(results)
    base = base or BaseCard(problem="nobody looked for it")
    facts = Facts(provenance, tuple(rows), results)
    base_id = None if is_local(provenance) else hub_id(provenance["base_model"])
    files = [name for name, _ in checkpoint.files]
    passed_on = inherited(base, base_id, files)
    kind = kind_of(checkpoint.architecture)
    export = export_of(provenance, checkpoint, kind)
    task = passed_on.pop("pipeline_tag", kind.task)
    metadata = ModelCardData(
        **passed_on,
        base_model=base_id,
        base_model_relation="quantized" if base_id else None,
        library_name=None if export else LIBRARY,  # the Hub knows them by their files
        pipeline_tag=task,
        datasets=datasets_of(provenance),
        tags=list(dict.fromkeys((*_tags(facts), *map(one_line, checkpoint.tags)))),
        quantized_by=checkpoint.quantized_by,
        model_name=one_line(checkpoint.name),
        # figures of a checkpoint in another runtime are no figures of these files
        eval_results=eval_results(results, task or "text-generation") if results is not None and not export else None,
    )
    drawn = {Path(path).stem: (path, caption) for path, caption in checkpoint.plots}
    known: dict[str, Any] = {
        "metadata": metadata.to_yaml(),
        "name": checkpoint.name,
        "claim": export.claim(facts, grids(facts)) if export else claim(facts),
        "export": export,
        "scheme": scheme_summary(facts),
        "facts": facts,
        "results": results,
        "texts": text_rows(results),
        "provenance": provenance,
        "base_name": shown_base(provenance),
        "base_id": base_id,
        "copy_name": copy_name(provenance),
        "base": base,
        "license": passed_on.get("license"),
        "license_name": passed_on.get("license_name"),
        "license_link": passed_on.get("license_link"),
        "checkpoint": checkpoint,
        "plots": drawn,
        "auto_class": kind.auto_class,
        "snippet": Snippet(checkpoint, facts, kind),
        "samples": card_samples,
        "quantized": families([row for row in rows if row.is_quantized], rows),
        "kept": families([row for row in rows if not row.is_quantized], rows, across_parents=True),
        "methods": methods(facts),
        "recipe": recipe_yaml(provenance["recipe"]),
        "quantize_command": quantize_command(provenance, checkpoint),
        "vllm": kind.answers_text and not export and vllm_reads(facts),
        "limits": [
            *(export.limits() if export else ()),
            *limits(facts, kind.writes_text or kind.measure is None),
        ],
        "depth": depth_section(results, drawn) if results is not None else "",
        "tasks": task_section(results.tasks, drawn.get("tasks")) if results is not None else "",
    }
    try:
        text = _environment().from_string(_template()).render(known)
    except jinja2.UndefinedError as error:
        raise CardError(
            f"the card needs a fact that is not recorded: {error}.", "quantize and evaluate again."
        ) from error
    validate_card(text)
    return text


def write_card(
    directory: Path | str,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_card: BaseCard | None = None,
    quantized_by: str | None = None,
    tags: Sequence[str] = (),
    allow_unmeasured: bool = False,
) -> Path:
    """Write README.md and ``plots/`` of a checkpoint from what is recorded in it.

    Args:
        directory: a checkpoint written by hf-quant, evaluated.
        repo_id: the Hub id that the snippets show; default: the directory's name (``hf-quant push`` replaces it).
        base_model: the base model's Hub id, where the checkpoint was made from a local copy of it.
        base_card: the base model's card; default: read from the base model's directory or the Hub.
        quantized_by: who made it, for the metadata.
        tags: for the metadata, beside those that follow from the checkpoint.
        allow_unmeasured: without results, write a card that says so instead of raising.

    Returns:
        the path of README.md.

    Raises:
        CardError: no results, results of another checkpoint, or facts that are missing.
        CheckpointError: the directory is not a whole checkpoint of ours.
        OutputError: the files cannot be written.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_whole(directory, manifest)
    known: dict[str, Any] = {}
    recorded = manifest.provenance.get("base_model")
    if base_model is not None:
        if hub_id(base_model) is None:
            raise CardError(f"base_model={base_model!r} is not a Hub id.", "give it as org/name.")
        known = {"base_model": base_model, "base_model_is_local": False}
        if recorded and recorded != base_model:
            known["base_model_copy"] = recorded
    elif recorded and Path(str(recorded)).expanduser().is_dir():
        known["base_model_is_local"] = True
    if base_card is None:
        base_card = find_base_card({**manifest.provenance, **known}, recorded)
    if repo_id is not None and hub_id(repo_id) is None:
        raise CardError(f"repo_id={repo_id!r} is not a Hub id.", "give it as org/name.")
    name = repo_id.rpartition("/")[2] if repo_id else directory.resolve().name
    inputs = CardInputs(
        name=name,
        repo_id=repo_id or name,
        known=known,
        base={key: value for key in INHERITED_KEYS if isinstance(value := base_card.metadata.get(key), (str, list))},
        base_problem=base_card.problem,
        quantized_by=quantized_by,
        tags=list(tags),
        measured=(directory / RESULTS_FILE).is_file() or not allow_unmeasured,
    )
    text, drawn = compose(directory, inputs)
    _write_plots(directory / PLOTS_DIR, drawn)
    validate_card(text, directory)
    atomic_write(directory / README_FILE, text)
    record_card(directory, inputs)
    return directory / README_FILE


def record_card(directory: Path | str, inputs: CardInputs) -> None:
    """Record in the manifest what the card, its plots and the results are now, and what the card was made from."""
    names = [name for name in list_files(directory) if name != MANIFEST_FILE and matches(name, UNRECORDED)]
    record_evidence(directory, names, asdict(inputs))


def compose(directory: Path | str, inputs: CardInputs) -> tuple[str, list[plots.Plot]]:
    """The card of a checkpoint and its plots, from what is recorded in the directory; writes nothing.

    Raises:
        CardError: no results, results of another checkpoint, or facts that are missing.
        CheckpointError: the directory is not a whole checkpoint of ours.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    about = manifest.provenance.get(EXPORT)
    config = {} if about else read_json(directory, "config.json")
    if not about:
        check_provenance(directory, manifest.provenance, config)
    results = read_results(directory, manifest.provenance) if inputs.measured else None
    facts = CheckpointFacts(
        name=inputs.name,
        repo_id=inputs.repo_id,
        architecture=str(about["architecture"] if about else (config.get("architectures") or [""])[0]),
        model_type=str((about or config).get("model_type", "")),
        context=context_of(about or config),
        files=tuple((file, entry.bytes) for file, entry in sorted(manifest.files.items())),
        tensors=None if about else {tensor: info.nbytes for tensor, info in read_headers(directory).items()},
        chat=has_chat_template(directory, list(manifest.files)),
        custom_code=bool(config.get("auto_map")),
        quantized_by=inputs.quantized_by,
        tags=tuple(inputs.tags),
    )
    drawn = plots.draw(results, layer_rows(manifest.plan, facts.tensors))
    shown = tuple((f"{PLOTS_DIR}/{plot.name}.png", plot.caption) for plot in drawn)
    if manifest.provenance.get("budget") and (directory / PLOTS_DIR / f"{BUDGET_PLOT}.png").is_file():
        shown += ((f"{PLOTS_DIR}/{BUDGET_PLOT}.png", "The curve of least predicted loss that the budget chose from"),)
    provenance = {**manifest.provenance, **inputs.known}
    base = BaseCard(inputs.base, inputs.base_problem)
    return render(results, provenance, manifest.plan, replace(facts, plots=shown), base), drawn


def _template() -> str:
    packaged = resources.files("hf_quant").joinpath(TEMPLATE)
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    checkout = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    raise CardError("the card's template is not part of this installation.", "install hf-quant again.")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(
        md=markdown, code=code, amount=amount, count_of=count_of, figure=significant, local=file_name, plain=one_line
    )
    return environment


def _tags(facts: Facts) -> list[str]:
    grids = dict.fromkeys(row.label.split()[0] for row in facts.quantized)
    bits = dict.fromkeys("8-bit" if grid == "int8" else "4-bit" for grid in grids)
    return [TAG, "quantized", str(facts.provenance["format"]), *grids, *bits]


def _write_plots(folder: Path, drawn: Sequence[plots.Plot]) -> None:
    """Write the plots and remove those of an earlier card, which would show figures that no longer hold."""
    wanted = {f"{plot.name}{suffix}": data for plot in drawn for suffix, data in plot.files.items()}
    if wanted:
        folder.mkdir(exist_ok=True)
    for name, data in wanted.items():
        atomic_write(folder / name, data)
    for old in folder.glob("*") if folder.is_dir() else ():
        if old.suffix in (".png", ".svg") and old.name not in wanted and old.stem != BUDGET_PLOT:
            old.unlink()
