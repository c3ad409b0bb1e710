"""Importing hf_quant: light until transformers is used, registered whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs, AUTO_QUANTIZER_MAPPING as made
import transformers.quantizers.quantizer_compressed_tensors as stock
assert configs['hf_quant'] is hf_quant.HfQuantConfig
assert made['compressed-tensors'] is not stock.CompressedTensorsHfQuantizer
assert callable(hf_quant.quantize) and callable(hf_quant.load)
hf_quant.disable()
assert made['compressed-tensors'] is stock.CompressedTensorsHfQuantizer
"""


@pytest.mark.parametrize(
    "first",
    [
        "import hf_quant, transformers.quantizers.auto",
        "import hf_quant, transformers.modeling_utils",
        "import transformers.modeling_utils, hf_quant",
        "import hf_quant; from transformers import BertModel",
        "import hf_quant.api",
        "import hf_quant.quantize.weight as weight, hf_quant; weight.quantize_weight",
    ],
)
def test_registration_in_every_order_of_imports(first: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"{first}\n{CHECK}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_alone_is_light() -> None:
    code = "import hf_quant, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
