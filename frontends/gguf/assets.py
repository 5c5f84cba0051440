"""Rebuilds the files beside a model from GGUF metadata: tokenizer, its config, chat template, generation, pooling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm.frontends.gguf.container import GgufContainer
from trtllm.frontends.gguf.metadata import Metadata
from trtllm.frontends.gguf.tokenizer import UnknownTokenizer, build_tokenizer
from trtllm.frontends.gguf.vocabulary import Vocabulary, read_vocabulary
from trtllm.frontends.model_assets import POOLING, ModelAssets

_POOLING_MODES = {1: "pooling_mode_mean_tokens", 2: "pooling_mode_cls_token", 3: "pooling_mode_lasttoken"}
_END_OF_TURN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def build_assets(container: GgufContainer, config: Mapping[str, Any]) -> ModelAssets:
    """The files by name. A tokenizer that cannot be rebuilt is left out, with a note that says why."""
    metadata = Metadata(container.path, container.metadata, "tokenizer.ggml")
    files: dict[str, bytes | Path] = {}
    notes: tuple[str, ...] = ()
    vocabulary = read_vocabulary(metadata)
    if vocabulary is None:
        notes = ("the file holds no tokenizer: the engine will take token ids only",)
    else:
        try:
            built = build_tokenizer(vocabulary)
        except UnknownTokenizer as error:
            notes = (f"{error}: the engine will take token ids only",)
        else:
            files["tokenizer.json"] = built.data
            files["tokenizer_config.json"] = _json(_tokenizer_config(vocabulary, config))
            notes = built.notes
    template = metadata.under("tokenizer").text("chat_template")
    if template:
        files["chat_template.jinja"] = template.encode("utf-8")
    files |= _generation(metadata) | _pooling(container, config)
    return ModelAssets(files, notes)


def _tokenizer_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": vocabulary.model == "bert",
    }
    result |= {f"{role}_token": vocabulary.tokens[index] for role, index in vocabulary.roles.items()}
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return result | ({"model_max_length": longest} if longest else {})


def _generation(metadata: Metadata) -> dict[str, bytes | Path]:
    ends = [metadata.optional_integer(key) for key in _END_OF_TURN_KEYS]
    eos = list(dict.fromkeys(index for index in ends if index is not None))
    values = {
        "bos_token_id": metadata.optional_integer("bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.optional_integer("padding_token_id"),
    }
    given = {key: value for key, value in values.items() if value is not None}
    return {"generation_config.json": _json(given)} if given else {}


def _pooling(container: GgufContainer, config: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """The sentence-transformers files of an embedding model whose metadata state a pooling."""
    architecture = container.metadata["general.architecture"]
    kind = Metadata(container.path, container.metadata, architecture).optional_integer("pooling_type")
    if kind not in _POOLING_MODES:
        return {}
    modes = {mode: kind == number for number, mode in _POOLING_MODES.items()}
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {"word_embedding_dimension": config.get("hidden_size"), **modes}
    return {"modules.json": _json(modules), POOLING: _json(pooling)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
