"""This project's engine as a contender, through its public door."""

import asyncio
import time
from pathlib import Path

from serving_results import Completion
from serving_workload import ServingRequest


class TrtllmInflight:
    """`llm.generate` on all requests when they arrive together, one `llm.generate_async` each when they do not."""

    def __init__(self, engine_dir: Path, slots: int, threads: int):
        from trtllm import LLM

        self.llm = LLM(str(engine_dir), threads=threads, max_batch_size=slots)

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Serve every request from its arrival on; tokens are timed only when the requests arrive one by one."""
        if requests[-1].arrival > 0:
            return asyncio.run(self._stream_all(requests))
        outputs = self.llm.generate([request.prompt for request in requests], [_greedy(item) for item in requests])
        return [Completion(list(output.outputs[0].token_ids)) for output in outputs]

    async def _stream_all(self, requests: list[ServingRequest]) -> list[Completion]:
        start = time.perf_counter()
        return await asyncio.gather(*(self._stream(request, start) for request in requests))

    async def _stream(self, request: ServingRequest, start: float) -> Completion:
        await asyncio.sleep(max(0.0, request.arrival - (time.perf_counter() - start)))
        completion = Completion()
        async for output in self.llm.generate_async(request.prompt, _greedy(request), streaming=True):
            completion.tokens = list(output.outputs[0].token_ids)
            news = len(completion.tokens) - len(completion.seconds)
            completion.seconds += [time.perf_counter() - start] * news
        return completion

    def close(self) -> None:
        """End the engine."""
        self.llm.shutdown()


class TrtllmOneByOne(TrtllmInflight):
    """The same engine without batching: one call of `llm.generate` after the other."""

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        return [completion for request in requests for completion in super(TrtllmOneByOne, self).serve([request])]


def _greedy(request: ServingRequest):
    from trtllm import SamplingParams

    return SamplingParams(max_tokens=request.new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
