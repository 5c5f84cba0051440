"""Make the peers' model files from one published GGUF, all with the same dequantized weights.

The folder `build/bench` gets: `hf-fp32` (transformers), `f16.gguf` and `q4_0.gguf` (llama.cpp) and one folder for
each onnxruntime-genai build. What exists is kept; each file appears under its name only when it is complete.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from model_files import BENCH_FOLDER, commit_folder, find_gguf

# Options of onnxruntime-genai's model builder. The builder's own defaults are symmetric, block size 32, accuracy
# level 4 (int8 activations). A tied head shares its 4-bit matrix with the embedding unless told otherwise.
GENAI_BUILDS = {
    "genai-fp32": ("fp32", ["prune_lm_head=true"]),
    "genai-int4": ("int4", ["prune_lm_head=true"]),
    # Its fastest: a fifth quicker than block 32 at batch 8, but its text is gibberish.
    "genai-int4-block128": ("int4", ["prune_lm_head=true", "block_size=128"]),
    "genai-int4-head8": (
        "int4",
        ["prune_lm_head=true", "shared_embeddings=false", "matmul_mixed_precision=last_matmul:int8"],
    ),
}


def prepare_huggingface(gguf: Path, output: Path) -> None:
    """Dequantize the GGUF into a plain fp32 Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    # save_pretrained refuses a model that was loaded from GGUF, a fresh one with the same weights it takes.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    commit_folder(partial, output)


def add_metadata(writer, reader, file_type: int) -> None:
    """Copy every metadata field, with the file type replaced."""
    import gguf

    written_by_the_writer = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}
    for name, field in reader.fields.items():
        if name in written_by_the_writer or name in ("general.file_type", "general.quantization_version"):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rewrite_gguf(source: Path, output: Path, kind: str) -> None:
    """Dequantize every matrix and write it again as F16 or Q4_0; vectors stay F32.

    In the Q4_0 file the token embedding, which is also the head, stays Q8_0 as it was published.
    """
    import gguf

    matrix_type = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    partial = output.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    add_metadata(writer, reader, gguf.LlamaFileType["MOSTLY_" + kind])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else matrix_type
        if kind == "Q4_0" and tensor.name == "token_embd.weight":
            wanted = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(output)


def prepare_genai(huggingface: Path, output: Path, precision: str, options: list[str]) -> None:
    """Run onnxruntime-genai's model builder for the CPU; its log of every node is shown only when it fails."""
    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(huggingface), "-o", str(partial)]
    command += ["-p", precision, "-e", "cpu", "-c", str(output.parent / "genai-cache"), "--extra_options", *options]
    finished = subprocess.run([*command, "hf_token=false"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        raise RuntimeError(f"the model builder failed for {output.name}:\n{finished.stdout[-2000:]}")
    commit_folder(partial, output)


def prepare_all(gguf: Path, folder: Path) -> None:
    """Make what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    huggingface = folder / "hf-fp32"
    steps = {huggingface: lambda output: prepare_huggingface(gguf, output)}
    for kind in ("F16", "Q4_0"):
        steps[folder / f"{kind.lower()}.gguf"] = lambda output, kind=kind: rewrite_gguf(gguf, output, kind)
    for name, build in GENAI_BUILDS.items():
        steps[folder / name] = lambda output, build=build: prepare_genai(huggingface, output, *build)
    for output, make in steps.items():
        print(f"{output.name}: {'kept' if output.exists() else 'making'}", flush=True)
        if not output.exists():
            make(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", help="the published GGUF (default: found in the model cache)")
    parser.add_argument("--output", type=Path, default=BENCH_FOLDER, help="default: build/bench")
    arguments = parser.parse_args()
    prepare_all(find_gguf(arguments.gguf), arguments.output)


if __name__ == "__main__":
    main()
