"""Bytes as people write them: "3GB" and "512MiB" in, "3.2 GB" out."""

from __future__ import annotations

import re

from trtllm.errors import UsageError

_UNITS = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "3GB", "512MiB", "1.5g" or "1000000". Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS or float(match[1]) == 0:
        raise UsageError(f"'{text}' is no size", "write bytes with a unit: 3GB, 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(nbytes: int) -> str:
    """At most three digits and a decimal unit: "159 MB", "4.66 GB"."""
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:.0f} TB"
