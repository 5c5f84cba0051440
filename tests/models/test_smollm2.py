"""The real SmolLM2-135M-Instruct, from its GGUF file to text, held against transformers on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, BuildConfig, SamplingParams, compile
from trtllm.runtime.session import open_session
from trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
NEAR_TIE = 1e-3
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are red,",
    "SELECT name, price FROM products WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first humans",
    "To make a cup of tea, first",
    "The mitochondria is the",
    "Q: What is 12 times 12?\nA:",
    "Translate to French: Good morning, my friend.\n",
    "The quick brown fox",
    "import numpy as np\n\nx = np.",
    "Les enfants jouent dans",
    "1, 1, 2, 3, 5, 8, 13,",
    "She opened the door and saw",
    "Photosynthesis is the process by which",
    "# Shopping list\n\n- milk\n- ",
    "¿Cuál es la capital de España? 🇪🇸",
)


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "fp32"
    compile(smollm2_gguf, output_dir=folder, dequantize=True, max_batch_size=8, max_seq_len=512)
    return folder


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name, dtype="float32"
    )
    return model.eval()


def test_greedy_text_is_that_of_transformers_on_twenty_prompts(engine: Path, reference: Any) -> None:
    import torch

    with LLM(engine) as llm:
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate(list(PROMPTS), params)
    for output in outputs:
        prompt, ours = output.prompt_token_ids, output.outputs[0].token_ids
        assert len(ours) == NEW_TOKENS
        with torch.no_grad():  # one pass over our own tokens gives the reference's choice after each of them
            logits = reference(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :].numpy()
        different = np.flatnonzero(logits.argmax(-1) != ours)
        if different.size:
            row = logits[different[0]]
            gap = row.max() - row[ours[different[0]]]
            assert gap < NEAR_TIE, f"{output.prompt!r} token {different[0]}: {gap} below the top logit"


def test_a_chat_answer_is_right(engine: Path) -> None:
    with LLM(engine) as llm:
        answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert answer.outputs[0].text == "The capital of France is Paris."
    assert answer.outputs[0].finish_reason == "stop"


# Mean divergence from the full-precision model over these texts; measured 0.004 and 0.4 for plain rounding to nearest
# on this small model, whose published weights lie on another 4-bit grid already.
@pytest.mark.parametrize(("quantization", "limit"), [("W8A16", 0.01), ("W4A16", 0.8)])
def test_rounded_weights_stay_near_the_model(
    smollm2_gguf: Path, reference: Any, tmp_path: Path, quantization: str, limit: float
) -> None:
    import torch

    config = BuildConfig(quantization=quantization, max_batch_size=1, max_seq_len=256, gather_context_logits=True)
    built = compile(smollm2_gguf, output_dir=tmp_path / "engine", config=config)
    session, tokenizer = open_session(built), Tokenizer.from_directory(built.path)
    divergences = []
    for prompt in PROMPTS:
        ids = np.array([tokenizer.encode(prompt)])
        every = np.arange(ids.size)
        table = np.arange(session.info.cache.num_blocks, dtype=np.int32)[None]
        logits = session.step(ids[0], every, np.array([0, ids.size]), np.zeros(1, np.int64), every, [table])
        ours = torch.tensor(logits).log_softmax(-1)
        with torch.no_grad():
            exact = reference(torch.tensor(ids)).logits[0].log_softmax(-1)
        divergences.append(((exact - ours) * exact.exp()).sum(-1).numpy())
    assert np.concatenate(divergences).mean() < limit


def test_batching_changes_no_token(engine: Path) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(engine) as llm:
        together = llm.generate(list(PROMPTS), params)
        alone = [llm.generate(prompt, params) for prompt in PROMPTS[:6]]
    for one, many in zip(alone, together, strict=False):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
