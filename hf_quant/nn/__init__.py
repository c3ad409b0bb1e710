"""Modules that hold quantized weights: buffers and forward, no algorithm."""
