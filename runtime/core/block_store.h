// The blocks of one group, in both pools, and the tree that says what they hold: who may take which, what goes first.
//
// A block of the primary pool is free, used (it has references), or kept: unused, but a node of the tree names it. In a
// group without a window only kept blocks below which nothing is in the pool can be evicted, so that what remains is
// always whole prefixes; a window needs but the last blocks of a path, so there any kept block can go, and its node may
// stay as a place without a block.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "block_pool.h"
#include "eviction_queue.h"
#include "kv_cache_events.h"
#include "radix_tree.h"
#include "trtllm/kv_cache.h"
#include "trtllm/session.h"

namespace trtllm::executor {

struct BlockTable;
struct Sequence;

// What the stores of all groups write to.
struct CacheJournal {
    explicit CacheJournal(std::size_t max_events) : events(max_events) {}

    KvCacheEventBuffer events;
    std::vector<BlockCopy> copies;
    KvCacheStats counters;
    std::int64_t now_ms = 0;
};

class BlockStore {
public:
    BlockStore(std::int32_t group, const CacheShape &shape, const KvCacheOptions &options, CacheJournal &journal);

    std::int32_t group() const { return group_; }
    std::int32_t window() const { return window_; }
    bool is_windowed() const { return window_ > 0; }
    std::int32_t tokens_per_block() const { return tokens_per_block_; }
    // Position of the first block that the token after `num_tokens` others still needs.
    std::int32_t first_needed(std::int32_t num_tokens) const {
        return window_ > 0 && num_tokens >= window_ ? (num_tokens - window_ + 1) / tokens_per_block_ : 0;
    }

    // Blocks.
    std::int32_t num_available() const { return primary_.num_free() + num_kept_; }
    std::int32_t num_used() const { return primary_.size() - num_available(); }
    std::int32_t num_host_used() const { return host_.size() - host_.num_free(); }
    bool is_primary(BlockId block) const { return primary_.contains(block); }
    bool is_host(BlockId block) const { return host_.contains(block); }
    std::int32_t references(BlockId block) const { return primary_.references(block); }
    // A block with one reference; num_available() must not be 0. May evict, and may promise a copy to the host.
    BlockId allocate();
    void add_reference(BlockId block);
    void drop_reference(BlockId block);
    void copy(BlockId source, BlockId destination, std::int32_t num_tokens);

    // Blocks and nodes.
    RadixTree &tree() { return tree_; }
    const RadixTree &tree() const { return tree_; }
    NodeIndex node_of(BlockId block) const { return node_of_[static_cast<std::size_t>(block)]; }
    bool is_unused(NodeIndex node) const;
    // A node that can be used: in the primary pool, or in the host's and it may come back.
    bool is_usable(NodeIndex node) const;
    NodeIndex insert(NodeIndex parent, std::size_t position, std::span<const TokenId> tokens);
    // The node's content is from now on in `block`, which is in use; the one that held it loses its node.
    void bind(NodeIndex node, BlockId block);
    // A block in use leaves the tree, and with it what only made sense below it.
    void detach(BlockId block);
    // Brings a host node's content back, for one user.
    BlockId onboard(NodeIndex node);
    // Frees what a node holds, and what only made sense below it, unless somebody uses it.
    void forget(NodeIndex node);
    // Keeps a node's place in the tree (not its block).
    void pin(NodeIndex node);
    void unpin(NodeIndex node);
    // Forgets all nodes. Blocks in use stay with their users, who must forget their pins.
    void clear();

    void set_retention(NodeIndex node, std::int32_t priority, std::int64_t duration_ms);
    // The node's content is final, or no longer is: users are told.
    void announce(NodeIndex node);
    void retract(NodeIndex node);

    void check(std::span<const Sequence *const> sequences) const;

private:
    void evict();
    void expire(EvictionQueue &queue);
    BlockId take_host_block(NodeIndex candidate);
    void set_block(NodeIndex node, BlockId block);
    void drop_subtree(NodeIndex node);
    void drop_block(NodeIndex node);
    void prune(NodeIndex node);
    void requeue(NodeIndex node);
    void put_in_queue(EvictionQueue &queue, NodeIndex node, bool is_wanted);
    bool belongs_to_primary_queue(NodeIndex node) const;
    bool belongs_to_host_queue(NodeIndex node) const;
    std::int32_t level_of(BlockId block) const { return is_host(block) ? 1 : 0; }
    void check_blocks(std::span<const Sequence *const> sequences) const;
    void check_nodes(std::span<const Sequence *const> sequences) const;
    void check_node(NodeIndex index) const;
    [[noreturn]] void fail(const std::string &what) const;

    std::int32_t group_;
    std::int32_t window_;
    std::int32_t tokens_per_block_;
    const KvCacheOptions &options_;
    CacheJournal &journal_;
    BlockPool primary_;
    BlockPool host_;
    RadixTree tree_;
    std::vector<NodeIndex> node_of_;  // of primary blocks
    std::int32_t num_kept_ = 0;       // primary blocks with a node and without a reference
    std::int64_t num_uses_ = 0;
    EvictionQueue evictable_;       // nodes in the primary pool
    EvictionQueue host_evictable_;  // nodes in the host pool
};

}  // namespace trtllm::executor
