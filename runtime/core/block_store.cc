// Taking, keeping, evicting and offloading blocks. Every change of a node's block goes through set_block().
#include "block_store.h"

#include <stdexcept>

namespace trtllm::executor {

BlockStore::BlockStore(std::int32_t group, const CacheShape &shape, const KvCacheOptions &options,
                       CacheJournal &journal)
    : group_(group),
      window_(shape.groups[static_cast<std::size_t>(group)].window),
      tokens_per_block_(shape.tokens_per_block),
      options_(options),
      journal_(journal),
      primary_(0, shape.num_blocks),
      host_(shape.num_blocks, shape.num_host_blocks),
      node_of_(static_cast<std::size_t>(shape.num_blocks), no_node) {
    std::vector<std::int32_t> num_blocks_per_level = {shape.num_blocks};
    if (shape.num_host_blocks > 0) num_blocks_per_level.push_back(shape.num_host_blocks);
    journal_.events.created(group, std::move(num_blocks_per_level));
}

BlockId BlockStore::allocate() {
    if (primary_.num_free() == 0) evict();
    const BlockId block = primary_.take();
    primary_.add_reference(block);
    ++journal_.counters.alloc_total_blocks;
    return block;
}

void BlockStore::add_reference(BlockId block) {
    if (primary_.add_reference(block) > 1) return;
    --num_kept_;  // a block without references that can be named is one that was kept
    requeue(node_of(block));
}

void BlockStore::drop_reference(BlockId block) {
    if (primary_.drop_reference(block) > 0) return;
    const NodeIndex node = node_of(block);
    if (node == no_node) return primary_.put_back(block);
    ++num_kept_;
    RadixNode &kept = tree_[node];
    kept.last_use = ++num_uses_;
    if (kept.duration_ms != EvictionQueue::never) kept.expiry_ms = journal_.now_ms + kept.duration_ms;
    requeue(node);
}

void BlockStore::copy(BlockId source, BlockId destination, std::int32_t num_tokens) {
    journal_.copies.push_back({group_, source, destination, num_tokens});
}

bool BlockStore::is_unused(NodeIndex node) const {
    const BlockId block = tree_[node].block;
    return is_primary(block) && references(block) == 0;
}

bool BlockStore::is_usable(NodeIndex node) const {
    const BlockId block = tree_[node].block;
    return is_primary(block) || (options_.onboard_blocks && is_host(block));
}

NodeIndex BlockStore::insert(NodeIndex parent, std::size_t position, std::span<const TokenId> tokens) {
    const NodeIndex node = tree_.insert(parent, position, tokens);
    requeue(parent);
    return node;
}

void BlockStore::bind(NodeIndex node, BlockId block) {
    const BlockId before = tree_[node].block;
    set_block(node, block);
    if (is_host(before)) {
        host_.put_back(before);
        if (tree_[node].is_announced) journal_.events.level_changed(group_, tree_[node].hash, 1, 0);
    } else if (is_primary(before) && references(before) == 0) {
        --num_kept_;
        primary_.put_back(before);
    }
}

void BlockStore::detach(BlockId block) {
    const NodeIndex node = node_of(block);
    retract(node);
    set_block(node, no_block);
    if (is_windowed()) return prune(node);
    tree_[node].pins += 1;  // it outlives its children
    while (!tree_[node].children.empty()) {
        const std::size_t before = tree_[node].children.size();
        drop_subtree(tree_[node].children.back());
        if (tree_[node].children.size() == before) throw std::logic_error("a used block lies below one that is not");
    }
    tree_[node].pins -= 1;
    prune(node);
}

BlockId BlockStore::onboard(NodeIndex node) {
    const BlockId source = tree_[node].block;
    const BlockId block = allocate();
    copy(source, block, static_cast<std::int32_t>(tree_[node].tokens.size()));
    bind(node, block);
    ++journal_.counters.onboarded_blocks;
    return block;
}

void BlockStore::forget(NodeIndex node) {
    const BlockId block = tree_[node].block;
    if (is_primary(block) && references(block) > 0) return;
    is_windowed() ? drop_block(node) : drop_subtree(node);
}

void BlockStore::drop_subtree(NodeIndex top) {
    NodeIndex node = top;
    for (;;) {  // to the deepest last child, then up again
        while (!tree_[node].children.empty()) node = tree_[node].children.back();
        const NodeIndex parent = tree_[node].parent;
        const NodeHandle handle = tree_.handle(node);
        drop_block(node);
        if (tree_.is_alive(handle)) return;  // something is used or pinned below: only its path can stay
        if (node == top) return;
        node = parent;
    }
}

void BlockStore::pin(NodeIndex node) {
    ++tree_[node].pins;
    requeue(node);
}

void BlockStore::unpin(NodeIndex node) {
    --tree_[node].pins;
    prune(node);
}

void BlockStore::clear() {
    for (NodeIndex node = 0; node < tree_.capacity(); ++node) {
        if (!tree_[node].is_alive || tree_[node].block == no_block) continue;
        const BlockId block = tree_[node].block;
        retract(node);
        if (is_host(block)) {
            host_.put_back(block);
        } else {
            node_of_[static_cast<std::size_t>(block)] = no_node;
            if (references(block) == 0) primary_.put_back(block);
        }
    }
    num_kept_ = 0;
    evictable_.clear();
    host_evictable_.clear();
    tree_.clear();
}

void BlockStore::set_retention(NodeIndex index, std::int32_t priority, std::int64_t duration_ms) {
    RadixNode &node = tree_[index];
    if (node.is_announced && node.priority != priority) {
        journal_.events.priority_changed(group_, node.hash, node.priority, priority);
    }
    node.priority = priority;
    node.duration_ms = duration_ms;
    node.expiry_ms = EvictionQueue::never;  // counts from the moment at which nobody uses it any more
}

void BlockStore::announce(NodeIndex index) {
    RadixNode &node = tree_[index];
    if (!journal_.events.is_enabled() || node.is_announced) return;
    const RadixNode &parent = tree_[node.parent];
    const bool is_first = parent.parent == no_node;
    node.hash = hash_of_block(is_first ? hash_of_key(parent.key) : parent.hash, node.tokens);
    node.is_announced = true;
    journal_.events.stored(group_, is_first ? std::nullopt : std::optional(parent.hash),
                           {node.hash, node.tokens, node.priority, level_of(node.block)});
}

void BlockStore::retract(NodeIndex node) {
    if (!tree_[node].is_announced) return;
    tree_[node].is_announced = false;
    journal_.events.removed(group_, tree_[node].hash);
}

void BlockStore::expire(EvictionQueue &queue) {
    for (NodeIndex node; (node = queue.next_expired(journal_.now_ms)) != no_node;) {
        queue.erase(node);
        requeue(node);
    }
}

void BlockStore::evict() {
    expire(evictable_);
    if (evictable_.empty()) throw std::logic_error("a block was allocated from a pool in which all are used");
    const NodeIndex node = evictable_.least();
    const BlockId block = tree_[node].block;
    ++journal_.counters.evicted_blocks;
    const BlockId host_block = take_host_block(node);
    if (host_block == no_block) return forget(node);
    copy(block, host_block, static_cast<std::int32_t>(tree_[node].tokens.size()));
    ++journal_.counters.offloaded_blocks;
    --num_kept_;
    set_block(node, host_block);
    primary_.put_back(block);
    if (tree_[node].is_announced) journal_.events.level_changed(group_, tree_[node].hash, 0, 1);
}

// A host block for what `candidate` holds, if that is worth keeping: a free one, or that of something worth less.
BlockId BlockStore::take_host_block(NodeIndex candidate) {
    const RadixNode &node = tree_[candidate];
    if (node.priority < options_.offload_min_priority) return no_block;
    if (host_.num_free() > 0) return host_.take();
    expire(host_evictable_);
    if (host_evictable_.empty()) return no_block;
    // What has offloaded blocks below it is worth at least as much as they are: without it they are lost.
    const bool carries_others = !is_windowed() && !node.children.empty();
    if (!carries_others && !(host_evictable_.least_value() < EvictionQueue::Value{node.priority, node.last_use})) {
        return no_block;
    }
    drop_block(host_evictable_.least());
    return host_.take();
}

// Points the node at another block, or at none, and keeps books that depend on it. The block before is left as it is.
void BlockStore::set_block(NodeIndex index, BlockId block) {
    RadixNode &node = tree_[index];
    const bool was_primary = is_primary(node.block), becomes_primary = is_primary(block);
    if (was_primary) node_of_[static_cast<std::size_t>(node.block)] = no_node;
    put_in_queue(evictable_, index, false);
    put_in_queue(host_evictable_, index, false);
    node.block = block;
    if (becomes_primary) node_of_[static_cast<std::size_t>(block)] = index;
    requeue(index);
    if (was_primary == becomes_primary) return;
    tree_[node.parent].primary_children += becomes_primary ? 1 : -1;
    requeue(node.parent);
}

// Frees what an unused node holds, and takes the node out where nothing hangs on it.
void BlockStore::drop_block(NodeIndex node) {
    const BlockId block = tree_[node].block;
    if (is_primary(block) && references(block) > 0) return;
    if (block != no_block) {
        retract(node);
        set_block(node, no_block);
        if (is_primary(block)) {
            --num_kept_;
            primary_.put_back(block);
        } else {
            host_.put_back(block);
        }
    }
    prune(node);
}

// Takes out nodes that hold nothing and lead nowhere, from here upwards.
void BlockStore::prune(NodeIndex node) {
    while (node != no_node) {
        const RadixNode &empty = tree_[node];
        if (empty.block != no_block || !empty.children.empty() || empty.pins > 0) return requeue(node);
        const NodeIndex parent = empty.parent;
        tree_.remove(node);
        node = parent;
    }
}

bool BlockStore::belongs_to_primary_queue(NodeIndex node) const {
    return is_unused(node) && (is_windowed() || tree_[node].primary_children == 0);
}

bool BlockStore::belongs_to_host_queue(NodeIndex node) const {
    return is_host(tree_[node].block) && tree_[node].pins == 0 && (is_windowed() || tree_[node].children.empty());
}

void BlockStore::requeue(NodeIndex node) {
    put_in_queue(evictable_, node, belongs_to_primary_queue(node));
    put_in_queue(host_evictable_, node, belongs_to_host_queue(node));
}

void BlockStore::put_in_queue(EvictionQueue &queue, NodeIndex index, bool is_wanted) {
    if (queue.contains(index) == is_wanted) return;
    if (!is_wanted) return queue.erase(index);
    RadixNode &node = tree_[index];
    if (node.expiry_ms <= journal_.now_ms) set_retention(index, default_retention_priority, EvictionQueue::never);
    queue.insert(index, {node.priority, node.last_use}, node.expiry_ms);
}

}  // namespace trtllm::executor
