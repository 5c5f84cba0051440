"""What calibration holds does not grow with the number of layers: measured in processes of their own."""

import json
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, VOCABULARY = 512, 1024, 128
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)

SCRIPT = """
import resource, sys
import numpy as np
from pathlib import Path
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.calibrate import calibrate
from trtllm.compiler.calibration.for_build import _calibrated_bits
from trtllm.compiler.calibration.segment_rounding import CalibrationSettings
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent

checkpoint = open_model(sys.argv[1], notify=lambda text: None)
build = build_config({"max_seq_len": 64, "quantization": "W4A16_GPTQ"})
network = builder_for(checkpoint)(ModelBuilder(checkpoint, build, DType.FLOAT32))
tokens = np.random.default_rng(0).integers(0, 128, (4, 64))
settings = CalibrationSettings(_calibrated_bits(network, build), counted=True)
reader = RecipeReader(checkpoint.tensors, threads=1)
calibration = calibrate(network, reader, tokens, settings, Path(sys.argv[2]), Silent(), threads=1)
assert len(calibration.weights) == 7 * checkpoint.config["num_hidden_layers"]
status = Path("/proc/self/status")
if status.exists():  # getrusage counts what the parent held when it forked
    print(int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_model(folder, layers):
    random = np.random.default_rng(layers)

    def matrix(rows, columns):
        return (random.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for index in range(layers):
        stem = f"model.layers.{index}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{stem}.mlp.{name}_proj.weight"] = matrix(INNER, HIDDEN)
        tensors[f"{stem}.mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_peak_does_not_grow_with_depth(tmp_path) -> None:
    peaks = []
    for layers in (2, 8):
        model = write_model(tmp_path / f"model-{layers}", layers)
        command = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / f"calibration-{layers}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    # 6 layers more are 63 MB of weights; what grows is the graph and the records of weights, some kilobytes a layer
    assert peaks[1] - peaks[0] < 6 * LAYER_BYTES / 4
