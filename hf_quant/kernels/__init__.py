"""Kernels: how a quantized weight is multiplied, chosen per layer by :mod:`hf_quant.kernels.registry`."""
