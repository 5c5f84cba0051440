"""A pass that maps linear layers and the head to matrix products in the layout a target wants."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.checkpoints.recipes import Cast, Reshape, TiledScales, TiledValues, Transpose, UnsignedBlocks
from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.compiler.ir.dialect import DOMAIN, attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.reference import head_epilogue
from trtllm.compiler.ir.weights import Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, only_user, replace

MICROSOFT = "com.microsoft"
CPU = "trtllm.cpu"
_DEQUANTIZATIONS = ("DequantizeLinear", "DequantizeBlocks")


class LowerLinear(Pass):
    """Replace Linear and LogitsHead by products that the target runs.

    Linear(x, W)                            becomes  MatMul(x, W')        with W' stored transposed
    Linear(x, W), W read elsewhere too      becomes  Gemm(x, W, transB)   so that W is stored once
    Linear(x, DequantizeLinear(V, S))       becomes  QuantizedLinear(x, V', S')   where the target has it, with a packed
                                                     gated activation before it moved inside
                                            or       MatMulNBits(x, V', S')
    Linear(x, DequantizeBlocks(V, S, O))    becomes  QuantizedLinear(x, V', S', O')

    A target that has Linear itself (a product by a transposed matrix) keeps it; a head becomes one and its epilogue.

    QuantizedLinear and MatMulNBits at accuracy_level 4 multiply by activations rounded to int8, which is several times
    as fast for one token. An encoder keeps float32 activations (level 1): an embedding is the activations, and rounding
    them costs more than 8-bit weights do (all-MiniLM-L6-v2, 20 texts: lowest cosine 0.9982 against 0.9996). With 16
    `activation_bits` QuantizedLinear rounds to these, and MatMulNBits not at all.
    """

    name = "lower-linear"

    def run(self, network: Network, context: PassContext) -> int:
        keeps_linear = context.capabilities.has("Linear", DOMAIN)
        wanted = ("LogitsHead",) if keeps_linear else ("Linear", "LogitsHead")
        nodes = [node for node in network.graph if is_dialect(node, *wanted)]
        for node in nodes:
            b = builder_before(network, node)
            if keeps_linear:
                y = b.dialect("Linear", node.inputs, name="linear")
            else:
                y = _product(b, node, context, rounds_activations=network.info.kind == "decoder")
            if node.op_type == "LogitsHead":
                if dtype_of(y) != ir.DataType.FLOAT:
                    y = b.op("Cast", [y], None, DType.FLOAT32, to=ir.DataType.FLOAT)
                y = head_epilogue(b, y, attributes_of(node))
            replace(node, [y])
        return len(nodes)


def _product(b: GraphBuilder, node: ir.Node, context: PassContext, *, rounds_activations: bool) -> ir.Value:
    x, matrix = node.inputs[:2]
    assert x is not None and matrix is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    dequantize = matrix.producer()
    if dequantize is not None and dequantize.op_type in _DEQUANTIZATIONS and context.capabilities.packed_int4:
        has_kernel = rounds_activations and context.capabilities.has("QuantizedLinear", CPU)
        if has_kernel and _is_tileable(x, dequantize):
            return _tiled_product(b, node, x, dequantize, bias, context.build.activation_bits)
    if dequantize is not None and dequantize.op_type == "DequantizeLinear" and context.capabilities.packed_int4:
        rounds_activations = rounds_activations and context.build.activation_bits == 8
        return _bits_product(b, x, dequantize, bias, accuracy=4 if rounds_activations else 1)
    weight = weight_of(matrix)
    if weight is not None and len(matrix.uses()) > 1:
        return _shared_product(b, x, matrix, bias)
    return _plain_product(b, x, matrix, weight, bias)


def _plain_product(
    b: GraphBuilder, x: ir.Value, matrix: ir.Value, weight: Weight | None, bias: ir.Value | None
) -> ir.Value:
    out_features, in_features = dims(matrix)
    if weight is not None:
        turned = b.weight(f"{weight.name}_t", Transpose(weight.recipe, (1, 0)))
    else:
        turned = b.op("Transpose", [matrix], (in_features, out_features), perm=[1, 0])
    y = b.op("MatMul", [x, turned], (*dims(x)[:-1], out_features), name="matmul")
    return b.op("Add", [y, bias], name="bias") if bias is not None else y


def _shared_product(b: GraphBuilder, x: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Gemm wants a matrix on its left: rows are flattened and put back."""
    out_features, in_features = dims(matrix)
    lead = dims(x)[:-1]
    rows = b.op("Reshape", [x, b.constant([-1, int(in_features)])], ("rows", in_features))
    inputs = [rows, matrix] if bias is None else [rows, matrix, bias]
    y = b.op("Gemm", inputs, ("rows", out_features), transB=1, name="gemm")
    if len(lead) == 3 - 1:
        shape = b.op("Shape", [x], (2,), DType.INT64, start=0, end=2)
        shape = b.op("Concat", [shape, b.constant([int(out_features)])], (3,), DType.INT64, axis=0)
        return b.op("Reshape", [y, shape], (*lead, out_features))
    return y


def _is_tileable(x: ir.Value, dequantize: ir.Node) -> bool:
    """Whether the project's own kernel takes it: float32, blocks of 32, scales kept in float16."""
    scales = weight_of(dequantize.inputs[1])
    recipe = scales.recipe if scales is not None else None
    rounded = isinstance(recipe, Cast) and recipe.of.dtype is DType.FLOAT16
    return rounded and dtype_of(x) == ir.DataType.FLOAT and dequantize.attributes["block_size"].value == 32


def _tiled_product(
    b: GraphBuilder, node: ir.Node, x: ir.Value, dequantize: ir.Node, bias: ir.Value | None, activation_bits: int
) -> ir.Value:  # fmt: skip
    values, scales = (weight_of(value) for value in dequantize.inputs[:2])
    assert values is not None and scales is not None and isinstance(scales.recipe, Cast)
    out_features, in_features = values.recipe.shape
    tiles = b.weight(f"{values.name}_tiles", TiledValues(values.recipe))
    inputs: list[ir.Value | None] = [tiles, b.weight(f"{scales.name}_tiles", TiledScales(scales.recipe.of))]
    details = {} if activation_bits == 8 else {"activation_bits": activation_bits}
    if dequantize.op_type == "DequantizeBlocks":
        offsets = weight_of(dequantize.inputs[2])
        assert offsets is not None
        inputs += [bias, b.weight(f"{offsets.name}_tiles", TiledScales(offsets.recipe))]
        details["offset"] = OFFSETS[attributes_of(dequantize)["offset"]]
    elif bias is not None:
        inputs.append(bias)
    gate, operand = gate_before(node, x)
    return b.op(
        "QuantizedLinear",
        [operand, *inputs],
        (*dims(x)[:-1], out_features),
        ir.DataType.FLOAT,
        domain=CPU,
        name="matmul",
        K=in_features,
        N=out_features,
        bits=values.recipe.dtype.bits,
        gate=gate,
        **details,
    )


OFFSETS = {"minimum": 1, "zero_point": 2}
"""What offsets are, as the kernels' attribute; 0 without."""
_GATES = {"silu": 1, "gelu_tanh": 2, "gelu": 3}


def gate_before(node: ir.Node, x: ir.Value) -> tuple[int, ir.Value]:
    """The packed gated activation that only this product reads, as the kernel's gate; 0 and x when there is none."""
    producer = x.producer()
    if producer is None or not is_dialect(producer, "GatedActivation") or only_user(x) is not node:
        return 0, x
    packed = producer.inputs[0]
    kind = _GATES.get(attributes_of(producer)["kind"])
    if len(producer.inputs) != 1 or packed is None or kind is None:
        return 0, x
    return kind, packed


def _bits_product(b: GraphBuilder, x: ir.Value, dequantize: ir.Node, bias: ir.Value | None, accuracy: int) -> ir.Value:
    values, scales = (weight_of(value) for value in dequantize.inputs[:2])
    assert values is not None and scales is not None
    out_features, in_features = values.recipe.shape
    block = int(dequantize.attributes["block_size"].value)
    blocks = b.weight(f"{values.name}_blocks", UnsignedBlocks(values.recipe, block))
    flat = b.weight(f"{scales.name}_flat", Reshape(scales.recipe, (out_features * (in_features // block),)))
    return b.op(
        "MatMulNBits",
        [x, blocks, flat, None, None, bias] if bias is not None else [x, blocks, flat],
        (*dims(x)[:-1], out_features),
        domain=MICROSOFT,
        name="matmul",
        K=in_features,
        N=out_features,
        bits=values.recipe.dtype.bits,
        block_size=block,
        accuracy_level=accuracy,
    )
