// The bounded buffer of events that tells users what the cache keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "trtllm/kv_cache.h"

namespace trtllm::executor {

// The hash of a block: of its tokens and of everything before it. A root's is that of its key.
std::uint64_t hash_of_key(const CacheKey &key);
std::uint64_t hash_of_block(std::uint64_t parent_hash, std::span<const TokenId> tokens);

class KvCacheEventBuffer {
public:
    // Keeps the newest `max_size` events; with 0 every call is ignored.
    explicit KvCacheEventBuffer(std::size_t max_size) : max_size_(max_size) {}

    bool is_enabled() const { return max_size_ > 0; }
    void created(std::int32_t group, std::vector<std::int32_t> num_blocks_per_level);
    // A block that follows the last one of the newest event joins that event.
    void stored(std::int32_t group, std::optional<std::uint64_t> parent_hash, StoredBlock block);
    void removed(std::int32_t group, std::uint64_t hash);
    void priority_changed(std::int32_t group, std::uint64_t hash, std::int32_t from, std::int32_t to);
    void level_changed(std::int32_t group, std::uint64_t hash, std::int32_t from, std::int32_t to);

    // Oldest first; those that did not fit are missing, which their numbers show.
    std::vector<KvCacheEvent> take();

private:
    KvCacheEvent &add(KvCacheEvent::Kind kind, std::int32_t group);
    KvCacheEvent &add_update(std::int32_t group, std::uint64_t hash);

    std::size_t max_size_;
    std::uint64_t next_id_ = 0;
    std::deque<KvCacheEvent> events_;
};

}  // namespace trtllm::executor
