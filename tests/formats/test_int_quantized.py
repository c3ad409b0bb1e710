"""int-quantized and naive-quantized: exact round trips, and the library's own bytes and values."""

from __future__ import annotations

import pytest
import torch

from hf_quant.errors import FormatError
from hf_quant.formats import int_quantized
from hf_quant.grids import PER_CHANNEL, Scheme

SCHEMES = [
    Scheme("int", bits, symmetric, group)
    for bits in (4, 8)
    for symmetric in (True, False)
    for group in (32, PER_CHANNEL)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_round_trip_and_the_librarys_values(scheme, random_tensor, same) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensor = random_tensor(scheme, 16, 64)
    encoded = int_quantized.INT.encode(tensor, dtype=torch.float32)
    assert tuple(encoded) == int_quantized.INT.suffixes(scheme)
    assert same(int_quantized.INT.decode(encoded, scheme), tensor)
    channel = scheme.group_size == PER_CHANNEL
    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else scheme.group_size,
    )
    compressor = BaseCompressor.get_value_from_registry("naive-quantized")
    theirs = compressor.decompress(dict(encoded), QuantizationScheme(targets=["Linear"], weights=arguments))
    assert torch.equal(theirs["weight"], tensor.dequantize())


def test_what_does_not_fit_is_named(random_tensor) -> None:
    int4 = Scheme("int", 4, True, 32)
    encoded = int_quantized.INT.encode(random_tensor(int4, 16, 64), dtype=torch.float32)
    with pytest.raises(FormatError, match=r"fc\.weight holds codes beyond 4 bits"):
        int_quantized.INT.decode({**encoded, "weight": encoded["weight"] * 2}, int4, name="fc")
    with pytest.raises(FormatError, match=r"fc\.weight_zero_point is there"):
        zero = torch.zeros(16, 2, dtype=torch.int8)
        int_quantized.INT.decode({**encoded, "weight_zero_point": zero}, int4, name="fc")
    with pytest.raises(FormatError, match=r"fc\.weight_scale is missing"):
        int_quantized.INT.decode({"weight": encoded["weight"]}, int4, name="fc")
