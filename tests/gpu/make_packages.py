"""Writes network packages of tiny models of every architecture, with what transformers computes of them.

    python tests/gpu/make_packages.py build/gpu/tiny --tensorrt-version 8.6

Runs on any machine with torch and transformers. build_plans.py finishes the packages where the GPU is, and
run_tiny.py compares what the plans compute with `expected.npz` in each package's folder.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import finish_build, prepare_build
from trtllm.config import build_config

POSITIONS, VOCABULARY, TOKENS = 64, 128, 24
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "dim": 64, "intermediate_size": 96, "hidden_dim": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "query_pre_attn_scalar": 16, "max_position_embeddings": POSITIONS, "sliding_window": 6,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def tiny(architecture: str) -> Any:
    """Two layers of hidden size 64, from a seed."""
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    known = {key: value for key, value in SIZES.items() if hasattr(model_class.config_class(), key)}
    torch.manual_seed(3)
    return model_class(model_class.config_class(**known)).eval()


def expected(model: Any, *, encodes: bool) -> dict[str, np.ndarray]:
    """Token ids [3, TOKENS] and float32 logits, or last hidden states, of each row."""
    import torch

    ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, TOKENS))
    with torch.no_grad():
        results = [model(torch.tensor(row[None])) for row in ids]
    values = [(result.last_hidden_state if encodes else result.logits)[0].float().numpy() for result in results]
    return {"input_ids": ids.astype(np.int32), "expected": np.stack(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensorrt-version", default="8.6")
    parser.add_argument("--dtypes", default="float32,float16")
    arguments = parser.parse_args()
    for architecture in ARCHITECTURES:
        try:
            model = tiny(architecture)
        except AttributeError:
            print(f"{architecture}: transformers has none")
            continue
        encodes = architecture.startswith(ENCODERS)
        for dtype in arguments.dtypes.split(","):
            options = {
                "target": "tensorrt", "tensorrt_version": arguments.tensorrt_version, "dtype": dtype,
                "max_seq_len": POSITIONS - 2 if encodes else POSITIONS, "max_batch_size": 3, "pooling": "none",
                "tensorrt_tokens_per_block": 8, "tensorrt_decode_batches": (1, 3),
                "tensorrt_prefill_lengths": (8, 16), "tensorrt_table_lengths": (32,),
            }  # fmt: skip
            target = arguments.folder / f"{architecture}-{dtype}"
            prepared = prepare_build(model, build_config(options), target / "network", emits_network=True)
            finish_build(prepared, target / "network")
            np.savez(target / "expected.npz", **expected(model, encodes=encodes))
            print(target)


if __name__ == "__main__":
    main()
