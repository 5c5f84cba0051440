"""Tokens are looked up in the integers of the head, or in integers of their own, and get the rows these stand for."""

import numpy as np
import onnxruntime
import pytest

from trtllm.checkpoints.checkpoint import TensorSpec
from trtllm.checkpoints.recipes import KeptValues, QuantizedValues, Source
from trtllm.checkpoints.stored import (
    IntegerBlocks,
    IntegerForm,
    Offset,
    QuantizedTensor,
    StoredQuantization,
    stored_quantizations,
)
from trtllm.compiler.ir.network import ModelInfo, Network
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.ir.weights import Weight
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.cleanup import RemoveDeadCode, ShareCommonSubexpressions
from trtllm.passes.inline_dialect import InlineDialect
from trtllm.passes.keep_quantization import KeepQuantization
from trtllm.passes.lower_linear import LowerLinear
from trtllm.passes.quantize import QuantizeWeights
from trtllm.passes.share_embedding import ShareEmbedding

ROWS, WIDTH = 40, 64
PRODUCT, LOOKUP = "trtllm.cpu::QuantizedLinear", "trtllm.cpu::QuantizedEmbedding"
IDS = {"input_ids": np.array([[0, 39, 5], [16, 5, 31]])}


def network_of(small, *, tied=True, scale=1.0, ids="input_ids", width=WIDTH, table="model.embed_tokens"):
    """Embedded tokens, and the head's product of them."""
    b = small.b
    tokens = b.input(ids, DType.INT64, ("batch", "sequence"))
    weight = small.weight(f"{table}.weight", ROWS, width)
    x = b.dialect("Embedding", [tokens, weight], name=table, scale=scale)
    head = weight if tied else small.weight("lm_head.weight", ROWS, width)
    b.output(b.dialect("RMSNorm", [x, b.constant(np.ones(width, np.float32))], name="norm"), "states")
    b.output(b.dialect("LogitsHead", [x, head], name="lm_head"), "logits")
    return small.finish()


def lowered(network, context, share=True):
    """The passes of a build that matter here; how many tables were shared."""
    KeepQuantization().run(network, context)
    QuantizeWeights().run(network, context)
    LowerLinear().run(network, context)
    count = ShareEmbedding().run(network, context) if share else 0
    InlineDialect().run(network, context)
    ShareCommonSubexpressions().run(network, context)
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="share-embedding")
    return count


def weights_of(network):
    return {name: v.const_value for name, v in network.graph.initializers.items() if isinstance(v.const_value, Weight)}


def rms(rows):
    return rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + 1e-6)


def quantized_rows(array):
    """The rows by 8-bit integers and a float16 scale for each block of 32."""
    blocks = array.reshape(len(array), -1, 32)
    scales = (np.abs(blocks).max(axis=2) / np.float32(127)).astype(np.float16).astype(np.float32)[..., None]
    return (np.rint(blocks / scales) * scales).reshape(array.shape)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
@pytest.mark.parametrize("scale", [1.0, 24.0])
def test_a_tied_table_is_looked_up_in_the_head(small, context_for, evaluate, operators, scheme, scale):
    network = network_of(small, scale=scale)
    assert lowered(network, context_for(PRODUCT, LOOKUP, packed=True, quantization=scheme)) == 1
    assert operators(network)[0] == "QuantizedEmbedding"
    assert sorted(weights_of(network)) == ["lm_head.weight_scales_tiles", "lm_head.weight_values_tiles"]
    exact = rms(quantized_rows(small.tensors["model.embed_tokens.weight"].read())[IDS["input_ids"]] * np.float32(scale))
    # what is looked up is exact; the norm takes a mean of 64 squares and a handful of roundings
    np.testing.assert_allclose(evaluate(small, network, IDS)[0], exact, rtol=2e-6 * 4, atol=1e-9)


def test_the_head_computes_the_same_with_a_shared_table(small, context_for, evaluate):
    context = context_for(PRODUCT, LOOKUP, packed=True, quantization="W8A16")
    network = network_of(small)
    lowered(network, context)
    rows = quantized_rows(small.tensors["model.embed_tokens.weight"].read())
    x = rows[IDS["input_ids"]]
    # activations are rounded to 8 bits by block: half a step, 1/254 of a block's largest
    largest = np.abs(x).reshape(2, 3, -1, 32).max(axis=3).repeat(32, axis=2)
    error = np.abs(evaluate(small, network, IDS)[1] - x @ rows.T)
    assert (error <= 1.001 * (largest / 254) @ np.abs(rows).T).all()


def test_an_untied_table_is_rounded_as_a_head_is(small, context_for, evaluate):
    network = network_of(small, tied=False)
    assert lowered(network, context_for(PRODUCT, LOOKUP, packed=True, quantization="W4A16")) == 1
    weights = weights_of(network)
    assert set(weights) == {
        f"{table}.weight_{part}_tiles" for table in ("model.embed_tokens", "lm_head") for part in ("values", "scales")
    }
    recipe = weights["model.embed_tokens.weight_values_tiles"].recipe
    assert isinstance(recipe.of, QuantizedValues) and recipe.of.bits == 8
    exact = rms(quantized_rows(small.tensors["model.embed_tokens.weight"].read())[IDS["input_ids"]])
    np.testing.assert_allclose(evaluate(small, network, IDS)[0], exact, rtol=8e-6, atol=1e-9)


def test_a_head_of_4_bits_is_not_the_table_of_the_tokens(small, context_for):
    network = network_of(small)
    options = {"quantization": "W8A16", "quantized_layers": {"lm_head": "W4A16"}}
    assert lowered(network, context_for(PRODUCT, LOOKUP, packed=True, **options)) == 1
    values = {name: weight.recipe.of.bits for name, weight in weights_of(network).items() if "values" in name}
    assert values == {"lm_head.weight_values_tiles": 4, "model.embed_tokens.weight_values_tiles": 8}


FORMS = [
    IntegerForm(bits, group, offset)
    for bits in (4, 8)
    for group in (32, 64)
    for offset in (Offset.NONE, Offset.MINIMUM, Offset.ZERO_POINT)
]


def stored_table(form):
    """A random table of that form; its scales and minima are float16 numbers, its zero points whole ones."""
    random = np.random.default_rng(0)
    lowest, highest = (-128, 127) if form.bits == 8 else (-8, 7) if form.offset is Offset.NONE else (0, 15)
    values = random.integers(lowest, highest + 1, (ROWS, WIDTH)).astype(np.int8)
    shape = (ROWS, WIDTH // form.group_size)
    scales, offsets = random.normal(size=(2, *shape)).astype(np.float16).astype(np.float32)
    if form.offset is Offset.ZERO_POINT:
        offsets = random.integers(lowest, highest + 2, shape).astype(np.float32)
    blocks = IntegerBlocks(
        lambda start, stop: values[start:stop],
        lambda start, stop: scales[start:stop],
        None if form.offset is Offset.NONE else lambda start, stop: offsets[start:stop],
    )
    spec = TensorSpec("model.embed_tokens.weight", (ROWS, WIDTH), DType.FLOAT32)
    return QuantizedTensor(spec, StoredQuantization("a test", form), blocks)


def coarse_table():
    """What is stored in steps that 8-bit integers are finer than."""
    array = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    spec = TensorSpec("model.embed_tokens.weight", array.shape, DType.FLOAT32)
    stored = StoredQuantization("coarse", None, coarse=True)
    return QuantizedTensor(spec, stored, None, lambda start, stop: array[start:stop].copy())


def keeping(small, context_for):
    context = context_for(PRODUCT, LOOKUP, packed=True)
    return PassContext(context.build, context.capabilities, stored=stored_quantizations(small.tensors))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_stored_integers_are_looked_up_bit_for_bit(small, context_for, evaluate, form, tied):
    tensor = stored_table(form)
    network = kept_network(small, tensor, tied=tied)
    context = keeping(small, context_for)
    assert lowered(network, context) == 1
    rows, weights = evaluate(small, network, IDS)[0], weights_of(network)
    np.testing.assert_array_equal(rows, tensor.read()[IDS["input_ids"]])
    recipe = next(weight.recipe for name, weight in weights.items() if "values" in name)
    assert isinstance(recipe.of, KeptValues) and recipe.of.bits == form.bits
    assert len(weights) == 2 + (form.offset is not Offset.NONE)
    assert any("looked up by rows: kept bit for bit" in note for note in context.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_coarsely_is_looked_up_in_8_bits(small, context_for, evaluate, tied):
    tensor = coarse_table()
    network, context = kept_network(small, tensor, tied=tied), keeping(small, context_for)
    assert lowered(network, context) == 1
    assert len(weights_of(network)) == 2
    np.testing.assert_array_equal(evaluate(small, network, IDS)[0], quantized_rows(tensor.read())[IDS["input_ids"]])
    assert any("looked up by rows: rounded to 8 bits" in note for note in context.notes)


def kept_network(small, tensor, *, tied):
    """Looked-up rows as they are, and with tied weights the head."""
    b = small.b
    small.tensors[tensor.spec.name] = tensor
    weight = b.weight(tensor.spec.name, Source.of(tensor.spec))
    x = b.dialect("Embedding", [b.input("input_ids", DType.INT64, ("batch", "sequence")), weight], name="embed")
    b.output(b.op("Reshape", [x, b.constant([0, 0, WIDTH])], ("batch", "sequence", WIDTH)), "rows")
    if tied:
        b.output(b.dialect("LogitsHead", [x, weight], name="lm_head"), "logits")
    return small.finish()


@pytest.mark.parametrize("what", ["target", "encoder", "positions", "width", "excluded", "plain", "scheme"])
def test_a_table_that_is_no_such_one_keeps_its_values(small, context_for, what):
    options = {"quantization": "W8A16"}
    if what == "excluded":
        options["exclude_modules"] = ("*.embed_tokens",)
    if what == "plain":
        options = {}
    if what == "scheme":
        options = {"quantization": "MIXED_PRECISION", "quantized_layers": {"*.up_proj": "W4A16"}}
    ids = "positions" if what == "positions" else "input_ids"
    network = network_of(small, ids=ids, width=48 if what == "width" else WIDTH)
    if what == "encoder":
        network = Network(network.model, ModelInfo("encoder", "Small", 8, 8, 1, 16))
    context = context_for(*([PRODUCT] if what == "target" else [PRODUCT, LOOKUP]), packed=True, **options)
    assert lowered(network, context) == 0
    assert not any("embed" in name and "tiles" in name for name in weights_of(network))
    reasons = {
        "positions": "not looked up by tokens",
        "width": "48 columns are no multiple of 32",
        "excluded": "full precision",
        "scheme": "full precision",
    }
    misses = [str(miss) for miss in context.near_misses if miss.pass_name == "share-embedding"]
    assert [reasons[what] in miss for miss in misses] == ([True] if what in reasons else [])


@pytest.mark.parametrize("token", [ROWS, -1, 1 << 40])
def test_a_token_outside_the_table_is_an_error(small, context_for, evaluate, token):
    network = network_of(small)
    lowered(network, context_for(PRODUCT, LOOKUP, packed=True, quantization="W8A16"))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match=f"token {token} is not in a table"):
        evaluate(small, network, {"input_ids": np.array([[0, token]])})


def test_no_tokens_give_no_rows(small, context_for, evaluate):
    network = network_of(small)
    lowered(network, context_for(PRODUCT, LOOKUP, packed=True, quantization="W8A16"))
    assert evaluate(small, network, {"input_ids": np.zeros((1, 0), np.int64)})[0].shape == (1, 0, WIDTH)
