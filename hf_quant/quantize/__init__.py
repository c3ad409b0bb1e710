"""Algorithms that turn a float weight into a QuantizedTensor, one file each."""
