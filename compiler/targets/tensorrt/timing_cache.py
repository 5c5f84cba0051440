"""Where a builder keeps what it has measured: a file in the engine cache for each GPU and version."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm.environment import cache_root

if TYPE_CHECKING:
    from trtllm.compiler.targets.tensorrt.library import Library


def timing_cache_path(library: Library) -> Path | None:
    """The file of this machine's GPU and the library's version; None without a GPU."""
    device = device_name()
    if device is None:
        return None
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{library.flavour.name}-{library.version}-{device}")
    return cache_root() / "timing" / f"{name}.cache"


def device_name() -> str | None:
    """Name and compute capability of the first GPU, as "NVIDIA H200 9.0"; None where the driver shows none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, text = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(text, len(text), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return f"{text.value.decode()} {major.value}.{minor.value}"


_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
