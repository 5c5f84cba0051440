"""Versions of TensorRT: how users name them, and which capability table each has. It knows no library."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm.errors import UsageError

RTX_NAME, FULL_NAME = "tensorrt-rtx", "tensorrt"


@dataclass(frozen=True)
class TensorRtVersion:
    """A flavour and its release numbers."""

    flavour: str
    numbers: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.flavour} {'.'.join(map(str, self.numbers))}"

    def at_least(self, *numbers: int) -> bool:
        return self.numbers >= numbers


def parse_version(text: str) -> TensorRtVersion:
    """ "8.6", "10.13.3" or "rtx-1.7" as a value; 1.x is TensorRT-RTX. Raises UsageError."""
    name = text.strip().lower()
    for prefix in ("tensorrt-rtx-", "tensorrt_rtx-", "rtx-", "rtx", "tensorrt-"):
        if name.startswith(prefix):
            name = name[len(prefix) :].strip()
            break
    numbers = _numbers(name)
    if not numbers:
        raise UsageError(f"'{text}' is no TensorRT version", "write it like 8.6, 10.13 or rtx-1.7")
    is_rtx = numbers[0] < 2
    if "rtx" in text.lower() and not is_rtx:
        raise UsageError(f"'{text}' is no version of TensorRT-RTX", "TensorRT-RTX is at 1.x: write rtx-1.7")
    return TensorRtVersion(RTX_NAME if is_rtx else FULL_NAME, numbers)


def version_of(flavour: str, text: str) -> TensorRtVersion:
    """What a library says of itself."""
    return TensorRtVersion(flavour, _numbers(text))


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        digits = part.split("+")[0]
        if not digits.isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
