"""The arguments of an LLM are checked by name, and reach the executor's config."""

from types import SimpleNamespace
from typing import Any

import pytest

from trtllm.errors import UsageError
from trtllm.runtime.executor import executor_config
from trtllm.runtime.llm_config import (
    CapacitySchedulerPolicy,
    DraftTargetDecodingConfig,
    KvCacheConfig,
    NGramDecodingConfig,
    SchedulerConfig,
    llm_args,
)
from trtllm.runtime.session import CacheGroup, CacheShape, SessionInfo

INFO = SessionInfo(300, 96, 8, 512, True, CacheShape(32, 24, 0, (CacheGroup(0, 2, 256),)))


def config(**arguments: Any) -> dict[str, Any]:
    return vars(executor_config(SimpleNamespace(), INFO, llm_args(arguments)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_batchsize": 3}, "did you mean 'max_batch_size'"),
        ({"kv_cache_confg": None}, "did you mean 'kv_cache_config'"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"kv_cache_config": {"max_tokens": 3}}, "kv_cache_config"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: engines run in one process"),
        ({"backend": "pytorch"}, "target= chooses it"),
        ({"trust_remote_code": True}, "never run"),
        ({"revision": "main"}, "org/name@revision"),
        ({"guided_decoding_backend": "outlines"}, "known: llguidance"),
        ({"max_input_len": 20, "max_seq_len": 10}, "max_input_len 20 exceeds"),
    ],
)
def test_what_is_wrong_is_said_by_name(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        llm_args(arguments)
    assert says in str(raised.value)


def test_arguments_of_the_reference_that_ask_for_nothing_special_are_taken() -> None:
    args = llm_args({"tensor_parallel_size": 1, "trust_remote_code": False, "load_format": "auto", "max_batch_size": 2})
    assert args == llm_args({"max_batch_size": 2})


def test_limits_are_those_of_the_session_unless_lower_ones_are_given() -> None:
    usual = config()
    assert (usual["max_batch_size"], usual["max_seq_len"], usual["max_num_tokens"]) == (8, 96, 512)
    assert usual["enable_chunked_context"] is True
    lower = config(max_seq_len=50, max_num_tokens=16, enable_chunked_prefill=False)
    assert (lower["max_seq_len"], lower["max_num_tokens"], lower["chunk_unit"]) == (50, 16, 16)
    assert lower["enable_chunked_context"] is False


def test_policies_cache_and_drafts_reach_the_executor() -> None:
    made = config(
        scheduler_config=SchedulerConfig(
            capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION,
            context_chunking_policy="EQUAL_PROGRESS",
            max_queue_size=5,
        ),
        kv_cache_config=KvCacheConfig(
            enable_block_reuse=False, event_buffer_max_size=7, secondary_offload_min_priority=20
        ),
        speculative_config=NGramDecodingConfig(max_draft_len=6, max_matching_ngram_size=2),
        max_beam_width=4,
    )
    expected = {
        "capacity_scheduler_policy": "MAX_UTILIZATION",
        "context_chunking_policy": "EQUAL_PROGRESS",
        "max_queue_size": 5,
        "enable_block_reuse": False,
        "event_buffer_max_size": 7,
        "secondary_offload_min_priority": 20,
        "ngram_max_draft_len": 6,
        "ngram_max_matching_ngram_size": 2,
        "max_beam_width": 4,
    }
    assert {name: made[name] for name in expected} == expected
    assert type(made["capacity_scheduler_policy"]) is str


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SchedulerConfig(capacity_scheduler_policy="FAIR"), "GUARANTEED_NO_EVICT"),
        (lambda: KvCacheConfig(free_gpu_memory_fraction=1.5), "at most 1"),
        (lambda: KvCacheConfig(max_token=3), "did you mean 'max_tokens'"),
        (lambda: DraftTargetDecodingConfig(max_draft_len=3), "speculative_model is missing"),
    ],
)
def test_configs_refuse_what_they_do_not_know(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()
