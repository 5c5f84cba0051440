"""MODEL -> convert -> build equals MODEL -> build, for every family, in any split among ranks."""

from pathlib import Path

import numpy as np
import pytest

from trtllm.compiler.conversion import convert_checkpoint
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.frontends.detect import open_model

QUANTIZED = Path(__file__).parents[2] / "frontends" / "quantized" / "fixtures" / "models"


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return folder


def weights_of(model: Path, folder: Path, **options: object) -> dict[str, str]:
    """sha256 of every weight of the engine that a build makes."""
    engine = build_engine(model, folder, build_config({"max_seq_len": 32, **options}))
    return {entry.name: entry.sha256 for entry in engine.manifest.weights}


def same_tensors(left: Path, right: Path) -> None:
    """Both hold the same tensors, bit for bit, read in odd chunks of rows."""
    one, other = open_model(left), open_model(right)
    assert other.config == one.config
    assert other.tensors.keys() == one.tensors.keys()
    for name, tensor in one.tensors.items():
        assert other.tensors[name].spec == tensor.spec, name
        rows = tensor.spec.shape[0]
        parts = [other.tensors[name].read(start, min(start + 7, rows)) for start in range(0, rows, 7)]
        assert np.concatenate(parts).tobytes() == tensor.read().tobytes(), name


def test_a_converted_model_builds_the_same_weights(directory, tmp_path):
    convert_checkpoint(open_model(directory), tmp_path / "converted")
    assert weights_of(tmp_path / "converted", tmp_path / "b") == weights_of(directory, tmp_path / "a")


@pytest.mark.parametrize("quantization", ["W8A16", "W4A16", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_a_sharded_checkpoint_builds_the_same_quantized_weights(directory, tmp_path, quantization):
    convert_checkpoint(open_model(directory), tmp_path / "converted", tp_size=2, pp_size=2)
    converted = weights_of(tmp_path / "converted", tmp_path / "b", quantization=quantization)
    assert converted == weights_of(directory, tmp_path / "a", quantization=quantization)


@pytest.mark.parametrize("quantization", ["W4A16_GPTQ", "W4A16_AWQ"])
def test_a_converted_model_is_calibrated_to_the_same_weights(tiny_checkpoint, tmp_path, quantization):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} and {number + 1} make {2 * number + 1}." for number in range(200)))
    convert_checkpoint(open_model(tiny_checkpoint), tmp_path / "converted", tp_size=2)
    calibration = {"calib_dataset": str(text), "calib_size": 8, "calib_max_seq_length": 32}
    converted = weights_of(tmp_path / "converted", tmp_path / "b", quantization=quantization, **calibration)
    assert converted == weights_of(tiny_checkpoint, tmp_path / "a", quantization=quantization, **calibration)


@pytest.mark.parametrize("name", ["awq", "gptq_v2_asymmetric", "bitsandbytes_int8"])
def test_a_quantized_model_is_converted_to_what_it_stands_for(tmp_path, name):
    """The format holds element types, no other project's integers: a build that dequantizes is its equal."""
    model = QUANTIZED / name
    convert_checkpoint(open_model(model), tmp_path / "converted")
    dense = weights_of(tmp_path / "converted", tmp_path / "dense")
    assert dense == weights_of(model, tmp_path / "dequantized", dequantize=True)
    coarse = weights_of(tmp_path / "converted", tmp_path / "coarse", quantization="W4A16")
    assert coarse == weights_of(model, tmp_path / "again", quantization="W4A16")


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("parallel_embedding", [False, True])
def test_shards_join_to_the_original(directory, tmp_path, tp_size, pp_size, parallel_embedding):
    """Four ranks are more than the two key-value heads of most variants."""
    converted = tmp_path / "converted"
    checkpoint = open_model(directory)
    convert_checkpoint(checkpoint, converted, tp_size=tp_size, pp_size=pp_size, parallel_embedding=parallel_embedding)
    assert len(list(converted.glob("rank*.safetensors"))) == tp_size * pp_size
    same_tensors(directory, converted)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "DistilBert"])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
def test_encoders_are_converted_too(family, tmp_path, tp_size, pp_size):
    transformers = pytest.importorskip("transformers", reason="makes the models")
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 40}  # fmt: skip
    if family == "DistilBert":
        sizes = {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
                 "max_position_embeddings": 40}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "model")
    convert_checkpoint(open_model(tmp_path / "model"), tmp_path / "converted", tp_size=tp_size, pp_size=pp_size)
    same_tensors(tmp_path / "model", tmp_path / "converted")
    assert weights_of(tmp_path / "converted", tmp_path / "b") == weights_of(tmp_path / "model", tmp_path / "a")
