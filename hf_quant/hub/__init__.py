"""Publishing on the Hub: check what would be published, push it in one commit, verify what arrived."""

from __future__ import annotations

from hf_quant.hub.check import Publishable, check_publishable
from hf_quant.hub.models import push_model
from hf_quant.hub.upload import PushReport, push

__all__ = ["Publishable", "PushReport", "check_publishable", "push", "push_model"]
