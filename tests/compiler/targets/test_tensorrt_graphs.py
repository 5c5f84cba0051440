"""The graph that TensorRT is handed computes what transformers does, padded rows and cached steps included.

No plan can run on a machine without a GPU, so the graph itself is run: in onnxruntime, its products spelled out.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import compile_network, read_model
from trtllm.config import BuildConfig, build_config
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.inline_dialect import InlineDialect
from trtllm.progress import Silent

pytest.importorskip("onnxruntime", reason="the reference engine is onnxruntime")

CAPACITY = 32
PROMPT_LENGTHS = np.array([5, 9, 2])
STEPS = 6
TOLERANCE = 2e-4
"""Of float32 logits of size 1 to 10 after two layers."""
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert")
DECODERS = [name for name in ARCHITECTURES if not name.startswith(ENCODERS)]
_REFERENCE = Capabilities("reference", frozenset(), (DType.FLOAT32,), frozenset())


class Graph:
    """The network that the emitter receives, run in onnxruntime with a cache that is fed back."""

    def __init__(self, model: Any, **options: object) -> None:
        checkpoint = read_model(model, progress=Silent())
        settings = {"target": "tensorrt", "dtype": "float32", "max_seq_len": CAPACITY, **options}
        compiled = compile_network(checkpoint, build_config(settings))
        self.operators = {f"{node.domain}::{node.op_type}" for node in compiled.network.graph}
        for weight in compiled.weights:
            weight.bind(RecipeReader(checkpoint.tensors))
        self.info = compiled.network.info
        self._session = _session(compiled.network)
        self._cache = {
            item.name: np.zeros([len(PROMPT_LENGTHS), *item.shape[1:]], np.float32)
            for item in self._session.get_inputs()
            if item.name.startswith(("past_key", "past_value"))
        }

    def step(self, ids: np.ndarray, past_lengths: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids, "past_lengths": past_lengths, "lengths": lengths, **self._cache}
        names = [output.name for output in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(None, feeds), strict=True))
        self._cache = {name: results[name.replace("past_", "present_")] for name in self._cache}
        return results["logits"]

    def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"input_ids": ids, "lengths": lengths})[0]


def _session(network: Network) -> Any:
    import onnxruntime

    InlineDialect().run(network, PassContext(BuildConfig(), _REFERENCE))
    network.model.opset_imports.pop(DOMAIN, None)
    return onnxruntime.InferenceSession(ir.to_proto(network.model).SerializeToString())


def _reference(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None])).logits[0].float().numpy()


def _texts(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 128, length + STEPS) for length in PROMPT_LENGTHS]


def _prompts(texts: list[np.ndarray]) -> np.ndarray:
    ids = np.zeros((len(texts), PROMPT_LENGTHS.max()), np.int64)
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        ids[row, :length] = text[:length]
    return ids


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_padded_batch_and_its_cached_steps_give_the_logits_of_transformers(tiny_model, architecture) -> None:
    model = tiny_model(architecture)
    graph = Graph(model, gather_context_logits=True)
    texts = _texts()
    expected = [_reference(model, text) for text in texts]
    past = np.zeros(len(texts), np.int64)
    logits = graph.step(_prompts(texts), past, PROMPT_LENGTHS)
    for row, length in enumerate(PROMPT_LENGTHS):
        np.testing.assert_allclose(logits[row, :length], expected[row][:length], atol=TOLERANCE, rtol=TOLERANCE)
    past = PROMPT_LENGTHS.copy()
    for _ in range(STEPS):
        tokens = np.array([[text[position]] for text, position in zip(texts, past, strict=True)])
        logits = graph.step(tokens, past, np.ones(len(texts), np.int64))
        for row, position in enumerate(past):
            np.testing.assert_allclose(logits[row, 0], expected[row][position], atol=TOLERANCE, rtol=TOLERANCE)
        past = past + 1


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_gives_the_last_logits_of_each_row(tiny_model, level) -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    texts = _texts(seed=level)
    logits = Graph(model, optimization_level=level).step(_prompts(texts), np.zeros(3, np.int64), PROMPT_LENGTHS)
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        np.testing.assert_allclose(logits[row, 0], _reference(model, text)[length - 1], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_chunk_of_several_tokens_after_a_prompt_gives_the_logits_of_transformers(tiny_model) -> None:
    model = tiny_model("LlamaForCausalLM")
    graph, texts = Graph(model, gather_context_logits=True), _texts(seed=4)
    graph.step(_prompts(texts), np.zeros(3, np.int64), PROMPT_LENGTHS)
    chunk = np.stack([text[length : length + 4] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)])
    logits = graph.step(chunk, PROMPT_LENGTHS, np.full(3, 4))
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        expected = _reference(model, text)[length : length + 4]
        np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith(ENCODERS)])
def test_an_encoder_gives_the_states_of_transformers_on_a_padded_batch(tiny_model, architecture) -> None:
    import torch

    model, texts = tiny_model(architecture), _texts()
    states = Graph(model, pooling="none").encode(_prompts(texts), PROMPT_LENGTHS)
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor(text[None, :length])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states[row, :length], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_softcapped_attention_is_spelled_out_and_other_attention_is_not(tiny_model) -> None:
    assert "::Attention" not in Graph(tiny_model("Gemma2ForCausalLM")).operators
    assert "::Attention" in Graph(tiny_model("LlamaForCausalLM")).operators


def test_all_layers_share_one_mask(tiny_model) -> None:
    checkpoint = read_model(tiny_model("LlamaForCausalLM"), progress=Silent())
    graph = compile_network(checkpoint, build_config({"target": "tensorrt", "max_seq_len": CAPACITY})).network.graph
    masks = {id(node.inputs[3]) for node in graph if node.op_type == "Attention"}
    assert len(masks) == 1
