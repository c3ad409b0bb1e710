"""A card's metadata block: what the base model passes on, the model index, and an offline check of the whole card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from hf_quant import card_samples
from hf_quant.card_text import LOCAL_PATH, one_line, plain_figure
from hf_quant.errors import CardError
from hf_quant.evaluation.results import EvaluationResult, Interval
from hf_quant.evaluation.task_results import TaskRun, label_of
from hf_quant.texts import HUB_PREFIX

# The identifiers that the Hub accepts in `license` (hub-docs, repositories-licenses); it refuses a card with another.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense
    wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
LIBRARY = "transformers"
TAG = "hf-quant"
EXPORT_TAGS = ("gguf", "onnx", "openvino", "modelopt")  # files that transformers is not the library of
_YAML_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_UNFINISHED = ("[More Information Needed]", "{{ card_data }}")
_RELATIONS = ("quantized", "finetune", "adapter", "merge")

# what a card takes over from the base model's
INHERITED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class BaseCard:
    """The metadata of the base model's own card.

    Attributes:
        metadata: its keys; empty when there is no card or it could not be read.
        problem: why it could not be read; empty when it was, or when the base model has none.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_base_card(base_model: str | None, revision: str | None = None) -> BaseCard:
    """Read the README.md of the base model: from its directory, else from the Hub (or its cache when offline)."""
    if not base_model:
        return BaseCard(problem="the checkpoint does not record its base model")
    local = Path(base_model).expanduser()
    if local.is_dir():
        path = local / "README.md"
        if not path.is_file():
            return BaseCard()
    else:
        try:
            path = Path(hf_hub_download(base_model, "README.md", revision=revision))
        except HFValidationError:
            return BaseCard(problem="its directory is not on this machine and its name is not a Hub id")
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            return BaseCard(problem="the Hub could not be reached")
        except EntryNotFoundError:
            return BaseCard()
        except (HfHubHTTPError, HTTPError, OSError) as error:
            return BaseCard(problem=f"the Hub did not give it: {type(error).__name__}")
    try:
        block = _YAML_BLOCK.match(path.read_text(encoding="utf-8-sig"))
        metadata = yaml.safe_load(block.group(1)) if block else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return BaseCard(problem=f"its README.md cannot be parsed ({type(error).__name__})")
    if metadata is not None and not isinstance(metadata, dict):
        return BaseCard(problem="the metadata of its README.md is not a mapping")
    return BaseCard(metadata or {})


def hub_id(name: str | None) -> str | None:
    """``name`` if it can be the id of a model on the Hub, else None."""
    if not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def inherited(base: BaseCard, base_id: str | None, files: Sequence[str]) -> dict[str, Any]:
    """License, language and pipeline tag that the base model's card states, in the form that the Hub accepts."""
    metadata = base.metadata
    result: dict[str, Any] = {}
    license_id = metadata.get("license")
    if isinstance(license_id, list) and len(license_id) == 1:
        license_id = license_id[0]
    if isinstance(license_id, str) and license_id.strip():
        known = license_id.strip().lower()
        if known in LICENSES:
            result["license"] = known
        else:  # the Hub would refuse the card; "other" with the name says the same thing
            result["license"] = "other"
            result["license_name"] = re.sub(r"[^a-z0-9.+]+", "-", known).strip("-") or "unnamed"
        name, link = metadata.get("license_name"), metadata.get("license_link")
        if isinstance(name, str) and name.strip():
            result["license_name"] = one_line(name)
        if isinstance(link, str) and (absolute := _license_link(link.strip(), base_id, files)):
            result["license_link"] = absolute
    languages = metadata.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    # YAML reads a bare Norwegian `no` as False
    codes = ["no" if code is False else str(code).strip() for code in listed if code is not None]
    if kept := [code for code in dict.fromkeys(codes) if _LANGUAGE.fullmatch(code)]:
        result["language"] = kept
    tag = metadata.get("pipeline_tag")
    if isinstance(tag, str) and _SLUG.fullmatch(tag):
        result["pipeline_tag"] = tag
    return result


def datasets_of(provenance: Mapping[str, Any]) -> list[str] | None:
    """The Hub dataset that it was calibrated on, as the Hub names it."""
    source = str((provenance.get("data") or {}).get("source") or "")
    if not source.startswith(HUB_PREFIX):
        return None
    name = hub_id(source.removeprefix(HUB_PREFIX).split(":")[0].partition("@")[0])
    return [name] if name else None


def _license_link(link: str, base_id: str | None, files: Sequence[str]) -> str | None:
    """A link that also works from the new repository: relative ones are pointed at the base model's."""
    if re.match(r"https?://", link) or link in files:
        return link
    if base_id and re.fullmatch(r"[\w.\-]+", link):
        return f"https://huggingface.co/{base_id}/blob/main/{link}"
    return None


def eval_results(results: EvaluationResult, task: str) -> list[EvalResult]:
    """The model index: per text perplexity, KL divergence and top-1 agreement; per set of samples every figure."""
    found: list[EvalResult] = []
    used: set[str] = set()
    for text in results.texts:
        slug = re.sub(r"[^a-z0-9]+", "-", text.name.lower()).strip("-")
        if not slug or slug in used:  # results of one dataset type would be merged into one
            slug = f"{slug or 'text'}-{text.sha256[:8]}"
        used.add(slug)
        window = {"windows": results.protocol.windows, "length": results.protocol.length}
        dataset = {"sha256": text.sha256, "tokens": text.tokens, **window}
        for kind, name, interval in (
            ("perplexity", "Perplexity", text.perplexity_quantized),
            ("perplexity_increase_percent", "Perplexity increase over float (%)", text.perplexity_increase_percent),
            ("kl_divergence", "KL(float || quantized), nats per token", text.kl),
            ("top1_agreement", "Top-1 agreement with the float model", text.top1_agreement),
        ):
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=slug,
                    dataset_name=one_line(text.name) or slug,
                    dataset_args=dataset,
                    metric_type=kind,
                    metric_name=name,
                    metric_value=plain_figure(interval.value),
                    metric_args={"confidence_interval_95": [plain_figure(interval.low), plain_figure(interval.high)]},
                )
            )
    return found + card_samples.index(results, task) + _task_results(results.tasks, task, used)


def _task_results(runs: Sequence[TaskRun], task: str, used: set[str]) -> list[EvalResult]:
    """Per task the quantized model's scores; the data set by its Hub id where that tells the tasks apart."""
    found: list[EvalResult] = []
    for run in runs:
        for item in run.tasks:
            key = item.dataset if item.dataset and hub_id(item.dataset) and "/" in item.dataset else item.name
            if (taken := f"{key} {item.dataset_config} {item.split}") in used or key in used:
                key = taken = item.name
            used.add(taken)
            for metric in item.metrics:
                error = {} if metric.quantized_stderr is None else {"stderr": plain_figure(metric.quantized_stderr)}
                found.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=key,
                        dataset_name=one_line(item.name),
                        dataset_config=item.dataset_config,
                        dataset_split=item.split,
                        dataset_args={"num_few_shot": item.num_fewshot, "items": item.items, "version": item.version},
                        metric_type=metric.metric,
                        metric_name=label_of(item, metric),
                        metric_value=plain_figure(metric.quantized_value),
                        metric_args={"float_value": plain_figure(metric.float_value), **error},
                    )
                )
    return found


def check_finite(results: EvaluationResult) -> None:
    """Raise CardError when a measured figure is NaN or infinite."""
    for text in results.texts:
        for name, value in text:
            figures = [value.value, value.low, value.high] if isinstance(value, Interval) else [value]
            if any(isinstance(figure, float) and not math.isfinite(figure) for figure in figures):
                raise CardError(
                    f"the measured {name} on {text.name!r} is not a finite number.",
                    "the quantized model is broken, or the text is: evaluate again after mending it.",
                )
    for samples in results.samples:
        for one in samples.figures:
            known = [found for found in (one.value, one.noise_floor, one.int8_activations) if found is not None]
            if not all(math.isfinite(figure) for found in known for figure in (found.value, found.low, found.high)):
                raise CardError(
                    f"the measured {one.name} on {samples.name!r} is not a finite number.",
                    "the quantized model is broken, or a sample is: evaluate again after mending it.",
                )


def validate_card(text: str, directory: Path | str | None = None) -> None:
    """Check a card offline, as far as the Hub's rules and ours can be checked without it.

    Args:
        text: the whole README.md.
        directory: when given, the images that the card shows must be in it.

    Raises:
        CardError: naming the first thing that is wrong.
    """
    block = _YAML_BLOCK.match(text)
    if block is None:
        raise CardError("the card has no metadata block (--- ... ---) at its top.", _WRITE_AGAIN)
    try:
        metadata = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        raise CardError(f"the card's metadata is not valid YAML: {one_line(error)}.", _WRITE_AGAIN) from error
    if not isinstance(metadata, dict):
        raise CardError("the card's metadata is not a mapping.", _WRITE_AGAIN)
    _check_keys(metadata)
    if metadata.get("model-index") is not None:
        _check_model_index(metadata["model-index"])
    try:
        ModelCardData(**ModelCard(text, ignore_metadata_errors=False).data.to_dict())
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CardError(f"huggingface_hub cannot read the card's metadata: {one_line(error)}.", _WRITE_AGAIN) from error
    for leftover in _UNFINISHED:
        if leftover in text:
            raise CardError(f"the card still holds the placeholder {leftover!r}.", "fill it in or remove it.")
    if leak := LOCAL_PATH.search(text):
        raise CardError(
            f"the card shows a path of the machine that made it: {leak.group()!r}.", "replace it by a name."
        )
    if directory is not None:
        for image in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
            if "://" not in image and not (Path(directory) / image).is_file():
                raise CardError(f"the card shows {image}, which is not in the checkpoint.", _WRITE_AGAIN)


_WRITE_AGAIN = "write it again with `hf-quant card`."


def _check_keys(metadata: Mapping[str, Any]) -> None:
    def wrong(key: str, expected: str) -> CardError:
        return CardError(f"the card's metadata has {key}: {metadata.get(key)!r}.", f"{key} must be {expected}.")

    tags = metadata.get("tags")
    exported = isinstance(tags, list) and any(tag in EXPORT_TAGS for tag in tags)
    if metadata.get("library_name") != (None if exported else LIBRARY):
        raise wrong("library_name", "left out" if exported else LIBRARY)
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags) or TAG not in tags:
        raise wrong("tags", f"a list of words with {TAG} among them")
    base = metadata.get("base_model")
    bases = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(item, str) and hub_id(item) for item in bases):
        raise wrong("base_model", "a Hub id such as org/name")
    if bases and metadata.get("base_model_relation") not in _RELATIONS:
        raise wrong("base_model_relation", f"one of {', '.join(_RELATIONS)}")
    license_id = metadata.get("license")
    if license_id is not None and license_id not in LICENSES:
        raise wrong("license", "an identifier that the Hub knows, in lower case (else: other, with license_name)")
    if license_id == "other" and not (isinstance(metadata.get("license_name"), str) and metadata["license_name"]):
        raise wrong("license_name", "given when the license is other")
    languages = metadata.get("language")
    for language in languages if isinstance(languages, list) else [] if languages is None else [languages]:
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            raise wrong("language", "ISO 639 codes (quote `no`, which YAML reads as false)")
    tag = metadata.get("pipeline_tag")
    if tag is not None and not (isinstance(tag, str) and _SLUG.fullmatch(tag)):
        raise wrong("pipeline_tag", "a task of the Hub such as text-generation")


def _check_model_index(index: object) -> None:
    def wrong(what: str) -> CardError:
        return CardError(f"the card's model-index {what}.", _WRITE_AGAIN)

    if not isinstance(index, list) or not index:
        raise wrong("is not a list of models")
    for entry in index:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise wrong("has an entry without a name")
        if not isinstance(entry.get("results"), list) or not entry["results"]:
            raise wrong(f"has no results for {entry['name']!r}")
        for result in entry["results"]:
            parts = result if isinstance(result, dict) else {}
            for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
                given = parts.get(key)
                if not isinstance(given, dict) or not all(isinstance(given.get(n), str) and given[n] for n in needed):
                    raise wrong(f"has a result without {key} {' and '.join(needed)}")
            metrics = parts.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                raise wrong("has a result without metrics")
            for metric in metrics:
                if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
                    raise wrong("has a metric without a type")
                value = metric.get("value")
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise wrong(f"gives {metric['type']} the value {value!r}, which is not a finite number")
