"""Writes fixtures/models/NAME: tiny Llamas quantized by the libraries, and what the libraries' loaders make of them.

Not run by the tests, which have the files. Each family has its own environment, with the versions that were used:

    bitsandbytes   torch 2.13, transformers 5.17, bitsandbytes 0.50
    compressed     torch 2.13, transformers 5.17, llmcompressor 0.14, compressed-tensors 0.19
    gptqmodel      torch 2.15, transformers 5.23, gptqmodel 7.7, GPTQMODEL_DISABLE_PACK_EXT=1 GPTQMODEL_CPU_WORKERS=2

    python tests/frontends/quantized/make_models.py bitsandbytes

expected.safetensors has token ids, the logits in float32 of the weights as the library dequantizes them, and the sha256
of each such weight. bitsandbytes and compressed-tensors are loaded by transformers; layers of GPTQ and
AWQ are dequantized by gptqmodel and autoawq 0.2.9, to whose kind transformers hands them.
"""

import hashlib
import importlib.util
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "fixtures" / "models"
VOCABULARY = 64
TOKENS = torch.tensor([[1, 17, 23, 45, 60, 3, 20, 63, 12, 5]])
KEPT = ("config.json", "model.safetensors")


def published(folder):
    """A random model and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.12)
    model.to(torch.float16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def samples():
    random.seed(0)
    return [[random.randrange(4, VOCABULARY) for _ in range(64)] for _ in range(16)]


def keep(name, made, model, weights):
    """Copies what the library wrote, with the logits of `model` and the hashes of its dequantized weights."""
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in KEPT:
        shutil.copy(made / file, target / file)
    with torch.no_grad():
        logits = model(TOKENS).logits.float()
    hashes = {key: hashlib.sha256(value.float().contiguous().numpy().tobytes()) for key, value in weights.items()}
    metadata = {key: digest.hexdigest() for key, digest in hashes.items()}
    save_file({"tokens": TOKENS[0], "logits": logits[0].contiguous()}, target / "expected.safetensors", metadata)
    print("made", name, {key: tuple(value.shape) for key, value in list(load_file(target / KEPT[1]).items())[:4]})


def projections(model):
    return {key: value for key, value in model.state_dict().items() if key.endswith("_proj.weight")}


def bitsandbytes(source, work):
    from transformers import BitsAndBytesConfig

    half = torch.float32
    configs = {
        "bitsandbytes_nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
        ),
        "bitsandbytes_int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    for name, config in configs.items():
        LlamaForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.float32, device_map="cpu"
        ).save_pretrained(work / name)
        model = LlamaForCausalLM.from_pretrained(work / name, dtype=torch.float32, device_map="cpu").dequantize()
        model = model.float()
        keep(name, work / name, model, projections(model))


def compressed(source, work):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoTokenizer

    text = samples()
    for name, options in {
        "compressed_gptq": {"symmetric": True, "actorder": "weight"},
        "compressed_gptq_asymmetric": {"symmetric": False},
    }.items():
        arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, **options)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": text, "attention_mask": [[1] * 64] * len(text)}),
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            tokenizer=AutoTokenizer.from_pretrained(source),
            max_seq_length=64,
            num_calibration_samples=len(text),
        )
        model.save_pretrained(work / name, save_compressed=True)
        model = LlamaForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        model(TOKENS)  # decompresses
        keep(name, work / name, model, projections(model))


def gptqmodel(source, work):
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FORMAT, METHOD

    text = [" ".join(f"w{token}" for token in sample) for sample in samples()]
    for name, options in {
        "gptq": {"bits": 4, "sym": True, "desc_act": False},
        "gptq_order_asymmetric": {"bits": 4, "sym": False, "desc_act": True},
        "gptq_v2_asymmetric": {"bits": 4, "sym": False, "desc_act": False, "format": FORMAT.GPTQ_V2},
        "gptq_v2_order_8_bits": {"bits": 8, "sym": False, "desc_act": True, "format": FORMAT.GPTQ_V2},
        "awq": {"bits": 4, "sym": False, "method": METHOD.AWQ, "format": FORMAT.GEMM},
    }.items():
        quantization = QuantizeConfig(group_size=32, offload_to_disk=False, **options)
        maker = GPTQModel.load(str(source), quantization, device="cpu")
        maker.quantize(text, batch_size=1)
        maker.save(str(work / name))
        state = load_file(work / name / "model.safetensors")
        weights = {key.replace(".qweight", ".weight"): dequantized(state, key, options) for key in qweights(state)}
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.load_state_dict(
            {key: value.float() for key, value in state.items() if key in model.state_dict()} | weights
        )
        keep(name, work / name, model, weights)


def qweights(state):
    return [key for key in state if key.endswith(".qweight")]


def dequantized(state, key, options):
    """The weight of a layer by the library's own code, in float32."""
    parts = {ending: state[key.replace("qweight", ending)] for ending in ("qweight", "qzeros", "scales")}
    scales = parts["scales"].float()
    if "method" in options:
        return packing_of_autoawq().dequantize_gemm(parts["qweight"], parts["qzeros"], scales, 4, 32).T.contiguous()
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits = options["bits"]
    layer = TorchLinear(
        bits=bits, group_size=32, sym=options["sym"], desc_act=options["desc_act"],
        in_features=parts["qweight"].shape[0] * 32 // bits, out_features=scales.shape[1], bias=False,
    )  # fmt: skip
    layer.qweight.data, layer.qzeros.data = parts["qweight"], parts["qzeros"].clone()
    layer.g_idx.data, layer.scales = state[key.replace("qweight", "g_idx")], scales
    if "format" not in options:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    return super(TorchLinear, layer.eval()).dequantize_weight().T.contiguous()


def packing_of_autoawq():
    """Its module alone: the package imports models that later transformers do not have."""
    package = importlib.util.find_spec("awq").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("packing_utils", Path(package) / "utils" / "packing_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "published"
        published(source)
        {"bitsandbytes": bitsandbytes, "compressed": compressed, "gptqmodel": gptqmodel}[sys.argv[1]](
            source, Path(folder)
        )


if __name__ == "__main__":
    main()
