// Two heaps over the same items: one by value, one by the time at which the value is no longer true.
#include "eviction_queue.h"

namespace trtllm::executor {

void EvictionQueue::insert(std::int32_t item, Value value, std::int64_t expiry_ms) {
    order_.insert(item, value);
    if (expiry_ms != never) expiries_.insert(item, expiry_ms);
}

void EvictionQueue::erase(std::int32_t item) {
    order_.erase(item);
    if (expiries_.contains(item)) expiries_.erase(item);
}

std::int32_t EvictionQueue::next_expired(std::int64_t now_ms) const {
    return !expiries_.empty() && expiries_.least_key() <= now_ms ? expiries_.least() : -1;
}

void EvictionQueue::clear() {
    order_.clear();
    expiries_.clear();
}

}  // namespace trtllm::executor
