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
) -> tuple[str, int]: ...
def convert(source: Any, from_dtype: str, destination: Any, to_dtype: str, threads: int = 0) -> None: ...
def tile(source: Any, rows: int, blocks: int, bits: int, tiles: Any, threads: int = 0) -> None: ...
