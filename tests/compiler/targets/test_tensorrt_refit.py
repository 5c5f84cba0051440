"""A plan is made anew from the network that its engine keeps, without the model's code, and equals a fresh build's."""

from pathlib import Path
from types import ModuleType

import pytest

from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.refit import verification
from trtllm.compiler.refit.plan import NETWORK
from trtllm.compiler.refit.refit import refit_engine

pytest.importorskip("tensorrt_rtx", reason="plans are built by TensorRT-RTX")
pytestmark = pytest.mark.tensorrt


@pytest.mark.parametrize("scheme", [None, "W4A16"])
def test_a_refitted_plan_holds_the_weights_of_a_fresh_build(
    synthetic: ModuleType, tiny_checkpoint: Path, tmp_path: Path, scheme: str | None
) -> None:
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], tmp_path / "tuned", seed=1)

    def build(model: Path, name: str) -> object:
        return compile_engine(
            model, output_dir=tmp_path / name, target="tensorrt", quantization=scheme, max_seq_len=32, max_batch_size=2
        )

    engine, fresh = build(tiny_checkpoint, "engine"), build(tmp_path / "tuned", "fresh")
    refitted = refit_engine(engine, tmp_path / "tuned")
    own = {entry.name: entry.sha256 for entry in refitted.engine.manifest.weights}
    assert own == {entry.name: entry.sha256 for entry in fresh.manifest.weights}
    assert own != {entry.name: entry.sha256 for entry in engine.manifest.weights}
    assert refitted.verification == verification.Verification("recipes")
    assert refitted.engine.manifest.target == fresh.manifest.target
    assert (refitted.engine.path / NETWORK).read_bytes() == (fresh.path / NETWORK).read_bytes()
    again = refit_engine(refitted.engine, tiny_checkpoint, tmp_path / "again")
    assert {entry.name: entry.sha256 for entry in again.engine.manifest.weights} == {
        entry.name: entry.sha256 for entry in engine.manifest.weights
    }
    # A plan is about as long whoever made it: what it holds of the network is the same.
    sizes = [(made.path / "rank0.engine").stat().st_size for made in (refitted.engine, fresh)]
    assert abs(sizes[0] - sizes[1]) <= 0.01 * sizes[1]
