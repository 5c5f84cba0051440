"""A published config.json with typed access: a missing, mistyped or unsupported value is an error that names its key.

It remembers which keys were read, so that a build can name the ones that nothing looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trtllm.errors import BadInputError, UnsupportedModelError, nearest

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
    "tanh": "tanh",
}  # fmt: skip
"""Hugging Face names of activations to those of the dialect; names of one formula share an entry."""

_WITHOUT_EFFECT = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path",
    "auto_map", "use_cache", "cache_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
    "pretraining_tp", "gradient_checkpointing", "output_attentions", "output_hidden_states", "return_dict",
    "return_dict_in_generate", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "id2label", "label2id",
    "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix", "tokenizer_class",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "n_ctx", "torchscript", "use_bfloat16", "tf_legacy_loss", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed", "max_length", "temperature", "top_k", "top_p",
    "pruned_heads", "cross_attention_hidden_size", "tie_encoder_decoder", "default_theta", "experts_implementation",
    "_experts_implementation", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "ignore_keys_at_rope_validation", "reorder_and_upcast_attn", "is_llama_config",
    "transformers.js_config", "is_pruned",
})  # fmt: skip
"""Keys that change nothing of what a trained decoder computes (training, generation defaults, bookkeeping)."""


class ModelConfig:
    """config.json of one model. A key whose value is null counts as not given, unless `nullable` says otherwise."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.problem(f"has {key} = {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.problem(f"has {key} = {value!r}, expected a number")
        return float(value)

    def nullable(self, key: str, default: float | None) -> float | None:
        """A positive number, or None where the file says null; `default` where the key is absent."""
        return None if self.get(key, default) is None else self.number(key, default)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def activation(self, key: str = "hidden_act", default: str | None = None) -> str:
        name = self.get(key) or default
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"{self.source}: activation {nearest(str(name), _ACTIVATIONS)} is not known",
                f"known activations: {', '.join(_ACTIVATIONS)}",
            )
        return _ACTIVATIONS[name]

    def only(self, key: str, *supported: Any) -> None:
        """Raises UnsupportedModelError unless the key is absent, null, or one of `supported`."""
        value = self.get(key)
        if value is None or value in supported:
            return
        wanted = " or ".join(repr(item) for item in supported) or "null"
        raise UnsupportedModelError(
            f"{self.source}: config.json has {key} = {value!r}, which changes the computation and is not supported",
            f"supported: {key} = {wanted}",
        )

    def windows(self, layers: int, window: int | None, slides: Callable[[int], bool]) -> tuple[int, ...]:
        """Each layer's attention window, 0 where it sees everything: by `layer_types`, else where `slides` says."""
        types = self.get("layer_types")
        if types is None:
            types = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
        if len(types) != layers:
            raise self.problem(f"has {len(types)} layer_types for {layers} layers")
        unknown = sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"})
        if unknown:
            raise UnsupportedModelError(
                f"{self.source}: config.json has layers of type {', '.join(unknown)}, which are not supported",
                "supported layer_types: full_attention, sliding_attention",
            )
        if window is None and "sliding_attention" in types:
            raise self.problem("has sliding_attention layers and no sliding_window")
        return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in types)

    def sliding_window(self, default: int | None) -> int | None:
        """`sliding_window` in tokens, itself included; None where the file says null."""
        return None if self.get("sliding_window", default) is None else self.integer("sliding_window", default)

    def unread(self) -> list[str]:
        """Keys with a value that nothing has read and that are not known to have no effect."""
        return sorted(
            key
            for key, value in self.values.items()
            if key not in self._read and key not in _WITHOUT_EFFECT and value not in (None, False, {}, [])
        )

    def problem(self, what: str) -> BadInputError:
        return BadInputError(f"{self.source}: config.json {what}", "take the config of the published model")

    def _given(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.problem(f"lacks '{key}'")
        return value
