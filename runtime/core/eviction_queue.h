// Which of the unused blocks goes first: lowest priority, then least recently used, with priorities that expire.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace trtllm::executor {

// A binary heap of small integers that can be taken out of the middle: everything is O(log n), and nothing is allocated
// once the vectors have grown.
template <typename Key>
class IndexedHeap {
public:
    bool empty() const { return entries_.empty(); }
    std::size_t size() const { return entries_.size(); }
    std::int32_t least() const { return entries_.front().second; }
    const Key &least_key() const { return entries_.front().first; }

    bool contains(std::int32_t item) const {
        return static_cast<std::size_t>(item) < places_.size() && places_[static_cast<std::size_t>(item)] != absent;
    }
    const Key &key(std::int32_t item) const { return entries_[place(item)].first; }

    void insert(std::int32_t item, Key key) {
        const std::size_t most = static_cast<std::size_t>(item);
        if (most >= places_.size()) places_.resize(most + 1, absent);
        entries_.emplace_back(std::move(key), item);
        places_[static_cast<std::size_t>(item)] = entries_.size() - 1;
        rise(entries_.size() - 1);
    }

    void erase(std::int32_t item) {
        const std::size_t hole = place(item);
        const std::size_t last = entries_.size() - 1;
        if (hole != last) exchange(hole, last);
        entries_.pop_back();
        places_[static_cast<std::size_t>(item)] = absent;
        if (hole == last) return;
        rise(hole);
        sink(hole);
    }

    void clear() {
        entries_.clear();
        places_.clear();
    }

private:
    static constexpr std::size_t absent = std::numeric_limits<std::size_t>::max();

    std::size_t place(std::int32_t item) const { return places_[static_cast<std::size_t>(item)]; }

    void exchange(std::size_t a, std::size_t b) {
        std::swap(entries_[a], entries_[b]);
        places_[static_cast<std::size_t>(entries_[a].second)] = a;
        places_[static_cast<std::size_t>(entries_[b].second)] = b;
    }

    void rise(std::size_t at) {
        while (at > 0 && entries_[at].first < entries_[(at - 1) / 2].first) {
            exchange(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }

    void sink(std::size_t at) {
        for (;;) {
            std::size_t least = at;
            for (std::size_t child = 2 * at + 1; child <= 2 * at + 2 && child < entries_.size(); ++child) {
                if (entries_[child].first < entries_[least].first) least = child;
            }
            if (least == at) return;
            exchange(at, least);
            at = least;
        }
    }

    std::vector<std::pair<Key, std::int32_t>> entries_;
    std::vector<std::size_t> places_;
};

class EvictionQueue {
public:
    static constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

    struct Value {
        std::int32_t priority = 0;
        std::int64_t last_use = 0;
        bool operator<(const Value &other) const {
            return std::tie(priority, last_use) < std::tie(other.priority, other.last_use);
        }
    };

    bool empty() const { return order_.empty(); }
    std::size_t size() const { return order_.size(); }
    bool contains(std::int32_t item) const { return order_.contains(item); }
    // The item that goes first.
    std::int32_t least() const { return order_.least(); }
    Value least_value() const { return order_.least_key(); }

    // `expiry_ms`: when next_expired() names the item; `never` if it does not.
    void insert(std::int32_t item, Value value, std::int64_t expiry_ms);
    void erase(std::int32_t item);
    // An item whose time has come, or -1. It stays until it is taken out.
    std::int32_t next_expired(std::int64_t now_ms) const;
    void clear();

private:
    IndexedHeap<Value> order_;
    IndexedHeap<std::int64_t> expiries_;
};

}  // namespace trtllm::executor
