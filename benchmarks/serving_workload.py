"""The requests of the serving benchmark: a seeded mix of short, long and prefix-sharing prompts, and their arrivals."""

import dataclasses
import random

from measurement import FIRST_TOKEN, LAST_TOKEN

# Prompt lengths in tokens, output lengths in new tokens, both inclusive.
SHORT_PROMPT, LONG_PROMPT, OUTPUT = (30, 120), (400, 1200), (16, 128)
SYSTEM_PROMPTS = (500, 512)
SHARING_SHARE, LONG_SHARE = 1 / 3, 4 / 15  # of all requests; the others are short
LONGEST_SEQUENCE = 1536  # no request of any mode is longer, prompt and output together


@dataclasses.dataclass(frozen=True)
class ServingRequest:
    """A prompt, the number of tokens to generate for it, and when it arrives, in seconds after the first."""

    prompt: list[int]
    new_tokens: int
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mix:
    """Which requests: how many, from which seed, and how many arrive a second (None: all at once)."""

    count: int
    seed: int
    rate: float | None = None


def draw_tokens(source: random.Random, count: int) -> list[int]:
    """Draw ordinary tokens; a prompt costs the same whatever it says, because every engine ignores end tokens."""
    return [source.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def make_requests(mix: Mix) -> list[ServingRequest]:
    """Return the mix in its order of arrival; the same mix gives the same requests in every process."""
    source = random.Random(f"serving/{mix.seed}")
    systems = [draw_tokens(source, length) for length in SYSTEM_PROMPTS]
    sharing, long = round(mix.count * SHARING_SHARE), round(mix.count * LONG_SHARE)
    prompts = [
        systems[index % len(systems)] + draw_tokens(source, source.randint(*SHORT_PROMPT)) for index in range(sharing)
    ]
    prompts += [draw_tokens(source, source.randint(*LONG_PROMPT)) for _ in range(long)]
    prompts += [draw_tokens(source, source.randint(*SHORT_PROMPT)) for _ in range(mix.count - sharing - long)]
    source.shuffle(prompts)
    lengths = [source.randint(*OUTPUT) for _ in prompts]
    arrivals = draw_arrivals(source, mix)
    return [ServingRequest(*fields) for fields in zip(prompts, lengths, arrivals, strict=True)]


def draw_arrivals(source: random.Random, mix: Mix) -> list[float]:
    """Return the arrival times: zeros without a rate, else those of a Poisson process that starts with one at 0."""
    if mix.rate is None:
        return [0.0] * mix.count
    gaps = [0.0] + [source.expovariate(mix.rate) for _ in range(mix.count - 1)]
    return [sum(gaps[: index + 1]) for index in range(mix.count)]


def warm_up_requests() -> list[ServingRequest]:
    """Return a few short requests that share nothing with any mix."""
    source = random.Random("serving/warm-up")
    return [ServingRequest(draw_tokens(source, 64), 8) for _ in range(8)]


def prefix_requests(seed: int, system_length: int) -> list[ServingRequest]:
    """Return two requests of one new token that share a system prompt and differ in the 30 tokens behind it."""
    source = random.Random(f"prefix/{seed}")
    system = draw_tokens(source, system_length)
    return [ServingRequest(system + draw_tokens(source, 30), 1) for _ in range(2)]


def steady_requests(batch: int, new_tokens: int, seed: int) -> list[ServingRequest]:
    """Return equal requests of 64 tokens, whose decode steps all have the whole batch."""
    source = random.Random(f"steady/{seed}")
    return [ServingRequest(draw_tokens(source, 64), new_tokens) for _ in range(batch)]
