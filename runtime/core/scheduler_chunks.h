// How much of a prompt one step computes. Pure arithmetic on token counts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "trtllm/scheduling.h"

namespace trtllm::executor {

// The smallest piece that a prompt may be cut into.
inline std::int32_t smallest_chunk(const SchedulerConfig &config) {
    return config.chunk_unit <= config.max_num_tokens ? config.chunk_unit : 1;
}

// Without chunking a prompt is never cut. What is computed again after a pause is longer than its prompt: when it
// exceeds a whole step, it can only be cut.
inline bool may_cut(const SchedulerConfig &config, std::int32_t remaining) {
    return config.enable_chunked_context || remaining > config.max_num_tokens;
}

// The most of `remaining` tokens that `budget` tokens allow; 0: wait.
inline std::int32_t largest_chunk(const SchedulerConfig &config, std::int32_t remaining, std::int32_t budget) {
    if (remaining <= budget) return remaining;
    if (!may_cut(config, remaining)) return 0;
    return budget / smallest_chunk(config) * smallest_chunk(config);
}

// The chunk to try when the cache has no room for `size` tokens: about half, and at last 0.
inline std::int32_t smaller_chunk(const SchedulerConfig &config, std::int32_t remaining, std::int32_t size) {
    const std::int32_t unit = smallest_chunk(config);
    if (size <= unit || !may_cut(config, remaining)) return 0;
    return std::max(unit, size / 2 / unit * unit);
}

// What a turn adds to a chunk of `size` tokens under equal progress: a unit, or the prompt's rest.
inline std::int32_t next_turn(const SchedulerConfig &config, std::int32_t size) {
    return size + std::min(config.chunk_unit, config.max_num_tokens);
}

}  // namespace trtllm::executor
