"""Whether a checkpoint is what its maker says: files, plan, results, card and, on request, the measured figures."""

from __future__ import annotations

from hf_quant.verification.findings import Finding, Report
from hf_quant.verification.run import verify

__all__ = ["Finding", "Report", "verify"]
