"""Quantized models in the files of other runtimes: what is written there, and what has to be refused."""
