"""Writes smollm2_reference.json: prompts, the 64 tokens that transformers chooses in float32, and how sure it is.

    python tests/gpu/make_reference.py ~/.cache/trtllm/models/SmolLM2-135M-Instruct.Q4_1.gguf

Needs torch and transformers, and some minutes of a CPU. run_session.py reads it where neither is installed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "SELECT name, price FROM products WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first humans",
    "To make a cup of tea, first",
    "Q: What is 12 times 12?\nA:",
    "Translate to French: Good morning, my friend.\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Photosynthesis is the process by which",
)
NEW_TOKENS = 64


def generated(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that all prompts continue with, side by side behind padding."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return made[:, longest:].tolist()


def entry(model: Any, prompt: str, ids: list[int], made: list[int]) -> dict[str, Any]:
    """One prompt's tokens, the second best at each place, and by how much the best logit is larger."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids + made[:-1]])).logits[0, len(ids) - 1 :]
    best = logits.topk(2, dim=-1)
    assert best.indices[:, 0].tolist() == made, f"{prompt!r}: a tie between two tokens; choose another prompt"
    return {
        "prompt": prompt,
        "prompt_token_ids": ids,
        "token_ids": best.indices[:, 0].tolist(),
        "second_ids": best.indices[:, 1].tolist(),
        "margins": [round(float(gap), 5) for gap in best.values[:, 0] - best.values[:, 1]],
        "largest_logit": round(float(logits.abs().max()), 4),
    }


def main() -> None:
    """Writes the file beside this one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the model's file")
    arguments = parser.parse_args()
    import transformers

    place = {"gguf_file": arguments.gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.gguf.parent, dtype="float32", **place).eval()
    model.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.gguf.parent, **place)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    entries = []
    for prompt, own, made in zip(PROMPTS, ids, generated(model, ids), strict=True):
        entries.append(entry(model, prompt, own, made))
        print(f"{prompt!r}: {tokenizer.decode(made)[:50]!r}, least margin {min(entries[-1]['margins'])}", flush=True)
    lines = ",\n ".join(json.dumps(item) for item in entries)
    text = f'{{"model": "{arguments.gguf.name}", "dtype": "float32", "transformers": "{transformers.__version__}",\n'
    target = Path(__file__).with_name("smollm2_reference.json")
    target.write_text(f'{text}"prompts": [\n {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
