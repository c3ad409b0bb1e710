"""A plan split over N devices as tensor-parallel servers do it: the shard of each layer, or what does not divide."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from hf_quant.errors import PlanError
from hf_quant.grids import PER_CHANNEL
from hf_quant.plan import EMBEDDING, Plan, PlannedLayer

COLUMN, ROW, REPLICATED = "column", "row", "replicated"
WORD_BITS = 32

# Layers that end a branch: servers split their input, as that is what the layers before them left on each device.
# Everything else that multiplies is split by its output. (Megatron-LM, arXiv:1909.08053, section 3; the leaves are
# those of vLLM's RowParallelLinear.) A model whose config has a plan of its own is split by that.
_ROW_LEAVES = frozenset(
    {"o_proj", "out_proj", "down_proj", "fc2", "c_proj", "w2", "wo", "dense_4h_to_h", "output_linear", "o", "wo_proj"}
)
_ATTENTION_DENSE = re.compile(r"(^|\.)(self_attn|attention|self_attention|attn)(\.output)?\.dense$")
_MLP_DENSE = re.compile(r"(^|\.)output\.dense$")
# Low-rank halves of latent attention and routers are computed whole on every device.
_REPLICATED_LEAVES = frozenset(
    {"q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate", "embed_positions"}
)
_KEY_VALUE = (".k_proj", ".v_proj")
_STYLES = {"col": COLUMN, "row": ROW, "rep": REPLICATED, "mla": REPLICATED}


@dataclass(frozen=True)
class Split:
    """One layer on N devices.

    Attributes:
        name: module name.
        role: ``column`` (outputs are divided), ``row`` (inputs are divided), ``replicated``.
        shape: ``(out, in)`` of one device's shard; of the whole layer where it cannot be divided.
        problem: what does not divide; else empty.
        fix: a group size that does, where that is the problem and there is one; else 0.
    """

    name: str
    role: str
    shape: tuple[int, int]
    problem: str = ""
    fix: int = 0


@dataclass(frozen=True)
class Parallel:
    """A plan on ``devices`` devices: every quantized linear layer, and what is wrong with the model as a whole.

    Attributes:
        heads: why its attention heads cannot be divided; else empty.
        note: what a server does beyond dividing (key-value heads that are copied); else empty.
    """

    devices: int
    layers: tuple[Split, ...]
    heads: str
    note: str

    @property
    def misfits(self) -> tuple[Split, ...]:
        return tuple(layer for layer in self.layers if layer.problem)

    def require_fit(self) -> None:
        """Raise PlanError that names the first layer that cannot be divided, and how to quantize so that it can."""
        if self.heads:
            raise PlanError(f"{self.heads}.", "use fewer devices, or pipeline parallelism.")
        if not self.misfits:
            return
        first = self.misfits[0]
        groups = [layer.fix for layer in self.misfits]
        fix = "leave these layers in float (--override NAME=float), or use fewer devices."
        if all(groups):
            leaves = dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in self.misfits)
            which = " ".join(f"--override {leaf}=group_size={min(groups)}" for leaf in leaves)
            fix = f"{which}, or --group-size {min(groups)} for all layers."
        many = f" ({len(self.misfits)} such layers)" if len(self.misfits) > 1 else ""
        raise PlanError(f"{first.name} cannot be split over {self.devices} devices: {first.problem}{many}.", fix)

    def data(self) -> dict[str, Any]:
        """As plain data, for ``--json``."""
        return {
            "devices": self.devices,
            "problem": self.heads,
            "note": self.note,
            "layers": [
                {"name": layer.name, "role": layer.role, "shape": list(layer.shape), "problem": layer.problem}
                for layer in self.layers
            ],
        }


def split_plan(plan: Plan, settings: PretrainedConfig, devices: int) -> Parallel:
    """Divide every quantized linear layer of a plan over ``devices``; no weight is read.

    A column-parallel layer needs rows that divide, and with packed zero points, which are packed along the rows, whole
    32-bit words of them. A row-parallel layer needs shards of its input that are whole groups and whole words of
    codes. Embeddings and output heads are left out: servers pad them.

    Args:
        plan: of the model.
        settings: the model's config: its tensor-parallel plan, if it has one, and its heads.
        devices: at least 2.

    Raises:
        PlanError: fewer than 2 devices, or a bitsandbytes format.
    """
    if devices < 2:
        raise PlanError(f"tensor parallelism needs at least 2 devices, not {devices}.", "give 2 or more.")
    if plan.format == "bitsandbytes":
        raise PlanError(
            "vLLM does not split bitsandbytes checkpoints over devices.",
            "use --grid int, or its --pipeline-parallel-size.",
        )
    styles = _styles(settings)
    vocabulary = getattr(settings.get_text_config(), "vocab_size", None)
    linears = [layer for layer in plan.quantized if layer.kind != EMBEDDING and layer.shape[0] != vocabulary]
    heads, copies, note = _heads(settings, devices)
    rows = [
        _split(layer, _role(layer.name, styles), copies if layer.name.endswith(_KEY_VALUE) else devices)
        for layer in linears
    ]
    return Parallel(devices, tuple(rows), heads, note)


def _styles(settings: PretrainedConfig) -> list[tuple[re.Pattern[str], str]]:
    """Patterns of module names and roles, from the tensor-parallel plans of the config and of its parts."""
    plans = [getattr(settings, "base_model_tp_plan", None)]
    plans += [getattr(getattr(settings, part, None), "base_model_tp_plan", None) for part in settings.sub_configs]
    found = []
    for plan in plans:
        for pattern, style in (plan or {}).items():
            role = _STYLES.get(str(style)[:3])
            if role is not None:
                name = re.escape(pattern).replace(r"\*", r"\d+")
                found.append((re.compile(rf"(^|.*\.){name}"), role))
    return found


def _role(name: str, styles: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, role in styles:
        if pattern.fullmatch(name):
            return role
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _REPLICATED_LEAVES:
        return REPLICATED
    ends = leaf in _ROW_LEAVES or _ATTENTION_DENSE.search(name) or _MLP_DENSE.search(name)
    return ROW if ends else COLUMN


def _split(layer: PlannedLayer, role: str, devices: int) -> Split:
    rows, columns = layer.shape
    scheme = layer.scheme
    assert scheme is not None
    whole = (rows, columns)
    if role == REPLICATED:
        return Split(layer.name, role, whole)
    per_word = WORD_BITS // scheme.bits
    if role == COLUMN:
        if rows % devices:
            return Split(layer.name, role, whole, f"its {rows} rows are not a multiple of {devices}")
        if not scheme.symmetric and rows // devices % per_word:
            problem = f"zero points of {rows // devices} rows are not whole words of {per_word}"
            return Split(layer.name, role, whole, problem)
        return Split(layer.name, role, (rows // devices, columns))
    if columns % devices:
        return Split(layer.name, role, whole, f"its {columns} columns are not a multiple of {devices}")
    shard = columns // devices
    if shard % per_word:
        return Split(layer.name, role, whole, f"codes of {shard} columns are not whole words of {per_word}")
    group = scheme.group(columns)
    if scheme.group_size != PER_CHANNEL and shard % group:
        fitting = math.gcd(shard, 1 << (group.bit_length() - 1))
        problem = f"shards of {shard} columns are not whole groups of {group}"
        return Split(layer.name, role, whole, problem, fitting if fitting >= per_word else 0)
    return Split(layer.name, role, (rows, shard))


def _heads(settings: PretrainedConfig, devices: int) -> tuple[str, int, str]:
    """What is wrong with the heads; among how many devices keys and values are split; what is copied."""
    text = settings.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return "", devices, ""
    if heads % devices:
        return f"its {heads} attention heads cannot be split over {devices} devices", devices, ""
    shared = getattr(text, "num_key_value_heads", None) or heads
    if shared % devices == 0:
        return "", devices, ""
    if devices % shared:
        problem = f"its {shared} key-value heads can be neither split over {devices} devices nor copied evenly"
        return problem, devices, ""
    return "", shared, f"{shared} key-value heads: each is copied to {devices // shared} devices"
