"""The vocabulary that model files are written in: weights by name with checked shapes, and decoder scaffolding.

A model file composes these calls; it never touches payloads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from trtllm.checkpoints.checkpoint import Checkpoint, TensorSpec
from trtllm.checkpoints.recipes import Affine, Cast, Recipe, Source
from trtllm.compiler.ir.builder import OPSET, GraphBuilder
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.ir.network import CacheLayer, ModelInfo, Network
from trtllm.compiler.models.model_config import ModelConfig
from trtllm.compiler.models.rotary import Rotary, RotaryConfig
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.errors import BadInputError

IR_VERSION = 11


@dataclass(frozen=True)
class DecoderInputs:
    """Graph inputs of a decoder step: B sequences with S new tokens each (right-padded)."""

    ids: ir.Value
    """int64 [B, S]."""
    past_lengths: ir.Value
    """int64 [B]: tokens already in the cache."""
    lengths: ir.Value
    """int64 [B]: valid new tokens of each row."""


@dataclass
class _Problems:
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class ModelBuilder:
    """Builds one network from one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, build: BuildConfig, dtype: DType) -> None:
        self.checkpoint = checkpoint
        self.config = ModelConfig(checkpoint.config, checkpoint.source)
        self.build = build
        self.dtype = dtype
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name=checkpoint.architecture)
        self.b = GraphBuilder(self.graph)
        self.cache: list[CacheLayer] = []
        self._used: set[str] = set()
        self._problems = _Problems()

    # -- weights -----------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def source(self, name: str, *shape: int) -> Recipe:
        """The checkpoint tensor `name`, which the config implies to have `shape`.

        A missing tensor or another shape is noted; `finish` reports all of them at once.
        """
        self._used.add(name)
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            self._problems.missing.append(name)
            return Source(name, shape, DType.FLOAT32)
        if tensor.spec.shape != shape:
            self._problems.wrong.append(f"{name} is {_times(tensor.spec.shape)}, config.json implies {_times(shape)}")
            return Source.of(TensorSpec(name, shape, tensor.spec.dtype))
        return Source.of(tensor.spec)

    @property
    def used(self) -> frozenset[str]:
        """Names of the tensors that were asked for or ignored by name."""
        return frozenset(self._used)

    def ignore(self, name: str) -> None:
        """Marks a tensor as known and not needed."""
        self._used.add(name)

    def weight(self, name: str, recipe: Recipe, dtype: DType | None = None) -> ir.Value:
        """An initializer of the compute dtype (or `dtype`) from a recipe."""
        target = dtype or self.dtype
        return self.b.weight(name, recipe if recipe.dtype is target else Cast(recipe, target))

    # -- layers ------------------------------------------------------------------------------------------------

    def linear(self, x: ir.Value, name: str, out_features: int, in_features: int, *, bias: bool = False) -> ir.Value:
        """`name`.weight [out, in] applied to x [..., in]; with `name`.bias [out] when asked."""
        inputs = [x, self.weight(f"{name}.weight", self.source(f"{name}.weight", out_features, in_features))]
        if bias:
            inputs.append(self.weight(f"{name}.bias", self.source(f"{name}.bias", out_features)))
        return self.b.dialect("Linear", inputs, name=name)

    def embedding(self, ids: ir.Value, name: str, vocab_size: int, width: int, *, scale: float = 1.0) -> ir.Value:
        """Rows of `name`.weight [V, H]."""
        weight = self.weight(f"{name}.weight", self.source(f"{name}.weight", vocab_size, width))
        return self.b.dialect("Embedding", [ids, weight], name=name, scale=scale)

    def rms_norm(self, x: ir.Value, name: str, width: int, *, epsilon: float, offset: float = 0.0) -> ir.Value:
        """RMSNorm by `name`.weight + offset (Gemma stores w with an offset of 1)."""
        return self.b.dialect("RMSNorm", [x, self._norm_weight(name, width, offset)], name=name, epsilon=epsilon)

    def head_rms_norm(
        self, x: ir.Value, name: str, head_size: int, num_heads: int, *, epsilon: float, offset: float = 0.0
    ) -> ir.Value:
        """RMSNorm of each head of x [B, S, heads*D] by `name`.weight [D]."""
        weight = self._norm_weight(name, head_size, offset)
        return self.b.dialect("HeadRMSNorm", [x, weight], name=name, epsilon=epsilon, num_heads=num_heads)

    def layer_norm(self, x: ir.Value, name: str, width: int, *, epsilon: float) -> ir.Value:
        """LayerNorm by `name`.weight and `name`.bias."""
        weight = self.weight(f"{name}.weight", self.source(f"{name}.weight", width))
        bias = self.weight(f"{name}.bias", self.source(f"{name}.bias", width))
        return self.b.dialect("LayerNorm", [x, weight, bias], name=name, epsilon=epsilon)

    def _norm_weight(self, name: str, width: int, offset: float) -> ir.Value:
        recipe: Recipe = self.source(f"{name}.weight", width)
        if offset:
            recipe = Affine(Cast(recipe, DType.FLOAT32), offset=offset)
        return self.weight(f"{name}.weight", recipe)

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.op("Add", [x, y])

    # -- decoder scaffolding -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Cache rows of a sequence: max_seq_len, which the pipeline has resolved."""
        assert self.build.max_seq_len is not None
        return self.build.max_seq_len

    def decoder_inputs(self) -> DecoderInputs:
        return DecoderInputs(
            self.b.input("input_ids", DType.INT64, ("batch", "sequence")),
            self.b.input("past_lengths", DType.INT64, ("batch",)),
            self.b.input("lengths", DType.INT64, ("batch",)),
        )

    def rotary(self, config: RotaryConfig, name: str = "rotary") -> Rotary:
        return Rotary(self.b, config, name=name, capacity=self.capacity)

    def rotate(
        self, x: ir.Value, cos_sin: tuple[ir.Value, ir.Value], num_heads: int, rotary_size: int, name: str
    ) -> ir.Value:
        """Rotary embedding of x [B, S, heads*D]; cos and sin are cast to x's type where needed."""
        cos, sin = (self.to_dtype(table) for table in cos_sin)
        return self.b.dialect("Rotary", [x, cos, sin], name=name, num_heads=num_heads, rotary_size=rotary_size)

    def to_dtype(self, value: ir.Value) -> ir.Value:
        """`value` in the compute dtype; one cast however often it is asked for."""
        from trtllm.compiler.ir.weights import IR_TYPES

        target = IR_TYPES[self.dtype]
        if value.dtype == target:
            return value
        for node, _ in value.uses():
            if node.op_type == "Cast" and node.outputs[0].dtype == target:
                return node.outputs[0]
        return self.b.op("Cast", [value], None, target, to=target)

    def attention(
        self,
        qkv: tuple[ir.Value, ir.Value, ir.Value],
        inputs: DecoderInputs,
        layer: CacheLayer,
        num_heads: int,
        *,
        scale: float,
        softcap: float = 0.0,
    ) -> ir.Value:
        """Attention of the next layer, with its cache as graph input and output."""
        index = len(self.cache)
        self.cache.append(layer)
        shape = ("batch", layer.num_kv_heads, self.capacity, layer.head_size)
        past_key = self.b.input(f"past_key.{index}", self.dtype, shape)
        past_value = self.b.input(f"past_value.{index}", self.dtype, shape)
        y, present_key, present_value = self.b.dialect(
            "Attention",
            [*qkv, past_key, past_value, inputs.past_lengths, inputs.lengths],
            name=f"layers.{index}.attention",
            layer=index,
            num_heads=num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            scale=scale,
            window=layer.window,
            softcap=softcap,
        )
        self.b.output(present_key, f"present_key.{index}")
        self.b.output(present_value, f"present_value.{index}")
        return y

    def logits(
        self,
        x: ir.Value,
        head: str,
        embedding: str,
        vocab_size: int,
        width: int,
        *,
        tied: bool,
        bias: bool = False,
        softcap: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """The graph output `logits`, float32 [B, S, V], from `head`.weight or, tied, `embedding`.weight."""
        name = f"{embedding}.weight" if tied else f"{head}.weight"
        if tied:
            self.ignore(f"{head}.weight")
        inputs = [x, self.weight(name, self.source(name, vocab_size, width))]
        if bias:
            inputs.append(self.weight(f"{head}.bias", self.source(f"{head}.bias", vocab_size)))
        self.b.output(self.b.dialect("LogitsHead", inputs, name=head, softcap=softcap, scale=scale), "logits")

    def finish(self, *, vocab_size: int, hidden_size: int, num_layers: int, max_positions: int) -> Network:
        """The finished decoder network. Raises BadInputError that lists every tensor problem at once."""
        self.check_tensors()
        outputs = self.graph.outputs
        order = {value.name: index for index, value in enumerate(outputs)}
        logits = outputs[order["logits"]]
        rest = [value for value in outputs if value is not logits]
        outputs.clear()
        outputs.extend([logits, *rest])
        info = ModelInfo(
            kind="decoder",
            architecture=self.checkpoint.architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            max_positions=max_positions,
            cache=tuple(self.cache),
        )
        return Network(ir.Model(self.graph, ir_version=IR_VERSION), info)

    def check_tensors(self) -> None:
        """Raises BadInputError when tensors were missing, misshapen or left over."""
        unexpected = [name for name in self.checkpoint.tensors if name not in self._used]
        parts = [*self._problems.wrong]
        if self._problems.missing:
            parts.append(f"missing: {', '.join(dict.fromkeys(self._problems.missing))}")
        if unexpected:
            parts.append(f"unexpected: {', '.join(unexpected)}")
        if parts:
            raise BadInputError(
                f"the tensors of {self.checkpoint.source} do not fit its config.json: {'; '.join(parts)}",
                "the config and the weights are of different models, or the checkpoint is incomplete",
            )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
