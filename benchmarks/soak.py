"""Run random requests against one engine for a long time, and watch its memory and its books.

    python benchmarks/soak.py build/bench/trtllm-serving-w4a16 --minutes 30 --json build/bench/soak.json

Threads send requests that finish, stream, are cancelled, are abandoned, are refused, sample several sequences, search
with beams, stop at a string, or follow a grammar (where `llguidance` is installed). Resident memory is recorded every
ten seconds and the executor's books are checked; at the end, when nothing is under way, every block must be back. Exit
status 1: a request ended otherwise than it had to, or the books did not balance.
"""

import argparse
import dataclasses
import importlib.util
import json
import random
import statistics
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from machine import describe_machine

from trtllm import LLM, SamplingParams, TrtllmError

SAMPLE_SECONDS = 10.0
DRAIN_SECONDS = 120
SHOWN_PROBLEMS = 20
STOP_STRING = "e"


@dataclasses.dataclass
class Record:
    """What happened; threads share it under the lock."""

    finished: Counter[str] = dataclasses.field(default_factory=Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0
    samples: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # second, resident MiB
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def note(self, kind: str, tokens: int, problem: str | None = None) -> None:
        """Count a request, and remember what was wrong with it."""
        with self.lock:
            self.finished[kind] += 1
            self.tokens += tokens
            if problem:
                self.problems.append(f"{kind}: {problem}")


@dataclasses.dataclass(frozen=True)
class Client:
    """One thread's view: the engine, its own randomness, and the bounds of what it asks."""

    llm: LLM
    random: random.Random
    shared: list[list[int]]
    vocabulary: int
    longest_prompt: int
    longest_output: int
    abandoned: list[weakref.ref] = dataclasses.field(default_factory=list)

    def prompt(self) -> list[int]:
        """Draw a prompt; every second one begins with a shared prefix."""
        length = self.random.randint(1, self.longest_prompt)
        drawn = [self.random.randrange(self.vocabulary) for _ in range(length)]
        if self.random.random() < 0.5:
            prefix = self.random.choice(self.shared)
            drawn = prefix[: self.random.randint(1, len(prefix))] + drawn
        return drawn[: self.longest_prompt]

    def params(self, **fields: object) -> SamplingParams:
        """Draw sampling parameters; the fields given stand."""
        drawn: dict[str, object] = {"max_tokens": self.random.randint(1, self.longest_output)}
        if self.random.random() < 0.5:
            drawn |= {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": self.random.randrange(2**31)}
        return SamplingParams(**(drawn | fields))  # type: ignore[arg-type]


def finish(client: Client) -> int:
    """Wait for a request that runs to its full length."""
    params = client.params(ignore_eos=True)
    output = client.llm.generate_async(client.prompt(), params).result(DRAIN_SECONDS)
    require(len(output.outputs[0].token_ids) == params.max_tokens, "is shorter than asked")
    return params.max_tokens


def stream(client: Client) -> int:
    """Read a stream; its pieces must add up to the whole."""
    pieces: list[int] = []
    for output in client.llm.generate_async(client.prompt(), client.params(), streaming=True):
        pieces += output.outputs[0].token_ids_diff
    require(pieces == output.outputs[0].token_ids, "the pieces of the stream are not the output")
    return len(pieces)


def cancel(client: Client) -> int:
    """Cancel a request somewhere between its enqueueing and its end; it must end."""
    handle = client.llm.generate_async(client.prompt(), client.params(ignore_eos=True), streaming=True)
    time.sleep(client.random.choice((0.0, 0.0, client.random.random() * 0.5)))
    handle.abort()
    output = handle.result(DRAIN_SECONDS)
    require(output.outputs[0].finish_reason in ("cancelled", "length"), "was cancelled and ended otherwise")
    return len(output.outputs[0].token_ids)


def abandon(client: Client) -> int:
    """Let go of a stream after its first piece; the request runs on alone."""
    handle = client.llm.generate_async(client.prompt(), client.params(), streaming=True)
    client.abandoned.append(weakref.ref(handle))
    next(iter(handle))
    return 0


def refuse(client: Client) -> int:
    """Ask for what cannot be served; the caller must be told, and nobody else be disturbed."""
    wrong = client.random.choice(([], [client.vocabulary], [-1], [0] * 1_000_000))
    try:
        client.llm.generate_async(wrong, client.params()).result(DRAIN_SECONDS)
    except TrtllmError:
        return 0
    raise AssertionError(f"a prompt of {len(wrong)} tokens that cannot be served was served")


def sample(client: Client) -> int:
    """Sample several sequences of one prompt."""
    count = client.random.randint(2, 4)
    params = client.params(n=count, temperature=1.0, top_p=0.9, seed=client.random.randrange(2**31))
    output = client.llm.generate_async(client.prompt(), params).result(DRAIN_SECONDS)
    require(len(output.outputs) == count, "has too few samples")
    return sum(len(item.token_ids) for item in output.outputs)


def beams(client: Client) -> int:
    """Search with beams; the hypotheses come best first."""
    width = client.random.randint(2, 4)
    params = SamplingParams(max_tokens=client.random.randint(1, 16), n=width, use_beam_search=True)
    output = client.llm.generate_async(client.prompt(), params).result(DRAIN_SECONDS)
    require(len(output.outputs) == width, "has too few hypotheses")
    return sum(len(item.token_ids) for item in output.outputs)


def stop(client: Client) -> int:
    """Stop at a string, which must not be in the text."""
    output = client.llm.generate_async(client.prompt(), client.params(stop=STOP_STRING)).result(DRAIN_SECONDS)
    require(STOP_STRING not in output.outputs[0].text, "the stop string is in the text")
    return len(output.outputs[0].token_ids)


def guided(client: Client) -> int:
    """Follow an expression: an output that ended by itself is one of the words."""
    from trtllm.runtime.guided_decoding import GuidedDecodingParams

    words = ["yes", "no", "perhaps"]
    params = client.params(max_tokens=16, guided_decoding=GuidedDecodingParams(choice=words))
    output = client.llm.generate_async(client.prompt(), params).result(DRAIN_SECONDS)
    first = output.outputs[0]
    require(first.finish_reason != "stop" or first.text in words, f"the text is {first.text!r}")
    return len(first.token_ids)


# kind -> how often it is drawn
KINDS: dict[Callable[[Client], int], int] = {
    finish: 6,
    stream: 6,
    cancel: 4,
    abandon: 1,
    refuse: 2,
    sample: 2,
    beams: 2,
    stop: 2,
    guided: 2,
}


def require(holds: bool, problem: str) -> None:
    """Raise AssertionError with the problem unless it holds."""
    if not holds:
        raise AssertionError(problem)


def run_client(client: Client, record: Record, deadline: float) -> None:
    """Send requests of random kinds, one after the other, until the deadline."""
    kinds = [kind for kind in KINDS if kind is not guided or importlib.util.find_spec("llguidance")]
    weights = [KINDS[kind] for kind in kinds]
    while time.monotonic() < deadline:
        kind = client.random.choices(kinds, weights)[0]
        try:
            record.note(kind.__name__, kind(client))
        except Exception as error:
            record.note(kind.__name__, 0, f"{type(error).__name__}: {error}")


def resident_mib() -> float:
    """Return this process's resident memory."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def watch(llm: LLM, record: Record, seconds: float) -> None:
    """Sample memory and check the books until the time is over."""
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        record.samples.append((elapsed, resident_mib()))
        try:
            llm.check()
        except Exception as error:
            record.note("books", 0, f"after {elapsed:.0f} s: {error}")
        if len(record.samples) % 6 == 1:
            done = sum(record.finished.values())
            print(f"{elapsed:6.0f} s, {record.samples[-1][1]:.0f} MiB, {done} requests", file=sys.stderr, flush=True)
        time.sleep(min(SAMPLE_SECONDS, max(0.0, seconds - elapsed)))


def settle(llm: LLM, clients: list[Client], record: Record) -> None:
    """Wait for what was abandoned, then prove that every block came back."""
    try:
        for reference in [item for client in clients for item in client.abandoned]:
            if (handle := reference()) is not None:
                handle.result(DRAIN_SECONDS)
        llm.check()
    except Exception as error:
        record.note("books", 0, f"when idle: {type(error).__name__}: {error}")


def memory_slope(samples: list[tuple[float, float]], warm_up: float) -> float | None:
    """Return MiB an hour, the least-squares line through the samples after the warm-up; None when they are too few."""
    kept = [item for item in samples if item[0] >= warm_up]
    if len(kept) < 3:
        return None
    times, sizes = zip(*kept, strict=True)
    return 3600 * statistics.linear_regression(times, sizes).slope


def soak(arguments: argparse.Namespace) -> dict:
    """Run all clients for the time asked and return what is reported."""
    seconds = 60 * arguments.minutes
    llm = LLM(str(arguments.engine), threads=arguments.threads, max_batch_size=arguments.batch, max_beam_width=4)
    vocabulary = llm.engine.config["model"]["vocab_size"]
    source = random.Random(arguments.seed)
    shared = [[source.randrange(vocabulary) for _ in range(arguments.longest_prompt)] for _ in range(3)]
    lengths = (arguments.longest_prompt, arguments.longest_output)
    record, deadline = Record(), time.monotonic() + seconds
    clients = [
        Client(llm, random.Random(f"{arguments.seed}/{index}"), shared, vocabulary, *lengths)
        for index in range(arguments.clients)
    ]
    threads = [threading.Thread(target=run_client, args=(client, record, deadline)) for client in clients]
    for thread in threads:
        thread.start()
    watch(llm, record, seconds)
    for thread in threads:
        thread.join()
    settle(llm, clients, record)
    final = resident_mib()
    llm.shutdown()
    return {
        "requests": dict(record.finished),
        "tokens": record.tokens,
        "problems": record.problems,
        "slope_mib_per_hour": memory_slope(record.samples, arguments.warm_up * seconds),
        "final_mib": final,
        "samples": record.samples,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="an engine directory; sequences of some 300 tokens must fit")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12, help="threads that send requests")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="compute threads of the engine")
    parser.add_argument("--longest-prompt", type=int, default=200)
    parser.add_argument("--longest-output", type=int, default=48)
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the time that the slope leaves out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    result = soak(arguments)
    slope = result["slope_mib_per_hour"]
    print(", ".join(f"{kind} {count}" for kind, count in sorted(result["requests"].items())))
    print(
        f"{result['tokens']} tokens; {result['final_mib']:.0f} MiB at the end, "
        f"{'slope unknown: too few samples' if slope is None else f'{slope:+.1f} MiB an hour after the warm-up'}"
    )
    for problem in result["problems"][:SHOWN_PROBLEMS]:
        print(problem)
    print(f"{len(result['problems'])} problems")
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("engine", "json")}
        content = {"machine": describe_machine(), "settings": settings, **result}
        arguments.json.write_text(json.dumps(content, indent=1))
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
