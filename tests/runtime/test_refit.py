"""Weights change under a running LLM: requests are of the model that was promised; a failure changes nothing."""

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm import LLM, SamplingParams
from trtllm.errors import BadInputError, UsageError

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def tuned_directory(tiny_llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    shutil.copytree(tiny_llama_directory, folder)
    random = np.random.default_rng(11)
    tensors = load_file(folder / "model.safetensors")
    changed = {
        name: (value + random.normal(0, 0.3, value.shape)).astype(value.dtype) for name, value in tensors.items()
    }
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=["paged", "linear"])
def llm(
    request: pytest.FixtureRequest, tiny_llama_directory: Path, tiny_llama_engine: Path, tmp_path: Path
) -> Iterator[LLM]:
    if request.param == "paged":
        engine: Any = tiny_llama_engine
    else:
        from trtllm import compile

        engine = tmp_path / "linear"
        options = {"optimization_level": 1, "max_batch_size": 3, "max_seq_len": 96}
        from trtllm.config import build_config

        compile(tiny_llama_directory, output_dir=engine, config=build_config(options))
    with LLM(engine, threads=1) as loaded:
        yield loaded


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, 30)).tolist() for _ in range(count)]


def tokens(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params).outputs[0].token_ids


def test_weights_change_and_come_back(llm: LLM, tiny_llama_directory: Path, tuned_directory: Path) -> None:
    prompt = prompts(1)[0]
    first_engine = llm.engine.path
    before = tokens(llm, prompt)
    made = llm.refit(tuned_directory)
    assert llm.engine is made
    after = tokens(llm, prompt)
    assert after != before
    with LLM(tuned_directory, enable_build_cache=False, max_batch_size=3, max_seq_len=96, threads=1) as fresh:
        assert tokens(fresh, prompt) == after
    temporary = llm.engine.path
    llm.refit(revert=True, base=tiny_llama_directory)
    assert tokens(llm, prompt) == before
    assert not temporary.exists()
    assert first_engine.exists()
    last = llm.engine.path
    llm.shutdown()
    assert not last.exists()


def test_tensors_in_memory_change_the_weights_that_are_made_of_them(llm: LLM, tuned_directory: Path) -> None:
    import torch

    prompt = prompts(1)[0]
    before = tokens(llm, prompt)
    new = load_file(tuned_directory / "model.safetensors")
    llm.refit({"model.norm.weight": new["model.norm.weight"]})
    partly = tokens(llm, prompt)
    llm.refit({name: torch.tensor(value) for name, value in new.items()})
    fully = tokens(llm, prompt)
    assert len({tuple(before), tuple(partly), tuple(fully)}) == 3
    llm.refit(tuned_directory)
    assert tokens(llm, prompt) == fully


def test_what_does_not_fit_changes_nothing(
    llm: LLM, tiny_llama_directory: Path, tuned_directory: Path, tmp_path: Path
) -> None:
    prompt = prompts(1)[0]
    before = tokens(llm, prompt)
    engine = llm.engine
    cut = tmp_path / "cut"
    shutil.copytree(tuned_directory, cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    other = tmp_path / "other"
    shutil.copytree(tuned_directory, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    for model in (cut, other, {"model.norm.weight": np.ones(3, np.float32)}):
        with pytest.raises(BadInputError):
            llm.refit(model)
    with pytest.raises(UsageError, match="in_flight"):
        llm.refit(tuned_directory, in_flight="sometimes")  # type: ignore[arg-type]
    assert llm.engine is engine
    assert tokens(llm, prompt) == before
    llm.check()


@pytest.mark.parametrize("scheme", ["W4A16_AWQ", "FP8"])
def test_new_weights_are_calibrated_when_asked(
    tiny_llama_directory: Path, tuned_directory: Path, tmp_path: Path, scheme: str
) -> None:
    from trtllm import compile
    from trtllm.config import build_config

    (tmp_path / "text.txt").write_text("One thing follows from another, and so on to the end. " * 9)
    options = {
        "quantization": scheme, "calib_dataset": str(tmp_path / "text.txt"), "calib_size": 2,
        "calib_max_seq_length": 16, "max_batch_size": 2, "max_seq_len": 96,
    }  # fmt: skip
    engines = [
        compile(model, output_dir=tmp_path / name, config=build_config(options))
        for model, name in ((tiny_llama_directory, "base"), (tuned_directory, "fresh"))
    ]
    wanted = prompts(3, seed=5)
    with LLM(engines[1].path, threads=1) as fresh:
        expected = [tokens(fresh, prompt) for prompt in wanted]
    (tmp_path / "text.txt").unlink()  # the engine has kept its tokens
    with LLM(engines[0].path, threads=1) as llm:
        before = [tokens(llm, prompt) for prompt in wanted]
        if scheme == "W4A16_AWQ":
            with pytest.raises(BadInputError, match="chosen by calibration"):
                llm.refit(tuned_directory)
        made = llm.refit(tuned_directory, recalibrate=True)
        assert {entry.name: entry.sha256 for entry in made.manifest.weights} == {
            entry.name: entry.sha256 for entry in engines[1].manifest.weights
        }
        assert [tokens(llm, prompt) for prompt in wanted] == expected != before


def test_a_running_model_keeps_its_tokenizer_and_refuses_weights_of_another(
    llm: LLM, tuned_directory: Path, tmp_path: Path
) -> None:
    prompt = prompts(1)[0]
    before = tokens(llm, prompt)
    other = Path(shutil.copytree(tuned_directory, tmp_path / "other"))
    data = json.loads((other / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadInputError, match="a running model keeps its own: 2 of"):
        llm.refit(other)
    assert tokens(llm, prompt) == before


def test_an_engine_that_does_not_load_is_not_taken(
    llm: LLM, tuned_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(1)[0]
    before, engine = tokens(llm, prompt), llm.engine

    def fails(_: Any) -> Any:
        raise BadInputError("the weights cannot be mapped")

    monkeypatch.setattr(llm._session, "loaded", fails)
    with pytest.raises(BadInputError, match="cannot be mapped"):
        llm.refit(tuned_directory)
    assert llm.engine is engine
    assert tokens(llm, prompt) == before


@pytest.mark.parametrize("in_flight", ["finish", "recompute"])
def test_requests_under_load_are_of_the_models_they_were_promised(
    llm: LLM, tiny_llama_directory: Path, tuned_directory: Path, in_flight: Any
) -> None:
    wanted = prompts(8, seed=3)
    expected = {}
    llm.refit(tuned_directory)
    expected["tuned"] = [tokens(llm, prompt) for prompt in wanted]
    llm.refit(tiny_llama_directory)
    expected["base"] = [tokens(llm, prompt) for prompt in wanted]
    ends, outputs, failures = threading.Event(), [], []

    def ask(own: int) -> None:
        try:
            for turn in itertools.count(own):
                index = turn % len(wanted)
                outputs.append((index, tokens(llm, wanted[index])))
                if ends.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    askers = [threading.Thread(target=ask, args=(own,)) for own in range(4)]
    for asker in askers:
        asker.start()
    for turn in range(6):
        llm.refit(tuned_directory if turn % 2 == 0 else tiny_llama_directory, in_flight=in_flight)
    ends.set()
    for asker in askers:
        asker.join(60)
    assert not failures
    assert len(outputs) > 8
    mixed = [
        (index, output)
        for index, output in outputs
        if output not in (expected["base"][index], expected["tuned"][index])
    ]
    if in_flight == "finish":
        assert not mixed
    possible = [next_tokens(llm, model, wanted, mixed) for model in (tuned_directory, tiny_llama_directory)]
    for (_, output), tuned, base in zip(mixed, *possible, strict=True):
        assert all(token in pair for token, pair in zip(output, zip(tuned, base, strict=True), strict=True))
    assert tokens(llm, wanted[0]) == expected["base"][0]
    llm.check()


def next_tokens(
    llm: LLM, model: Path, wanted: list[list[int]], outputs: list[tuple[int, list[int]]]
) -> list[list[int]]:
    """What the model puts behind every beginning of each output: a token of a recomputed request is one of those."""
    llm.refit(model)
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    return [
        [tokens(llm, [*wanted[index], *output[:place]], one)[0] for place in range(len(output))]
        for index, output in outputs
    ]
