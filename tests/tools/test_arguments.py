"""One spelling of options, retired flags, nearest names."""

import pytest

from trtllm.errors import UsageError
from trtllm.tools.arguments import OptionTable, prepare
from trtllm.tools.retired_flags import RETIRED

TABLE = OptionTable(
    {"--max-batch-size": True, "--output-dir": True, "--json": False, "-O": True, "-q": True, "--strip-plan": False}
)


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        (["--max_batch_size", "3"], ["--max-batch-size", "3"]),
        (["--max_batch_size=3"], ["--max-batch-size=3"]),
        (["--output_dir=a_b"], ["--output-dir=a_b"]),
        (["--output-dir", "--odd_name"], ["--output-dir", "--odd_name"]),
        (["my_model", "--json"], ["my_model", "--json"]),
        (["--", "--max_batch_size"], ["--", "--max_batch_size"]),
        (["-O2", "-q", "W4_A16", "-"], ["-O2", "-q", "W4_A16", "-"]),
        (["--output-dir"], ["--output-dir"]),
    ],
)
def test_only_options_are_respelled(given, prepared):
    assert prepare(given, TABLE, {}).arguments == prepared


def test_unknown_options_are_named_together():
    with pytest.raises(UsageError, match=r"'--max-batch' \(did you mean '--max-batch-size'\?\), '--jsn'"):
        prepare(["--max_batch", "--jsn"], TABLE, {})


@pytest.mark.parametrize(
    ("given", "rest"),
    [
        (["--gemm_plugin", "auto", "model"], ["model"]),
        (["--gemm_plugin=auto", "model"], ["model"]),
        (["--remove_input_padding", "enable"], []),
        (["--context_fmha", "--json"], ["--json"]),
        (["--fast_build", "model"], ["model"]),
        (["--max_beam_width", "1"], []),
        (["--kv_cache_type", "paged"], []),
        (["--kv-cache-type=CONTINUOUS"], []),
    ],
)
def test_retired_flags_go_with_a_note(given, rest):
    prepared = prepare(given, TABLE, RETIRED)
    assert prepared.arguments == rest
    assert len(prepared.notes) == 1 and "no effect here" in prepared.notes[0]


@pytest.mark.parametrize(
    "given",
    [
        ["--max_beam_width", "2"], ["--kv_cache_type", "disabled"], ["--speculative_decoding_mode", "medusa"],
        ["--lora_dir", "adapter"], ["--max_draft_len=5"], ["--gather_all_token_logits"],
    ],
)  # fmt: skip
def test_retired_flags_that_ask_for_another_engine_are_refused(given):
    with pytest.raises(UsageError, match="is not supported"):
        prepare(given, TABLE, RETIRED)
