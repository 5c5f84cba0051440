// How requests share steps: policies and budgets, with the reference names.
#pragma once

#include <cstdint>

namespace trtllm::executor {

enum class CapacitySchedulerPolicy {
    guaranteed_no_evict,  // a request starts when the cache holds it to its very end
    max_utilization,      // a request starts when its next chunk fits; the least important one is paused when space ends
    static_batch,         // requests start together when all earlier ones have ended
};

enum class ContextChunkingPolicy {
    first_come_first_served,  // the earliest prompt gets all it can take
    equal_progress,           // every prompt gets one unit in turn
};

struct SchedulerConfig {
    CapacitySchedulerPolicy capacity_scheduler_policy = CapacitySchedulerPolicy::guaranteed_no_evict;
    ContextChunkingPolicy context_chunking_policy = ContextChunkingPolicy::first_come_first_served;
    bool enable_chunked_context = true;  // false: a prompt is computed in one step or waits
    std::int32_t max_batch_size = 8;     // sequences in flight, and rows of a step
    std::int32_t max_num_tokens = 8192;  // tokens of a step
    std::int32_t max_seq_len = 0;        // tokens of a sequence
    std::int32_t chunk_unit = 32;        // chunks that do not end a prompt are multiples of it (where the budget allows one)
    std::int32_t max_draft_tokens = 0;   // most that set_drafts may give a sequence
    std::int64_t max_queue_size = -1;    // requests that wait for their first start; -1: no limit
    // A waiting request whose prompt begins like one that is being computed waits until that part can be shared.
    bool wait_for_shared_prefix = true;
};

}  // namespace trtllm::executor
