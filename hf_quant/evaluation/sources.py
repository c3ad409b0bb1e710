"""Opening what is compared: a directory, a Hub id or a model in memory; only whole models, of a kind with a measure."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from hf_quant.calibration.processors import LOADING_ERRORS, Part, load_part
from hf_quant.errors import DependencyError, EvaluationError, HfQuantError, OutputError
from hf_quant.evaluation.kinds import Kind, kind_of
from hf_quant.provenance import exported_as

Source: TypeAlias = "str | Path | PreTrainedModel"


@dataclass(frozen=True)
class Origin:
    """Where a model's files are.

    Attributes:
        label: how results name it: a Hub id, or a directory's own name (results travel; paths of a machine do not).
        directory: a local directory with its config and weights.
        model: the model itself when it was given in memory.
        trust_remote_code: its code may run.
        kind: what it is for, and so how it is loaded and measured.
    """

    label: str
    directory: Path
    model: PreTrainedModel | None
    trust_remote_code: bool
    kind: Kind

    @property
    def places(self) -> list[Path]:
        """Directories that can hold its tokenizer and the like: of a model in memory also the one it came from."""
        named = self.model.config._name_or_path if self.model is not None else ""
        return [self.directory, *([Path(named)] if named else [])]

    def load(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """A fresh copy from the files, in eval mode.

        Raises:
            EvaluationError: it cannot be loaded, or weights are missing or of the wrong shape.
            DependencyError: the package that reads its format is not installed.
        """
        options: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
        try:
            model, report = getattr(transformers, self.kind.auto_class).from_pretrained(
                str(self.directory),
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **options,
            )
        except HfQuantError:
            raise
        except ImportError as error:
            raise DependencyError(f"{self.label} cannot be loaded: {error}", "install what it names.") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"transformers cannot load {self.label}: {_first_line(error)}.",
                "check that the directory is a whole checkpoint.",
            ) from error
        for kind in ("missing_keys", "mismatched_keys"):
            keys = sorted(str(key) for key in report.get(kind) or ())
            if keys:
                raise EvaluationError(
                    f"{self.label} has {len(keys)} {kind.replace('_', ' ')}, first {keys[0]}: transformers would fill "
                    "them with random numbers.",
                    "the checkpoint is incomplete or belongs to another architecture.",
                )
        return model.eval()

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of its parameters and buffers in a dtype, without reading its weights."""
        auto = getattr(transformers, self.kind.auto_class)
        config = AutoConfig.from_pretrained(str(self.directory), trust_remote_code=self.trust_remote_code)
        with torch.device("meta"):
            skeleton = auto.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        # parameters() and buffers() name a shared tensor once
        return sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers()))


@contextmanager
def opened(
    source: Source, role: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Iterator[Origin]:
    """Resolve a source to files; a model in memory is saved to a temporary directory for as long as it is measured.

    Args:
        source: a directory, a Hub id or a model.
        role: ``candidate`` or ``reference``, for errors.
        trust_remote_code: allow code that comes with the model.
        revision: of a Hub id.

    Raises:
        EvaluationError: nothing is there, or it is of a kind without a measure.
        OutputError: no space for the temporary copy.
    """
    if isinstance(source, PreTrainedModel):
        with tempfile.TemporaryDirectory(prefix="hf-quant-") as folder:
            try:
                source.save_pretrained(folder)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise OutputError(
                    f"no space in {tempfile.gettempdir()} for a copy of the {role}.",
                    "set TMPDIR to a larger disk, or pass a directory instead of a model.",
                ) from error
            label = Path(source.config._name_or_path or type(source).__name__).name
            kind = _measurable(source.config, label, type(source).__name__)
            yield Origin(label, Path(folder), source, trust_remote_code, kind)
        return
    directory = Path(source)
    if directory.is_dir():
        label = directory.resolve().name
    elif isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        label = source
        directory = _snapshot(source, role, revision)
    else:
        raise EvaluationError(f"the {role} {str(source)!r} does not exist.", "give a directory or a Hub id.")
    if exported := exported_as(directory):
        raise EvaluationError(
            f"the {role} {label} holds {exported} files, which transformers does not load as they are.",
            "evaluate the checkpoint that they were converted from.",
        )
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(
            f"the {role} {label} has no config that transformers can read: {_first_line(error)}.",
            "give the directory of a model (with config.json).",
        ) from error
    architectures = getattr(config, "architectures", None) or [""]
    yield Origin(label, directory, None, trust_remote_code, _measurable(config, label, architectures[0]))


def load_tokenizer(reference: Origin, candidate: Origin) -> Any:
    """The reference's tokenizer, or the candidate's where the reference has none; raises EvaluationError."""
    return load_beside("tokenizer", reference, candidate)


def load_beside(part: Part, *origins: Origin) -> Any:
    """What lies beside a model, of the first that has it: a tokenizer, an image processor, a feature extractor.

    Raises:
        EvaluationError: none of them has one that loads.
        DependencyError: it needs torchvision, which cannot be imported.
    """
    what = part.replace("_", " ")
    problems = []
    for origin in origins:
        for place in origin.places:
            try:
                return load_part(part, place, origin.trust_remote_code)
            except DependencyError:
                raise
            except LOADING_ERRORS as error:
                problems.append(f"{origin.label}: {_first_line(error)}")
    raise EvaluationError(
        f"neither model has a {what} that loads ({'; '.join(problems)}).",
        f"pass {what.split()[-1]}=..., or save the {what} beside the model.",
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers inside our own."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def timed_load(origin: Origin, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, float]:
    """A fresh copy and the seconds until it was ready (its files usually lie in the system's page cache by then)."""
    start = time.perf_counter()
    model = origin.load(dtype, device)
    synchronize(device)
    return model, time.perf_counter() - start


def checked_device(device: str | None) -> str:
    """``device``, default ``cpu``; raises EvaluationError where torch does not know it or this machine lacks it."""
    try:
        asked = torch.device(device or "cpu")
    except RuntimeError as error:
        raise EvaluationError(f"{device!r} is no device of torch.", "use cpu, cuda, cuda:0, mps ...") from error
    if asked.type != "cpu":
        module = getattr(torch, asked.type, None)
        count = module.device_count() if module is not None and module.is_available() else 0
        if (asked.index or 0) >= count:
            what = f"has {count} of that kind" if count else "has none, or this build of torch cannot use it"
            raise EvaluationError(
                f"device {device!r} cannot be used: this machine {what}.", "choose another one: --device cpu."
            )
    return str(asked)


def synchronize(device: str) -> None:
    """Wait for the device; a no-op on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def _snapshot(name: str, role: str, revision: str | None) -> Path:
    """The local snapshot of a Hub id with its safetensors (downloaded if need be)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        if cached_file(name, "config.json", revision=revision) is None:
            raise OSError("it has no config.json")
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise EvaluationError(
            f"the {role} {name!r} is neither a directory nor a model that can be reached: {_first_line(error)}.",
            "give a directory with config.json and *.safetensors, or a Hub id (and be online).",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _measurable(config: Any, label: str, architecture: str) -> Kind:
    """The kind of a model, if there is a measure for it; raises EvaluationError."""
    kind = kind_of(architecture, config)
    if kind.measure is None:
        raise EvaluationError(
            f"there is no measure for {label} ({architecture or config.model_type}).",
            "evaluate a model that continues text, an encoder, an encoder-decoder of text or speech, a classifier, or "
            "a model of images and captions.",
        )
    return kind
