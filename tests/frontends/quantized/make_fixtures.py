"""Writes fixtures/*.safetensors: small layers quantized by the libraries themselves, with what they dequantize.

Not run by the tests, which have the files: it needs torch 2.13, bitsandbytes 0.50 and compressed-tensors 0.20.

    python tests/frontends/quantized/make_fixtures.py
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "fixtures"
ROWS, COLUMNS = 24, 64


def weight(seed):
    torch.manual_seed(seed)
    return torch.randn(ROWS, COLUMNS) * torch.rand(ROWS, 1)


def save(name, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / f"{name}.safetensors")


def four_bits(kind, *, nested):
    packed, state = bnb.quantize_4bit(weight(1), blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {"layer.weight": packed}
    tensors |= {f"layer.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save(
        f"bitsandbytes_{kind}{'_nested' if nested else ''}", tensors | {"expected": bnb.dequantize_4bit(packed, state)}
    )


def eight_bits():
    values, largest, _ = bnb.int8_vectorwise_quant(weight(2).half())
    expected = values.float() * largest.float().view(-1, 1) / 127
    save("bitsandbytes_int8", {"layer.weight": values, "layer.SCB": largest, "expected": expected})


def compressed(name, layout, **options):
    arguments = QuantizationArgs(**options)
    source = weight(3)
    shape = source if options["strategy"] == "channel" else source.reshape(ROWS, -1, options.get("group_size", COLUMNS))
    low, high = shape.amin(dim=-1), shape.amax(dim=-1)
    if options["strategy"] == "channel":
        low, high = low[:, None], high[:, None]
    scale, zero = calculate_qparams(low, high, arguments)
    state = {"weight": source, "weight_scale": scale, "weight_zero_point": zero}
    integers = quantize(source, scale, zero, arguments)
    expected = dequantize(integers, scale, zero, arguments, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(dict(state), scheme)
    save(f"compressed_{name}", {f"layer.{key}": value for key, value in packed.items()} | {"expected": expected})


def nvfp4():
    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", symmetric=True, group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    source = weight(4)
    whole = 448 * 6 / source.abs().amax().reshape(1)
    scale = (source.reshape(ROWS, -1, 16).abs().amax(dim=-1) / 6 * whole).to(torch.float8_e4m3fn).float()
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    packed = compressor.compress({"weight": source, "weight_scale": scale, "weight_global_scale": whole}, scheme)
    packed["weight_scale"] = packed["weight_scale"].to(torch.float8_e4m3fn)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    save("compressed_nvfp4", {f"layer.{key}": value for key, value in packed.items()} | {"expected": expected})


def main():
    FOLDER.mkdir(exist_ok=True)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            four_bits(kind, nested=nested)
    eight_bits()
    group = {"strategy": "group", "group_size": 32}
    compressed("int4", "pack-quantized", num_bits=4, symmetric=True, **group)
    compressed("int4_asymmetric", "pack-quantized", num_bits=4, symmetric=False, **group)
    compressed("int8", "pack-quantized", num_bits=8, symmetric=True, **group)
    compressed("int8_asymmetric", "pack-quantized", num_bits=8, symmetric=False, **group)
    compressed("int4_channel", "pack-quantized", num_bits=4, symmetric=True, strategy="channel")
    compressed("int_quantized", "int-quantized", num_bits=8, symmetric=True, strategy="channel")
    compressed("float_quantized", "float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel")
    nvfp4()


if __name__ == "__main__":
    main()
