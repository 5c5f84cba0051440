"""The C++ kernels against double precision, for every instruction set of this machine, under the sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "runtime" / "native"

pytestmark = pytest.mark.slow

SOURCES = {
    "attention": ("attention", "attention_plan"),
    "attention_cache": ("attention", "attention_plan"),
    "quantized_embedding": (),
    "quantized_linear": ("quantized_linear",),
    "scaled_linear": ("scaled_linear", "activation_rounding", "quantized_linear"),
}


@pytest.mark.parametrize("kernel", SOURCES)
def test_the_kernel_passes_its_own_test_under_the_sanitizers(tmp_path: Path, kernel: str) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / kernel
    sources = [KERNELS / f"{name}.cc" for name in (*SOURCES[kernel], f"{kernel}_test")]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    flags = ["-std=c++20", "-O1", "-g", *sanitizers, f"-I{ROOT}", "-pthread"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
