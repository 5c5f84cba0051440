"""The scripts for GPU machines run, on a GPU and a library that are not there."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, SamplingParams
from trtllm.compiler.engine import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, padded_engines: dict[bool, Engine]) -> Any:
    """run_session.py, with a reference of the tiny model."""
    path = ROOT / "tests" / "gpu" / "run_session.py"
    spec = importlib.util.spec_from_file_location("run_session", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 250, count).tolist() for count in (3, 9, 20)]
    with LLM(padded_engines[False], skip_tokenizer_init=True) as llm:
        made = llm.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    reference = [
        {
            "prompt": str(index),
            "prompt_token_ids": prompt,
            "token_ids": output.outputs[0].token_ids,
            "second_ids": [0] * 64,
            "margins": [1.0] * 64,
        }
        for index, (prompt, output) in enumerate(zip(prompts, made, strict=True))
    ]
    monkeypatch.setattr(module, "REFERENCE", reference)
    monkeypatch.setattr(module, "REQUESTS", 20)
    requests = module.random_requests

    def small_requests(seed: int) -> list[Any]:
        return [([token % 250 for token in prompt][:60], params) for prompt, params in requests(seed)]

    monkeypatch.setattr(module, "random_requests", small_requests)
    return module


def test_the_session_script_finds_a_good_engine_good(
    script: Any, gathered_engines: dict[bool, Engine], fake_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(gathered_engines[False].path)
    monkeypatch.setattr("trtllm.runtime.cuda.driver.open_device", lambda: fake_gpu)
    monkeypatch.setattr(
        sys, "argv", ["", "--fp32", path, "--fp16", path, "--json", str(tmp_path / "found" / "log.json")]
    )
    with pytest.raises(SystemExit) as ended:
        script.main()
    report = json.loads((tmp_path / "found" / "log.json").read_text())
    assert ended.value.code == 0, report
    assert report["checks"]["greedy"] | {"check_seconds": 0} == {
        "holds": True, "prompts": 3, "equal": 3, "parted": [], "check_seconds": 0,
    }  # fmt: skip
    assert report["checks"]["half"]["rows"] == 3 * 64
    assert report["checks"]["mixed"]["equal"] == 20


def test_the_session_script_finds_other_tokens_bad(
    script: Any, gathered_engines: dict[bool, Engine], fake_gpu: Any
) -> None:
    script.REFERENCE[1]["token_ids"][5] += 1
    found = script.check_greedy(gathered_engines[False])
    assert not found["holds"] and found["parted"] == [{"prompt": "1", "at": 5, "margin": 1.0, "near_tie": False}]
