"""Asks an engine one question: `python examples/chat.py ENGINE_DIR "What is the capital of France?"`."""

import sys

from trtllm import LLM, SamplingParams


def main() -> None:
    """Load the engine, ask, print the answer."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    engine, question = sys.argv[1:]
    with LLM(engine) as llm:
        answer = llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=64))
    print(answer.outputs[0].text)


if __name__ == "__main__":
    main()
