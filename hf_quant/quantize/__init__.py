"""Algorithms that turn a float weight into a QuantizedTensor, one file each.

As an attribute of the package, ``hf_quant.quantize`` is the public function of that name: import from these modules
(``from hf_quant.quantize.weight import quantize_weight``), not the modules (``import hf_quant.quantize.weight as w``).
"""
