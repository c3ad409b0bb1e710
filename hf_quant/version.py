"""The version of hf-quant: the build, provenance and ``hf-quant --version`` read it here."""

__version__ = "0.1.0"
