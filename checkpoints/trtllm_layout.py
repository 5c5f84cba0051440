"""Names and shapes of the project's checkpoint format against those of Hugging Face, for every architecture.

The names are the reference tool's: `transformer.layers.N.attention.qkv.weight` is [q; k; v], `mlp.fc` is what is
activated (gate_proj), `mlp.gate` what it is multiplied by (up_proj), matrices are [out, in]. It knows no files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trtllm.errors import UnsupportedModelError


class Split(enum.Enum):
    """How the ranks of a tensor-parallel group share a tensor. Biases of COLUMNS are whole on every rank."""

    NONE = "none"
    ROWS = "rows"
    COLUMNS = "columns"
    HEADS = "heads"
    """Rows of query, key and value, each by its heads."""
    VOCABULARY = "vocabulary"
    """Rows, padded with zeros to a multiple of the group."""
    EMBEDDING = "embedding"
    """As VOCABULARY where the embedding is parallel, else NONE."""


@dataclass(frozen=True)
class Rule:
    """One module here (`ours`) and the modules there whose matrices are its rows, in order."""

    ours: str
    theirs: tuple[str, ...]
    split: Split = Split.NONE
    transposed: bool = False
    """Whether matrices there are [in, out]."""
    half: int | None = None
    """0 or 1: only that half of the rows there."""
    experts: bool = False
    """Whether `theirs` are format strings of an expert's number, stacked here on a new first axis."""


@dataclass(frozen=True)
class Family:
    """The rules of an architecture: outside the layers, before and after them, and in layer N under `prefix`.N."""

    first: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    last: tuple[Rule, ...]
    prefix: str
    our_prefix: str = "transformer.layers"


def _attention(stem: str, query: str, key: str, value: str, output: str) -> tuple[Rule, ...]:
    return (
        Rule("attention.qkv", tuple(f"{stem}.{name}" for name in (query, key, value)), Split.HEADS),
        Rule("attention.dense", (output,), Split.COLUMNS),
    )


_SELF_ATTENTION = (
    *_attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj"),
    Rule("attention.q_layernorm", ("self_attn.q_norm",)),
    Rule("attention.k_layernorm", ("self_attn.k_norm",)),
)
_GATED_MLP = (
    Rule("mlp.fc", ("mlp.gate_proj",), Split.ROWS),
    Rule("mlp.gate", ("mlp.up_proj",), Split.ROWS),
    Rule("mlp.proj", ("mlp.down_proj",), Split.COLUMNS),
)
_NORMS = (Rule("input_layernorm", ("input_layernorm",)), Rule("post_layernorm", ("post_attention_layernorm",)))
_SANDWICH_NORMS = (
    Rule("pre_feedforward_layernorm", ("pre_feedforward_layernorm",)),
    Rule("post_feedforward_layernorm", ("post_feedforward_layernorm",)),
)


def _mixture(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The reference stacks [up; gate] of every expert."""
    expert = f"{block}.experts.{{}}"
    return (
        Rule("mlp.router", (f"{block}.gate",)),
        Rule("mlp.fc", (f"{expert}.{up}", f"{expert}.{gate}"), Split.ROWS, experts=True),
        Rule("mlp.proj", (f"{expert}.{down}",), Split.COLUMNS, experts=True),
    )


def _decoder(layer: tuple[Rule, ...]) -> Family:
    return Family(
        first=(Rule("transformer.vocab_embedding", ("model.embed_tokens",), Split.EMBEDDING),),
        layer=layer,
        last=(Rule("transformer.ln_f", ("model.norm",)), Rule("lm_head", ("lm_head",), Split.VOCABULARY)),
        prefix="model.layers",
    )


_LLAMA = _decoder((*_NORMS, *_SELF_ATTENTION, *_GATED_MLP))
_GEMMA = _decoder((*_NORMS, *_SANDWICH_NORMS, *_SELF_ATTENTION, *_GATED_MLP))
_MIXTRAL = _decoder((*_NORMS, *_SELF_ATTENTION, *_mixture("block_sparse_moe", "w1", "w3", "w2")))
_QWEN_MOE = _decoder((*_NORMS, *_SELF_ATTENTION, *_GATED_MLP, *_mixture("mlp", "gate_proj", "up_proj", "down_proj")))
_PHI3 = _decoder(
    (
        *_NORMS,
        Rule("attention.qkv", ("self_attn.qkv_proj",), Split.HEADS),
        Rule("attention.dense", ("self_attn.o_proj",), Split.COLUMNS),
        Rule("mlp.fc", ("mlp.gate_up_proj",), Split.ROWS, half=0),
        Rule("mlp.gate", ("mlp.gate_up_proj",), Split.ROWS, half=1),
        Rule("mlp.proj", ("mlp.down_proj",), Split.COLUMNS),
    )
)
_GPT2 = Family(
    first=(
        Rule("transformer.vocab_embedding", ("transformer.wte",), Split.EMBEDDING),
        Rule("transformer.position_embedding", ("transformer.wpe",)),
    ),
    layer=(
        Rule("input_layernorm", ("ln_1",)),
        Rule("attention.qkv", ("attn.c_attn",), Split.HEADS, transposed=True),
        Rule("attention.dense", ("attn.c_proj",), Split.COLUMNS, transposed=True),
        Rule("post_layernorm", ("ln_2",)),
        Rule("mlp.fc", ("mlp.c_fc",), Split.ROWS, transposed=True),
        Rule("mlp.proj", ("mlp.c_proj",), Split.COLUMNS, transposed=True),
    ),
    last=(Rule("transformer.ln_f", ("transformer.ln_f",)), Rule("lm_head", ("lm_head",), Split.VOCABULARY)),
    prefix="transformer.h",
)


def _encoder(layer: tuple[Rule, ...], prefix: str) -> Family:
    return Family(
        first=(
            Rule("embedding.vocab_embedding", ("embeddings.word_embeddings",), Split.EMBEDDING),
            Rule("embedding.position_embedding", ("embeddings.position_embeddings",)),
            Rule("embedding.token_embedding", ("embeddings.token_type_embeddings",)),
            Rule("embedding.embedding_ln", ("embeddings.LayerNorm",)),
        ),
        layer=layer,
        last=(Rule("pooler.dense", ("pooler.dense",)),),
        prefix=prefix,
        our_prefix="layers",
    )


_BERT = _encoder(
    (
        *_attention("attention.self", "query", "key", "value", "attention.output.dense"),
        Rule("input_layernorm", ("attention.output.LayerNorm",)),
        Rule("mlp.fc", ("intermediate.dense",), Split.ROWS),
        Rule("mlp.proj", ("output.dense",), Split.COLUMNS),
        Rule("post_layernorm", ("output.LayerNorm",)),
    ),
    "encoder.layer",
)
_DISTILBERT = _encoder(
    (
        *_attention("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"),
        Rule("input_layernorm", ("sa_layer_norm",)),
        Rule("mlp.fc", ("ffn.lin1",), Split.ROWS),
        Rule("mlp.proj", ("ffn.lin2",), Split.COLUMNS),
        Rule("post_layernorm", ("output_layer_norm",)),
    ),
    "transformer.layer",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MinistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen3MoeForCausalLM": _QWEN_MOE,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "Phi3ForCausalLM": _PHI3,
    "GPT2LMHeadModel": _GPT2,
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "DistilBertModel": _DISTILBERT,
}


def family_of(architecture: str, source: str) -> Family:
    """Raises UnsupportedModelError for an architecture that the format has no names for."""
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{source}: the checkpoint format has no names for architecture '{architecture}'",
            f"it has: {', '.join(FAMILIES)}",
        )
    return FAMILIES[architecture]


@dataclass(frozen=True)
class Placed:
    """A rule at its place: full names, and the layer it belongs to (None: before or after them)."""

    rule: Rule
    ours: str
    theirs: tuple[str, ...]
    layer: int | None = None
    is_last: bool = False


def placed_rules(family: Family, num_layers: int) -> Iterator[Placed]:
    """Every rule of a model of `num_layers` layers, in the order of the computation."""
    for rule in family.first:
        yield Placed(rule, rule.ours, rule.theirs)
    for layer in range(num_layers):
        for rule in family.layer:
            theirs = tuple(f"{family.prefix}.{layer}.{name}" for name in rule.theirs)
            yield Placed(rule, f"{family.our_prefix}.{layer}.{rule.ours}", theirs, layer)
    for rule in family.last:
        yield Placed(rule, rule.ours, rule.theirs, is_last=True)
