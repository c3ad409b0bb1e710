"""What quantizing each layer alone is predicted to cost, as a record that is saved, checked and used again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hf_quant.checkpoint.atomic import atomic_write
from hf_quant.errors import SensitivityError
from hf_quant.quantize.menu import FLOAT_LABEL, Menu

SCHEMA_VERSION: Literal[1] = 1
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        shape: ``(out, in)``.
        tokens: rows of its input that the loss depended on; 0 for an expert that saw none, whose costs are taken from
            its siblings.
        costs: label of a scheme -> KL(float || quantized) in nats per token that this layer alone should cause.
    """

    shape: tuple[int, int]
    tokens: int
    costs: dict[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """Every layer of a menu.

    Attributes:
        model: digest of the float weights (:func:`model_digest`).
        data: digest of the calibration data.
        estimator: how it was estimated: loss, samples, draws, rows, seed ...
        layers: name -> its costs.
    """

    model: str
    data: str
    estimator: dict[str, Any]
    layers: dict[str, LayerSensitivity]

    def cost(self, name: str, label: str) -> float:
        """Predicted nats per token when only ``name`` is stored as ``label``; 0 in float.

        Raises:
            SensitivityError: the layer or the scheme is not in the record.
        """
        if label == FLOAT_LABEL:
            return 0.0
        layer = self.layers.get(name)
        if layer is None:
            raise SensitivityError(f"the sensitivities have no layer {name}.", "estimate them for this model.")
        if label not in layer.costs:
            known = ", ".join(layer.costs)
            raise SensitivityError(
                f"the sensitivities of {name} have no scheme {label} (only {known}).", "estimate them with this scheme."
            )
        return layer.costs[label]

    def check(
        self,
        *,
        model: str | None = None,
        data: str | None = None,
        menu: Menu | None = None,
        estimator: dict[str, Any] | None = None,
    ) -> None:
        """Refuse to be used for anything else than what this was estimated for; arguments left out are not compared.

        Raises:
            SensitivityError: naming what differs: the model, the data, a setting, a layer or a scheme.
        """
        again = "estimate them again (delete the file), or give what they were estimated for."
        for what, mine, theirs in (("model", self.model, model), ("calibration data", self.data, data)):
            if theirs is not None and mine != theirs:
                raise SensitivityError(
                    f"the sensitivities belong to another {what} (sha256 {mine[:12]}, not {theirs[:12]}).", again
                )
        for key, value in (estimator or {}).items():
            if self.estimator.get(key) != value:
                raise SensitivityError(
                    f"the sensitivities were estimated with {key}={self.estimator.get(key)!r}, not {value!r}.", again
                )
        for layer in menu.layers if menu else ():
            for choice in layer.choices:
                self.cost(layer.name, choice.label)
            if self.layers[layer.name].shape != layer.shape:
                raise SensitivityError(
                    f"the sensitivities of {layer.name} are for {self.layers[layer.name].shape}, not {layer.shape}.",
                    again,
                )

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        document = _Document(
            model=self.model,
            data=self.data,
            estimator=self.estimator,
            layers={
                name: _Layer(shape=list(layer.shape), tokens=layer.tokens, costs=layer.costs)
                for name, layer in self.layers.items()
            },
        )
        atomic_write(path, json.dumps(document.model_dump(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a file that :meth:`save` wrote.

        Raises:
            SensitivityError: missing, damaged, or of another schema.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise SensitivityError(f"{path} is too large for a file of sensitivities.", "give the right file.")
            document = _Document.model_validate_json(path.read_bytes())
        except OSError as error:
            raise SensitivityError(f"{path} cannot be read: {error}.", "estimate the sensitivities again.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise SensitivityError(
                f"{path} does not hold sensitivities of schema {SCHEMA_VERSION}: {where}: {first['msg']}.",
                "estimate them again.",
            ) from error
        layers = {
            name: LayerSensitivity((layer.shape[0], layer.shape[1]), layer.tokens, layer.costs)
            for name, layer in document.layers.items()
        }
        return cls(document.model, document.data, document.estimator, layers)


class _Layer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    shape: list[int] = Field(min_length=2, max_length=2)
    tokens: int = Field(ge=0)
    costs: dict[str, float]

    def model_post_init(self, _: Any) -> None:
        for label, cost in self.costs.items():
            if not 0 <= cost < float("inf"):
                raise ValueError(f"the cost of {label} is {cost}")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    data: str
    estimator: dict[str, Any]
    layers: dict[str, _Layer]


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model in memory: its class, and the names, dtypes, shapes and bytes of its state dict."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
