from typing import Any

def quantize_blocks(
    source: Any,
    dtype: str,
    bits: int,
    block_size: int,
    values: Any,
    scales: Any,
    scale_dtype: str,
    threads: int = 0,
    scalar: bool = False,
    search: bool = False,
    importance: Any = None,
    minima: Any = None,
    tiled: bool = False,
) -> tuple[str, int]: ...
def gptq(
    weights: Any,
    factor: Any,
    order: Any,
    importance: Any,
    bits: int,
    block_size: int,
    static_scales: bool,
    values: Any,
    scales: Any,
    minima: Any = None,
    threads: int = 0,
) -> bool: ...
def convert(source: Any, from_dtype: str, destination: Any, to_dtype: str, threads: int = 0) -> None: ...
def transpose(source: Any, destination: Any, first: int = 0) -> None: ...
def tile(source: Any, rows: int, blocks: int, bits: int, tiles: Any, threads: int = 0) -> None: ...
def map_cached(descriptor: int, offset: int, count: int) -> Any: ...
def has_sha256_instructions() -> bool: ...
def update_both(one: Sha256, other: Sha256, payload: Any) -> None: ...
def update_in_turn(whole: Sha256, digests: Any, payloads: Any) -> None: ...

class Sha256:
    def update(self, payload: Any) -> None: ...
    def hexdigest(self) -> str: ...
