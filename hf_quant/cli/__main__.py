"""``python -m hf_quant.cli``: the same as ``hf-quant``."""

from hf_quant.cli.app import main

main()
