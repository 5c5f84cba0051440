"""Describe the machine and the packages of a measurement."""

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = [
    "trtllm-toolchain",
    "onnxruntime",
    "onnxruntime-genai",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "gguf",
    "llama-cpp-python",
]
FLAGS = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"]


def describe_machine() -> dict:
    """Return processor, instruction sets, memory, load, and the version of every package that is installed."""
    processor, flags = read_processor()
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": dict(installed_packages()),
    }


def read_processor() -> tuple[str, set[str]]:
    """Return the model name and the flags of the first processor, empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return "", set()
    fields = dict(line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    family = "family {cpu family} model {model} stepping {stepping}".format_map(fields)
    return f"{fields['model name']} ({family})", set(fields["flags"].split())


def installed_packages():
    """Yield (name, version) of the packages that matter here."""
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
