"""A measured figure with its confidence interval, and the strict base class of the models in results files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Results name every field that they have, and do not change once they are made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Strict):
    """A figure with its 95 % confidence interval (bootstrap over windows)."""

    value: float
    low: float
    high: float
