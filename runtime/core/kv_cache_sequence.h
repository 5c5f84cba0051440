// One sequence's books: its tokens, and in each group the blocks that hold them.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "radix_tree.h"
#include "trtllm/kv_cache.h"

namespace trtllm::executor {

struct BlockTable {
    std::vector<BlockId> blocks;   // by position; no_block before first_held
    std::int32_t first_held = 0;   // earlier ones slid out of the window
    NodeIndex parent = no_node;    // of the last full committed block, or the root; pinned. None: shares nothing
    NodeHandle cover;              // a node that begins with the tail's tokens, while the tail has no node of its own
    // After a truncation: the tail's block holds more than the sequence has and others use it, so nothing may be
    // written to it before reserve() has made a copy.
    bool is_tail_shared = false;
    std::int32_t num_charged = 0;  // blocks that are in use on this sequence's account; each is on one
};

struct Sequence {
    SequenceId id = 0;
    SequenceOptions options;
    std::int32_t prompt_length = 0;
    std::vector<TokenId> tokens;  // committed ones
    bool shares = false;          // what it commits goes to the tree
    SequenceCacheStats stats;
    std::vector<BlockTable> tables;  // by group

    std::int32_t num_committed() const { return static_cast<std::int32_t>(tokens.size()); }

    // Tokens begin .. end - 1.
    std::span<const TokenId> range(std::int32_t begin, std::int32_t end) const {
        return std::span(tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    }
};

// How a block is kept: what its first token's range says.
struct BlockRetention {
    std::int32_t priority = default_retention_priority;
    std::int64_t duration_ms = EvictionQueue::never;
    bool is_explicit = false;  // a range named it; otherwise a shared block keeps what it has
};

inline BlockRetention retention_at(const RetentionConfig &config, std::int32_t token, std::int32_t prompt_length) {
    if (token >= prompt_length) {
        return {config.decode_priority, config.decode_duration_ms.value_or(EvictionQueue::never), false};
    }
    for (const TokenRangeRetention &range : config.ranges) {
        if (token < range.begin || (range.end >= 0 && token >= range.end)) continue;
        return {range.priority, range.duration_ms.value_or(EvictionQueue::never), true};
    }
    return {};
}

}  // namespace trtllm::executor
