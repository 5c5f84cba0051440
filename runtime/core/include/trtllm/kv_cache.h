// The cache as users see it: what is kept for reuse and how long, events and statistics.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

inline constexpr std::int32_t default_retention_priority = 35;  // of 0 .. 100

// How long blocks of a token range are kept: those with a lower priority are evicted first.
struct TokenRangeRetention {
    std::int32_t begin = 0;
    std::int32_t end = -1;  // one past the last token; -1 = the rest of the prompt
    std::int32_t priority = default_retention_priority;
    std::optional<std::int64_t> duration_ms;  // afterwards the priority is the default one
};

struct RetentionConfig {
    std::vector<TokenRangeRetention> ranges;
    std::int32_t decode_priority = default_retention_priority;
    std::optional<std::int64_t> decode_duration_ms;
};

struct KvCacheOptions {
    bool enable_block_reuse = true;
    bool enable_partial_reuse = true;   // share the leading part of a block, by copy
    bool copy_on_partial_reuse = true;  // false: take an unused block over instead, and lose its rest
    bool onboard_blocks = true;         // copy a host block back before use
    std::int32_t offload_min_priority = default_retention_priority;  // blocks below it are dropped, not offloaded
    std::int32_t min_partial_tokens = 1;  // a shorter match is not worth a copy
    std::size_t event_buffer_max_size = 0;  // 0 = no events
};

// What two prompts must share beside their tokens to share blocks.
struct CacheKey {
    std::uint64_t adapter_id = 0;
    std::uint64_t salt = 0;
    bool operator==(const CacheKey &) const = default;
};

struct SequenceOptions {
    CacheKey key;
    RetentionConfig retention;
    std::int32_t max_reuse_tokens = std::numeric_limits<std::int32_t>::max();  // 0: compute every token afresh
};

struct StoredBlock {
    std::uint64_t hash = 0;
    std::vector<TokenId> tokens;
    std::int32_t priority = default_retention_priority;
    std::int32_t cache_level = 0;  // 0 primary, 1 host
};

struct KvCacheEvent {
    enum class Kind { created, stored, removed, updated };
    Kind kind = Kind::created;
    std::uint64_t event_id = 0;
    std::int32_t group = 0;
    std::vector<std::int32_t> num_blocks_per_level;   // created
    std::optional<std::uint64_t> parent_hash;         // stored
    std::vector<StoredBlock> blocks;                  // stored
    std::vector<std::uint64_t> hashes;                // removed; updated has one
    std::optional<std::pair<std::int32_t, std::int32_t>> priority_change;  // updated: from, to
    std::optional<std::pair<std::int32_t, std::int32_t>> level_change;     // updated: from, to
};

// Reference names in comments. Counters run from the start.
struct KvCacheStats {
    std::int64_t max_num_blocks = 0;     // maxNumBlocks
    std::int64_t free_num_blocks = 0;    // freeNumBlocks: never used, or kept only for reuse
    std::int64_t used_num_blocks = 0;    // usedNumBlocks
    std::int32_t tokens_per_block = 0;   // tokensPerBlock
    std::int64_t alloc_total_blocks = 0;  // allocTotalBlocks
    std::int64_t alloc_new_blocks = 0;   // allocNewBlocks
    std::int64_t reused_blocks = 0;      // reusedBlocks
    std::int64_t missed_blocks = 0;      // missedBlocks
    std::int64_t reused_tokens = 0;
    std::int64_t prompt_tokens = 0;
    std::int64_t offloaded_blocks = 0;
    std::int64_t onboarded_blocks = 0;
    std::int64_t host_max_blocks = 0;
    std::int64_t host_used_blocks = 0;   // holding something to reuse
    std::int64_t evicted_blocks = 0;
    std::int64_t used_bytes = 0;         // of the primary pool, all groups, by the cache's own type
    double cache_hit_rate = 0.0;         // cacheHitRate: reused / (reused + missed)
};

// What one sequence has cost, for the request's statistics.
struct SequenceCacheStats {
    std::int32_t alloc_total_blocks = 0;
    std::int32_t alloc_new_blocks = 0;
    std::int32_t reused_blocks = 0;
    std::int32_t missed_blocks = 0;
};

}  // namespace trtllm::executor
