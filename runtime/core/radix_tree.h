// What the blocks of a group hold, as a tree: a node is the tokens of one block, and the path to it is their context.
//
// Children of a node are sorted by their tokens, and none is a prefix of another: where two would be, the longer one
// stands for both. That keeps the order when a node grows at its end, and makes the child that shares most with given
// tokens a neighbour of the place where they would stand. Only nodes of a whole block have children.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <vector>

#include "eviction_queue.h"
#include "trtllm/kv_cache.h"
#include "trtllm/types.h"

namespace trtllm::executor {

using NodeIndex = std::int32_t;
inline constexpr NodeIndex no_node = -1;
inline constexpr BlockId no_block = -1;

struct RadixNode {
    NodeIndex parent = no_node;
    std::vector<NodeIndex> children;
    std::vector<TokenId> tokens;  // of this block alone
    CacheKey key;                 // of roots
    // The rest belongs to the store of blocks.
    BlockId block = no_block;           // of either pool; none: only the place in the tree is known
    std::int32_t primary_children = 0;  // children whose block is in the primary pool
    std::int32_t pins = 0;              // sequences that go on below this node
    std::int32_t priority = default_retention_priority;
    std::int64_t last_use = 0;
    std::int64_t duration_ms = EvictionQueue::never;
    std::int64_t expiry_ms = EvictionQueue::never;
    SequenceId contributor = 0;  // the sequence whose steps filled the block
    std::uint64_t hash = 0;
    bool is_announced = false;   // users were told of it by an event
    bool is_alive = false;
    std::uint32_t generation = 0;  // counts the uses of this index
};

// Names a node so that its end is noticed.
struct NodeHandle {
    NodeIndex index = no_node;
    std::uint32_t generation = 0;
};

// Where tokens stand among the children of a node: between `before` and `after`, either of which may be missing.
struct ChildPlace {
    std::size_t position = 0;
    NodeIndex before = no_node, after = no_node;
    std::size_t before_shared = 0, after_shared = 0;  // leading tokens in common
};

class RadixTree {
public:
    RadixNode &operator[](NodeIndex index) { return nodes_[static_cast<std::size_t>(index)]; }
    const RadixNode &operator[](NodeIndex index) const { return nodes_[static_cast<std::size_t>(index)]; }

    NodeIndex find_root(const CacheKey &key) const;
    NodeIndex make_root(const CacheKey &key);

    ChildPlace place(NodeIndex parent, std::span<const TokenId> tokens) const;
    NodeIndex insert(NodeIndex parent, std::size_t position, std::span<const TokenId> tokens);
    void append(NodeIndex node, std::span<const TokenId> tokens);
    // Takes out a node without children; a root too.
    void remove(NodeIndex node);

    NodeHandle handle(NodeIndex node) const { return {node, (*this)[node].generation}; }
    bool is_alive(NodeHandle handle) const;
    NodeIndex ancestor(NodeIndex node, std::int32_t levels) const;

    // The child that shares most with `tokens`, at least `least` of them, among those that `accepts(child)`. Looks at
    // no more than a few neighbours on each side. Returns the child and how much it shares, or no_node.
    struct Shared {
        NodeIndex node = no_node;
        std::int32_t length = 0;
    };
    template <typename Accepts>
    Shared find_shared(NodeIndex parent, std::span<const TokenId> tokens, std::size_t least, Accepts accepts) const;

    std::int32_t capacity() const { return static_cast<std::int32_t>(nodes_.size()); }
    void clear();

    static std::size_t shared_length(std::span<const TokenId> a, std::span<const TokenId> b);

private:
    struct KeyHash {
        std::size_t operator()(const CacheKey &key) const {
            return static_cast<std::size_t>((key.adapter_id * 0x9E3779B97F4A7C15ull) ^ (key.salt + 0x7F4A7C15ull));
        }
    };
    static constexpr std::size_t most_neighbours = 16;

    NodeIndex make_node();

    std::deque<RadixNode> nodes_;  // references stay valid while nodes are added
    std::vector<NodeIndex> unused_;
    std::unordered_map<CacheKey, NodeIndex, KeyHash> roots_;
};

template <typename Accepts>
RadixTree::Shared RadixTree::find_shared(NodeIndex parent, std::span<const TokenId> tokens, std::size_t least,
                                         Accepts accepts) const {
    const std::vector<NodeIndex> &children = (*this)[parent].children;
    const std::size_t middle = place(parent, tokens).position;
    Shared best;
    const auto consider = [&](NodeIndex child) {
        const std::size_t length = shared_length((*this)[child].tokens, tokens);
        const bool is_better = length >= least && static_cast<std::int32_t>(length) > best.length;
        if (is_better && accepts(child)) best = {child, static_cast<std::int32_t>(length)};
        return is_better;  // further away there is only less
    };
    for (std::size_t i = middle; i < children.size() && i < middle + most_neighbours; ++i) {
        if (!consider(children[i]) || best.node == children[i]) break;
    }
    for (std::size_t i = middle; i > 0 && i + most_neighbours > middle; --i) {
        if (!consider(children[i - 1]) || best.node == children[i - 1]) break;
    }
    return best;
}

}  // namespace trtllm::executor
