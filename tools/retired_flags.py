"""Flags of the reference `trtllm-build` that mean nothing here: old scripts keep running, and are told so in one line.

A flag whose value would change what is built is refused instead: a build that ignores it would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtllm.errors import UsageError


@dataclass(frozen=True)
class RetiredFlag:
    """A flag that is accepted without effect, as long as its value is one of `harmless` (None: any value)."""

    why: str
    takes_value: bool = True
    harmless: tuple[str, ...] | None = None
    hint: str = "leave it out"

    def note(self, name: str, value: str | None) -> str:
        """The line that says so. Raises UsageError for a value that asks for something."""
        if self.harmless is not None and (value is None or value.lower() not in self.harmless):
            raise UsageError(f"{name}{f' {value}' if value else ''} is not supported: {self.why}", self.hint)
        return f"{name}{f' {value}' if value else ''} has no effect here: {self.why}"


_KERNELS = RetiredFlag("the target's kernels are chosen by the passes and the target")
_OFF = ("disable", "none", "0", "false")
_CACHE_FORM = RetiredFlag("every engine keeps its key-value cache in place, and the runtime manages its blocks")
_PACKED = RetiredFlag("steps take each sequence at its own length")

RETIRED: Mapping[str, RetiredFlag] = {
    **dict.fromkeys(
        (
            "--bert-attention-plugin", "--gpt-attention-plugin", "--gemm-plugin", "--gemm-swiglu-plugin",
            "--fp8-rowwise-gemm-plugin", "--low-latency-gemm-plugin", "--low-latency-gemm-swiglu-plugin",
            "--moe-plugin", "--mamba-conv1d-plugin", "--nccl-plugin", "--gemm-allreduce-plugin", "--context-fmha",
            "--context-fmha-fp32-acc", "--bert-context-fmha-fp32-acc", "--use-paged-context-fmha",
            "--use-fp8-context-fmha", "--fuse-fp4-quant", "--norm-quant-fusion", "--reduce-fusion", "--user-buffer",
            "--use-fused-mlp", "--use-custom-all-reduce", "--pp-reduce-scatter", "--paged-state",
        ),
        _KERNELS,
    ),
    **dict.fromkeys(("--remove-input-padding", "--multiple-profiles"), _PACKED),
    "--paged-kv-cache": _CACHE_FORM,
    "--tokens-per-block": RetiredFlag("an engine takes blocks of any size, KvCacheConfig.tokens_per_block chooses it"),
    "--kv-cache-type": RetiredFlag(
        "every engine keeps its key-value cache in place, and the runtime manages its blocks",
        harmless=("continuous", "paged"),
        hint="a decoder without cache cannot be built; leave it out",
    ),
    "--streamingllm": RetiredFlag("it has no sink tokens", harmless=_OFF),
    "--lora-plugin": RetiredFlag("adapters are merged before the build", harmless=_OFF),
    "--dora-plugin": RetiredFlag("adapters are merged before the build", harmless=_OFF),
    "--max-beam-width": RetiredFlag(
        "the cache has one row for each sequence, beams would need one for each beam",
        harmless=("1",),
        hint="build without it and sample with n > 1, or temperature 0",
    ),
    "--max-encoder-input-len": RetiredFlag("encoder-decoder models are not built"),
    "--max-prompt-embedding-table-size": RetiredFlag("prompt tables are not built", harmless=("0",)),
    "--max-multimodal-len": RetiredFlag("only the text model is built", harmless=("0",)),
    "--max-draft-len": RetiredFlag("draft tokens are not built", harmless=("0",)),
    "--speculative-decoding-mode": RetiredFlag("draft tokens are not built", harmless=("none",)),
    "--lora-dir": RetiredFlag("adapters are merged before the build", harmless=(), hint="merge it into the model"),
    "--lora-ckpt-source": RetiredFlag("adapters are merged before the build"),
    "--lora-target-modules": RetiredFlag("adapters are merged before the build", harmless=()),
    "--max-lora-rank": RetiredFlag("adapters are merged before the build"),
    "--model-config": RetiredFlag(
        "an engine is built from its weights", harmless=(), hint="pass the directory that holds config.json and weights"
    ),
    "--model-cls-file": RetiredFlag("models are built from the table of architectures", harmless=()),
    "--model-cls-name": RetiredFlag("models are built from the table of architectures", harmless=()),
    "--weight-sparsity": RetiredFlag("no target here uses 2:4 sparsity", takes_value=False),
    "--fast-build": RetiredFlag("builds are not slowed down by choosing kernels", takes_value=False),
    "--enable-debug-output": RetiredFlag("use --dump to see the graph of every stage", takes_value=False),
    "--gather-generation-logits": RetiredFlag("logits of generated tokens are always there", takes_value=False),
    "--gather-all-token-logits": RetiredFlag(
        "it is two flags", takes_value=False, harmless=(), hint="use --gather-context-logits"
    ),
    "--input-timing-cache": RetiredFlag("no target here keeps a timing cache"),
    "--output-timing-cache": RetiredFlag("no target here keeps a timing cache"),
    "--auto-parallel": RetiredFlag("one engine is built, for one device", harmless=("1",)),
    "--gpus-per-node": RetiredFlag("one engine is built, for one device"),
    "--cluster-key": RetiredFlag("one engine is built, for one device"),
}  # fmt: skip
