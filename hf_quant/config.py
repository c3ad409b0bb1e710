"""HfQuantConfig: what the user asks for; validated, strict, serialisable."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.errors import ConfigError
from hf_quant.grids import PER_CHANNEL, GridName, Scheme

QUANT_METHOD = "hf_quant"
LEAVE_IN_FLOAT = "float"
DEFAULT_GROUP = {4: 32, 8: 128}
DEFAULT_TABLE_GROUP = 64
SCHEME_KEYS = ("bits", "grid", "symmetric", "group_size", "double_quant", "method")
CALIBRATED = "gptq"  # the method that needs data

MethodName = Literal["search", "absmax", "gptq"]
PresetName = Literal["fast", "balanced", "best"]
# what each preset means where the user says nothing else
_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "search"},
    "balanced": {"method": CALIBRATED, "samples": 32},
    "best": {"method": CALIBRATED, "samples": 96, "tuning": {}},
}
PRESETS = tuple(_PRESETS)


class _LayerRequest(BaseModel):
    """The keys that an override may set; None means: as the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bits: Literal[4, 8] | None = None
    grid: GridName | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    double_quant: bool | None = None
    method: MethodName | None = None


class Calibration(BaseModel):
    """What the model is run on to calibrate it.

    Attributes:
        source: ``self`` (text sampled from the model), ``docs``, ``prose``, a file, ``hub:...``, ``images:DIR`` or
            ``audio:DIR``; see :func:`hf_quant.calibration.load_calibration`.
        samples: sequences, images or clips.
        length: tokens per sequence.
        seed: of the sampling.
        fold: first rescale input channels where the layer before can take the factors back.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str = Field(default="self", min_length=1)
    samples: int = Field(default=32, ge=2)
    length: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)
    fold: bool = True


class Tuning(BaseModel):
    """End-to-end distillation of scales, norms and biases against the float model, after the layers are quantized.

    Attributes:
        steps: optimizer steps; each sees ``batch`` sequences. 0 is no tuning.
        learning_rate: of the scales, as a share of each scale; norms and biases take a tenth of it.
        batch: sequences per step.
        block_steps: optimizer steps before that for every block alone, towards the float model's output of it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    steps: int = Field(default=64, ge=0)
    learning_rate: float = Field(default=3e-4, gt=0, le=0.1)
    batch: int = Field(default=4, ge=1)
    block_steps: int = Field(default=0, ge=0)


class _Request(_LayerRequest):
    overrides: dict[str, _LayerRequest | Literal["float"]] = Field(default_factory=dict)
    skip: list[str] = Field(default_factory=list)
    on_indivisible: Literal["nearest", "error"] = "nearest"
    scale_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kernel: str = "auto"
    activations: Literal["float", "int8"] = "float"
    dequantize: bool = False
    preset: PresetName | None = None
    calibration: Calibration | None = None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class LayerRequest:
    """A complete request for one layer, before its shape is known."""

    scheme: Scheme
    method: MethodName


class HfQuantConfig(QuantizationConfigMixin):
    """The quantizer config for ``AutoModel*.from_pretrained(..., quantization_config=HfQuantConfig(...))``.

    Args:
        bits: 4 (default) or 8.
        grid: ``int`` (uniform, published as compressed-tensors), ``nf4`` or ``fp4`` (published as bitsandbytes).
        symmetric: without zero points (default); False adds a zero point per group (grid ``int`` only).
        group_size: input columns that share a scale; -1 is per output channel. Default: 32 at 4 bits, 128 at 8 bits, 64
            on the table grids.
        method: ``search`` (default: data-free adaptive scales), ``gptq`` (calibrated: Hessian-guided rounding towards
            the float model's outputs) or ``absmax`` (the round-to-nearest baseline; min/max when asymmetric).
        double_quant: store the scales of a table grid as 8-bit codes (default for nf4 and fp4).
        overrides: per-module changes: ``{pattern: {key: value, ...}}`` or ``{pattern: "float"}``. An exact module name
            wins over every other pattern; the rest are tried in order: ``re:`` + a regular expression that matches the
            whole name, or the name of a subtree (``model.layers.0``) or of a leaf (``down_proj``). The output head is
            quantized when an override names it exactly (``lm_head``); where it is tied to the embedding, the two are
            untied and the embedding stays in float. Embeddings are quantized (without data) when an override names them
            (``model.embed_tokens``, ``embed_tokens`` or a ``re:``; the name of a subtree does not); a tied output head
            then computes with the same packed table.
        skip: patterns (as above) of modules that stay in float, in addition to the defaults (output head, tied
            weights, modules that the model keeps in float32).
        on_indivisible: ``nearest`` takes the largest power-of-two group that divides the row (else the whole row) and
            says so in the plan; ``error`` raises PlanError.
        scale_dtype: dtype of the stored scales; ``auto`` is float16 for float16 models, else bfloat16 (exactly
            representable in every dtype that stock loaders cast to).
        kernel: ``auto``, ``native``, ``cpu``, ``bitsandbytes`` or ``reference``.
        activations: ``float`` (default: exact to rounding) or ``int8``: kernels that can (``native``, on the int grids)
            round the activations to 8 bits on the fly, which is faster and adds an error of its own.
        dequantize: when loading a quantized checkpoint, expand it to a plain float model.
        preset: ``fast`` (data-free, seconds), ``balanced`` (calibrated) or ``best`` (calibrated on more data, then
            tuned end to end): fills ``method``, ``calibration`` and ``tuning`` where they are not given.
        calibration: keys of :class:`Calibration`, for method ``gptq``.
        tuning: keys of :class:`Tuning`: distil scales and norms at the end; needs method ``gptq``.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or a contradiction.
    """

    def __init__(
        self,
        bits: int | None = None,
        grid: str | None = None,
        symmetric: bool | None = None,
        group_size: int | None = None,
        method: str | None = None,
        double_quant: bool | None = None,
        overrides: Mapping[str, Mapping[str, Any] | str] | None = None,
        skip: Sequence[str] | None = None,
        on_indivisible: str = "nearest",
        scale_dtype: str = "auto",
        kernel: str = "auto",
        activations: str = "float",
        dequantize: bool = False,
        preset: str | None = None,
        calibration: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            _raise_unknown(next(iter(unknown)), [*SCHEME_KEYS, *_OTHER_KEYS])
        if str(quant_method) != QUANT_METHOD:
            raise ConfigError(
                f"quant_method={quant_method!r} is not {QUANT_METHOD!r}.",
                "drop the key, or use the config class it names.",
            )
        if isinstance(skip, str):
            raise ConfigError(f"skip={skip!r} is a string.", "pass a list of patterns.")
        request = _validate(
            _Request,
            {
                "bits": bits,
                "grid": grid,
                "symmetric": symmetric,
                "group_size": group_size,
                "method": method,
                "double_quant": double_quant,
                "overrides": {k: dict(v) if isinstance(v, Mapping) else v for k, v in (overrides or {}).items()},
                "skip": list(skip or ()),
                "on_indivisible": on_indivisible,
                "scale_dtype": scale_dtype,
                "kernel": kernel,
                "activations": activations,
                "dequantize": dequantize,
                "preset": preset,
                "calibration": calibration,
                "tuning": tuning,
            },
            "config",
        )
        meaning = _PRESETS.get(request.preset or "", {})
        request.method = request.method or meaning.get("method")
        self.quant_method = QUANT_METHOD
        default = _complete(request, None, "config")
        self.bits = default.scheme.bits
        self.grid: GridName = default.scheme.grid
        self.symmetric = default.scheme.symmetric
        self.group_size = default.scheme.group_size
        self.double_quant = default.scheme.double_quant
        self.method: MethodName = default.method
        self.overrides: dict[str, dict[str, Any] | str] = {
            pattern: value if isinstance(value, str) else value.model_dump(exclude_none=True)
            for pattern, value in request.overrides.items()
        }
        self.skip = list(request.skip)
        self.on_indivisible = request.on_indivisible
        self.scale_dtype = request.scale_dtype
        self.kernel = request.kernel
        self.activations = request.activations
        self.dequantize = request.dequantize
        self.preset = request.preset
        self._check_overrides()
        self._settle_calibration(request, meaning)

    def _settle_calibration(self, request: _Request, meaning: dict[str, Any]) -> None:
        """Fill the sections of the calibrated method, or say that they have no use."""
        requests = [self.default, *filter(None, map(self.override, self.overrides))]
        self.calibration: dict[str, Any] | None = None
        self.tuning: dict[str, Any] | None = None
        if any(found.method == CALIBRATED for found in requests):
            given = request.calibration.model_dump(exclude_unset=True) if request.calibration else {}
            samples = {"samples": meaning["samples"]} if "samples" in meaning else {}
            self.calibration = Calibration(**{**samples, **given}).model_dump()
            tuning = request.tuning or ("tuning" in meaning and Tuning())
            self.tuning = (
                tuning.model_dump() if tuning and (tuning.steps or tuning.block_steps or "tuning" in meaning) else None
            )
            return
        for section in ("calibration", "tuning"):
            if getattr(request, section) is not None:
                raise ConfigError(
                    f"{section} is given, but no layer has method={CALIBRATED}.",
                    f"use preset=balanced or best, or method={CALIBRATED}; or drop {section}.",
                )

    @property
    def default(self) -> LayerRequest:
        """What a layer gets that no override names."""
        scheme = Scheme(self.grid, self.bits, self.symmetric, self.group_size, self.double_quant)
        return LayerRequest(scheme, self.method)

    def override(self, pattern: str) -> LayerRequest | None:
        """The complete request of an override; None when it leaves the layer in float."""
        value = self.overrides[pattern]
        if isinstance(value, str):
            return None
        return _complete(_LayerRequest.model_validate(value), self.default, f"override {pattern!r}")

    def _check_overrides(self) -> None:
        table = {self.default.scheme.grid != "int"}
        for pattern in self.overrides:
            request = self.override(pattern)
            if request is not None:
                table.add(request.scheme.grid != "int")
        if len(table) > 1:
            raise ConfigError(
                "the config mixes grid int with nf4/fp4; no published format holds both in one checkpoint.",
                "use int4/int8 together, or nf4/fp4 together.",
            )

    @classmethod
    def from_recipe(cls, path: str | Path, **changes: Any) -> HfQuantConfig:
        """Read a YAML recipe (see ``configs/``); keyword arguments that are not None replace its keys.

        Raises:
            ConfigError: the file is missing, is not a YAML mapping, or holds a bad key or value.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}.", "pass the path of a YAML file.") from error
        if not isinstance(content, dict):
            raise ConfigError(f"recipe {path} is not a mapping of keys.", "see configs/ for examples.")
        try:
            return cls(**{**content, **{key: value for key, value in changes.items() if value is not None}})
        except TypeError as error:
            raise ConfigError(f"recipe {path}: {error}.", "keys must be strings.") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``HfQuantConfig(**...)`` accepts."""
        return copy.deepcopy({k: v for k, v in self.__dict__.items() if not k.startswith("_")})

    def get_loading_attributes(self) -> dict[str, Any]:
        """Keys that may differ between the checkpoint and the call that loads it."""
        return {"kernel": self.kernel, "activations": self.activations, "dequantize": self.dequantize}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


_OTHER_KEYS = (
    "overrides",
    "skip",
    "on_indivisible",
    "scale_dtype",
    "kernel",
    "activations",
    "dequantize",
    "preset",
    "calibration",
    "tuning",
)


def _raise_unknown(key: str, known: Sequence[str]) -> None:
    near = difflib.get_close_matches(key, known, n=2)
    raise ConfigError(
        f"unknown config key {key!r}.",
        f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}.",
    )


def _validate(model: type[_Request], data: dict[str, Any], where: str) -> _Request:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if not str(part).startswith(("_LayerRequest", "literal["))]
        if first["type"] == "extra_forbidden":
            sections: dict[str, type[BaseModel]] = {"calibration": Calibration, "tuning": Tuning}
            section = sections.get(location[0])
            _raise_unknown(location[-1], list(section.model_fields) if section else SCHEME_KEYS)
        raise ConfigError(
            f"{where} key {'.'.join(location)}={first['input']!r}: {first['msg']}.",
            "see `help(hf_quant.HfQuantConfig)`.",
        ) from error


def _complete(request: _LayerRequest, base: LayerRequest | None, where: str) -> LayerRequest:
    """Fill the keys left open from ``base`` where they still make sense, else from the defaults of the new grid."""
    scheme = base.scheme if base else None
    grid: GridName = request.grid or (scheme.grid if scheme else "int")
    bits = request.bits or (scheme.bits if scheme and grid == "int" else 4)
    table = grid != "int"
    same_kind = scheme is not None and scheme.bits == bits and (scheme.grid == "int") == (not table)
    group = request.group_size
    if group is None:
        group = scheme.group_size if scheme and same_kind else (DEFAULT_TABLE_GROUP if table else DEFAULT_GROUP[bits])
    if group != PER_CHANNEL and group < 8:
        raise ConfigError(f"{where} key group_size={group} is too small.", "use 32, 64, 128, or -1 for per channel.")
    symmetric = request.symmetric
    if symmetric is None:
        symmetric = scheme.symmetric if scheme and not table else True
    double = request.double_quant
    if double is None:
        double = table and (scheme.double_quant if scheme and same_kind else True)
    try:
        complete = Scheme(grid, bits, symmetric, group, double)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.problem}", error.fix) from error
    method: MethodName = request.method or (base.method if base else "search")
    return LayerRequest(complete, method)
