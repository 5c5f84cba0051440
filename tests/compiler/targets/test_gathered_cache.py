"""The graph that reads its cache through block tables computes what transformers does: rows of any length, chunks,
windows, single tokens. It is standard ONNX before it is emitted, so onnxruntime runs it, with a pool kept here."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import compile_network, engine_config, read_model
from trtllm.config import BuildConfig, build_config
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.inline_dialect import InlineDialect
from trtllm.progress import Silent

pytest.importorskip("onnxruntime", reason="the reference engine is onnxruntime")

BLOCK_TOKENS, MAX_TOKENS = 8, 48
TOLERANCE = 2e-4
"""Of float32 logits of size 1 to 10 after two layers."""
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert")
DECODERS = [name for name in ARCHITECTURES if not name.startswith(ENCODERS)]
_REFERENCE = Capabilities("reference", frozenset(), (DType.FLOAT32,), frozenset())


class Pool:
    """The network of a gathered cache in onnxruntime, with a pool of blocks that steps read and this writes."""

    def __init__(self, model: Any, **options: object) -> None:
        import onnxruntime

        checkpoint = read_model(model, progress=Silent())
        settings = {
            "target": "tensorrt", "tensorrt_version": "8.6", "dtype": "float32", "max_seq_len": MAX_TOKENS,
            "tensorrt_tokens_per_block": BLOCK_TOKENS, "max_batch_size": 3, "logits_candidates": 7, **options,
        }  # fmt: skip
        compiled = compile_network(checkpoint, build_config(settings))
        self.record = engine_config(checkpoint, compiled)["cache"]
        for weight in compiled.weights:
            weight.bind(RecipeReader(checkpoint.tensors))
        InlineDialect().run(compiled.network, PassContext(BuildConfig(), _REFERENCE))
        compiled.network.model.opset_imports.pop(DOMAIN, None)
        self._session = onnxruntime.InferenceSession(ir.to_proto(compiled.network.model).SerializeToString())
        self._random = np.random.default_rng(0)
        # What no row was written to must not matter as long as it is finite.
        self._cache = {
            item.name: self._random.normal(0, 100, item.shape).astype(np.float32)
            for item in self._session.get_inputs()
            if item.name.startswith(("past_key", "past_value"))
        }
        blocks = next(iter(self._cache.values())).shape[0]
        self._free = list(self._random.permutation(blocks))
        self._tables: dict[int, list[int]] = {}

    def step(self, rows: dict[int, tuple[int, np.ndarray]], *, columns: int | None = None) -> dict[str, np.ndarray]:
        """Runs rows by name as (past length, new tokens), right-padded, and writes the new keys and values."""
        batch, longest = len(rows), max(len(tokens) for _, tokens in rows.values())
        ids, past, lengths = np.zeros((batch, longest), np.int32), np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for row, (name, (start, tokens)) in enumerate(rows.items()):
            ids[row, : len(tokens)], past[row], lengths[row] = tokens, start, len(tokens)
            table = self._tables.setdefault(name, [])
            while len(table) * BLOCK_TOKENS < start + len(tokens):
                table.append(self._free.pop())
        width = columns or max(len(self._tables[name]) for name in rows)
        table = self._random.integers(0, len(self._free), (batch, width)).astype(np.int32)
        for row, name in enumerate(rows):
            table[row, : len(self._tables[name])] = self._tables[name][:width]
        feeds = {"input_ids": ids, "past_lengths": past, "lengths": lengths, "block_table": table, **self._cache}
        feeds = {item.name: feeds[item.name] for item in self._session.get_inputs()}
        names = [output.name for output in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(None, feeds), strict=True))
        for name, cache in self._cache.items():
            new = results[name.replace("past_", "present_")]
            for row, (key, (start, tokens)) in enumerate(rows.items()):
                for offset in range(len(tokens)):
                    block, place = divmod(start + offset, BLOCK_TOKENS)
                    cache[self._tables[key][block], :, place] = new[row, offset]
        return results


def _reference(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None])).logits[0].float().numpy()


def _texts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 128, length) for length in lengths]


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("architecture", DECODERS)
def test_prompts_chunks_and_steps_give_the_logits_of_transformers(tiny_model, architecture) -> None:
    model = tiny_model(architecture)
    pool = Pool(model, gather_context_logits=True)
    texts = _texts(33, 20, 12)
    expected = [_reference(model, text) for text in texts]
    done = [0, 0, 0]
    for lengths in ([17, 9, 2], [7, 1, 4], [1, 1, 1], [3, 1, 1], [1, 1, 1]):
        rows = {name: (done[name], texts[name][done[name] : done[name] + count]) for name, count in enumerate(lengths)}
        logits = pool.step(rows)["logits"]
        for name, count in enumerate(lengths):
            _close(logits[name, :count], expected[name][done[name] : done[name] + count])
            done[name] += count


def test_rows_come_and_go_and_tables_may_be_wider_than_needed(tiny_model) -> None:
    model = tiny_model("LlamaForCausalLM")
    pool = Pool(model, gather_context_logits=True)
    texts = _texts(10, 14, seed=2)
    expected = [_reference(model, text) for text in texts]
    pool.step({0: (0, texts[0][:9])}, columns=5)
    logits = pool.step({1: (0, texts[1][:13]), 0: (9, texts[0][9:10])}, columns=6)["logits"]
    _close(logits[0, :13], expected[1][:13])
    _close(logits[1, 0], expected[0][9])
    _close(pool.step({1: (13, texts[1][13:])})["logits"][0, 0], expected[1][13])


def test_the_last_token_of_each_row_has_logits_and_candidates(tiny_model) -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    pool = Pool(model)
    texts = _texts(11, 4, 7, seed=3)
    results = pool.step({name: (0, text) for name, text in enumerate(texts)})
    assert results["logits"].shape == (3, 128)
    for row, text in enumerate(texts):
        logits = _reference(model, text)[-1].astype(np.float64)
        _close(results["logits"][row], logits)
        order = np.argsort(-results["logits"][row], kind="stable")[:7]
        np.testing.assert_array_equal(results["candidate_indices"][row], order)
        np.testing.assert_array_equal(results["candidate_values"][row], results["logits"][row][order])
        np.testing.assert_allclose(results["log_sum_exp"][row], np.log(np.exp(logits).sum()), atol=TOLERANCE)


def test_a_row_of_padding_alone_harms_nobody(tiny_model) -> None:
    model = tiny_model("LlamaForCausalLM")
    pool, text = Pool(model), _texts(9)[0]
    results = pool.step({0: (0, text), 1: (0, text[:0])})
    _close(results["logits"][0], _reference(model, text)[-1])
    assert all(np.isfinite(result).all() for result in results.values())


def test_config_says_what_the_cache_is(tiny_model) -> None:
    record = Pool(tiny_model("LlamaForCausalLM")).record
    assert record["kind"] == "gathered" and record["tokens_per_block"] == BLOCK_TOKENS
    assert record["num_blocks"] == 3 * 6 * 3 // 2 and record["candidates"] == 7
    assert Pool(tiny_model("LlamaForCausalLM"), tensorrt_cache_blocks=20).record["num_blocks"] == 20
    assert Pool(tiny_model("LlamaForCausalLM"), gather_context_logits=True).record["candidates"] == 0
