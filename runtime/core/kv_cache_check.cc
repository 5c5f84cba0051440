// The proof that the books balance: tables, references, nodes, queues and pools are added up anew and compared.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kv_cache_books.h"

namespace trtllm::executor {
namespace {

// Evaluates to nothing where `condition` holds; `what` is only put together where it does not.
#define HOLDS(condition, what) \
    do {                       \
        if (!(condition)) fail(what); \
    } while (false)

[[noreturn]] void fail_sequence(const Sequence &sequence, const std::string &what) {
    throw std::logic_error("cache books, sequence " + std::to_string(sequence.id) + ": " + what);
}

std::string named(const char *what, std::int64_t number) { return std::string(what) + " " + std::to_string(number); }

}  // namespace

void BlockStore::fail(const std::string &what) const {
    throw std::logic_error("cache books, group " + std::to_string(group_) + ": " + what);
}

void BlockStore::check(std::span<const Sequence *const> sequences) const {
    check_blocks(sequences);
    check_nodes(sequences);
}

void BlockStore::check_blocks(std::span<const Sequence *const> sequences) const {
    std::vector<std::int32_t> users(static_cast<std::size_t>(primary_.size()), 0);
    for (const Sequence *sequence : sequences) {
        for (const BlockId block : sequence->tables[static_cast<std::size_t>(group_)].blocks) {
            if (block == no_block) continue;
            HOLDS(is_primary(block), named("a table names a block outside the pool:", block));
            ++users[static_cast<std::size_t>(block)];
        }
    }
    std::vector<std::int32_t> times_free(static_cast<std::size_t>(primary_.size() + host_.size()), 0);
    for (const BlockId block : primary_.free_blocks()) ++times_free[static_cast<std::size_t>(block)];
    for (const BlockId block : host_.free_blocks()) ++times_free[static_cast<std::size_t>(block)];
    std::int32_t kept = 0;
    for (BlockId block = 0; block < primary_.size(); ++block) {
        HOLDS(references(block) == users[static_cast<std::size_t>(block)],
              named("references and tables disagree on block", block));
        const bool is_named = node_of(block) != no_node, is_used = references(block) > 0;
        HOLDS(!is_named || tree_[node_of(block)].block == block, named("no node agrees that it has block", block));
        HOLDS(times_free[static_cast<std::size_t>(block)] == (is_named || is_used ? 0 : 1),
              named("not exactly one of free, used and kept: block", block));
        kept += is_named && !is_used ? 1 : 0;
    }
    HOLDS(kept == num_kept_, "the number of kept blocks is wrong");
    std::vector<std::int32_t> times_named(static_cast<std::size_t>(host_.size()), 0);
    for (NodeIndex node = 0; node < tree_.capacity(); ++node) {
        if (tree_[node].is_alive && is_host(tree_[node].block)) {
            ++times_named[static_cast<std::size_t>(tree_[node].block - primary_.size())];
        }
    }
    for (BlockId i = 0; i < host_.size(); ++i) {
        HOLDS(times_named[static_cast<std::size_t>(i)] + times_free[static_cast<std::size_t>(primary_.size() + i)] == 1,
              named("not exactly one of free and kept: host block", primary_.size() + i));
    }
}

void BlockStore::check_nodes(std::span<const Sequence *const> sequences) const {
    std::vector<std::int32_t> pins(static_cast<std::size_t>(tree_.capacity()), 0);
    for (const Sequence *sequence : sequences) {
        const NodeIndex parent = sequence->tables[static_cast<std::size_t>(group_)].parent;
        if (parent != no_node) ++pins[static_cast<std::size_t>(parent)];
    }
    std::size_t queued = 0, host_queued = 0;
    for (NodeIndex node = 0; node < tree_.capacity(); ++node) {
        if (!tree_[node].is_alive) continue;
        HOLDS(tree_[node].pins == pins[static_cast<std::size_t>(node)], named("pins are wrong of node", node));
        HOLDS(evictable_.contains(node) == belongs_to_primary_queue(node),
              named("wrongly (not) evictable: node", node));
        HOLDS(host_evictable_.contains(node) == belongs_to_host_queue(node),
              named("wrongly (not) evictable on the host: node", node));
        queued += evictable_.contains(node) ? 1 : 0;
        host_queued += host_evictable_.contains(node) ? 1 : 0;
        check_node(node);
    }
    HOLDS(queued == evictable_.size() && host_queued == host_evictable_.size(), "a queue has nodes that are gone");
}

void BlockStore::check_node(NodeIndex index) const {
    const RadixNode &node = tree_[index];
    const bool is_root = node.parent == no_node;
    HOLDS(is_root || tree_[node.parent].is_alive, named("the parent is gone of node", index));
    HOLDS(!is_root || node.block == no_block, named("a block belongs to root", index));
    HOLDS(is_root || (!node.tokens.empty() && node.tokens.size() <= static_cast<std::size_t>(tokens_per_block_)),
          named("a wrong number of tokens has node", index));
    HOLDS(node.block != no_block || !node.children.empty() || node.pins > 0,
          named("holds and leads to nothing: node", index));
    HOLDS(is_root || is_windowed() || node.block != no_block,
          named("a hole in a path that must have none: node", index));
    const bool is_full = node.tokens.size() == static_cast<std::size_t>(tokens_per_block_);
    HOLDS(is_root || is_full || node.children.empty(), named("children below a block that is not full: node", index));
    std::int32_t primary_children = 0;
    for (std::size_t i = 0; i < node.children.size(); ++i) {
        const RadixNode &child = tree_[node.children[i]];
        HOLDS(child.is_alive && child.parent == index, named("a child disagrees with node", index));
        primary_children += is_primary(child.block) ? 1 : 0;
        const bool child_is_used = is_primary(child.block) && references(child.block) > 0;
        HOLDS(is_root || is_windowed() || !child_is_used || (is_primary(node.block) && references(node.block) > 0),
              named("used blocks lie below one that is not: node", index));
        HOLDS(is_root || is_windowed() || !is_primary(child.block) || is_primary(node.block),
              named("primary blocks lie below an offloaded one: node", index));
        if (i == 0) continue;
        const std::vector<TokenId> &before = tree_[node.children[i - 1]].tokens;
        const std::size_t shared = RadixTree::shared_length(before, child.tokens);
        HOLDS(shared < before.size() && shared < child.tokens.size() && before[shared] < child.tokens[shared],
              named("children are unsorted, or one begins another, of node", index));
    }
    HOLDS(primary_children == node.primary_children, named("primary children are miscounted of node", index));
}

void KvCacheManager::Books::check() const {
    std::vector<const Sequence *> sequences;
    for (const auto &[id, sequence] : sequences_) sequences.push_back(&sequence);
    for (const BlockStore &store : stores_) store.check(sequences);
    for (const Sequence *sequence : sequences) check_sequence(*sequence);
    for (std::size_t group = 0; group < stores_.size(); ++group) check_accounts(group);
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        if (num_spoken_for(group) > num_spoken_for(widest_)) {
            throw std::logic_error("cache books: a group needs more blocks than the one that sees furthest");
        }
    }
}

// Blocks in use, and those that shared tails will be copied into.
std::int32_t KvCacheManager::Books::num_spoken_for(std::size_t group) const {
    std::int32_t count = stores_[group].num_used();
    for (const auto &[id, sequence] : sequences_) {
        const BlockTable &table = sequence.tables[group];
        if (!table.is_tail_shared) continue;
        const std::int32_t tail = sequence.num_committed() / shape.tokens_per_block;
        count += stores_[group].references(table.blocks[static_cast<std::size_t>(tail)]) > 1 ? 1 : 0;
    }
    return count;
}

void KvCacheManager::Books::check_sequence(const Sequence &sequence) const {
    for (const BlockStore &store : stores_) {
        const BlockTable &table = sequence.tables[static_cast<std::size_t>(store.group())];
        check_table(sequence, store, table);
        if (sequence.shares) check_path(sequence, store, table);
    }
}

void KvCacheManager::Books::check_table(const Sequence &sequence, const BlockStore &store,
                                        const BlockTable &table) const {
    const auto fail = [&](const std::string &what) { fail_sequence(sequence, what); };
    const std::int32_t committed = sequence.num_committed(), size = shape.tokens_per_block;
    const std::int32_t num_blocks = static_cast<std::int32_t>(table.blocks.size());
    HOLDS(num_blocks * static_cast<std::int64_t>(size) >= committed, "committed tokens have no block");
    HOLDS(table.first_held == std::min(store.first_needed(committed), num_blocks), "the window's start is wrong");
    for (std::int32_t i = 0; i < num_blocks; ++i) {
        const BlockId block = table.blocks[static_cast<std::size_t>(i)];
        HOLDS((block == no_block) == (i < table.first_held), named("wrongly (not) let go: position", i));
        const bool is_written = i * size < committed;
        const bool may_be_shared = (i + 1) * size <= committed || (is_written && table.is_tail_shared);
        HOLDS(block == no_block || may_be_shared || store.references(block) == 1,
              named("a block that will be written is shared: position", i));
        HOLDS(block == no_block || is_written || store.node_of(block) == no_node,
              named("a block without content is in the tree: position", i));
    }
}

void KvCacheManager::Books::check_path(const Sequence &sequence, const BlockStore &store,
                                       const BlockTable &table) const {
    const auto fail = [&](const std::string &what) { fail_sequence(sequence, what); };
    const std::int32_t committed = sequence.num_committed(), size = shape.tokens_per_block;
    const RadixTree &tree = store.tree();
    NodeIndex node = table.parent;
    for (std::int32_t i = committed / size; i-- > 0; node = tree[node].parent) {
        const BlockId block = table.blocks[static_cast<std::size_t>(i)];
        HOLDS(std::ranges::equal(tree[node].tokens, sequence.range(i * size, (i + 1) * size)),
              named("the tree's path has other tokens at position", i));
        HOLDS(block == no_block || tree[node].block == block,
              named("the tree's path has another block at position", i));
    }
    HOLDS(tree[node].parent == no_node && tree[node].key == sequence.options.key,
          "the path does not begin at its root");
    if (committed % size == 0) return;
    const std::span<const TokenId> tail = sequence.range(committed / size * size, committed);
    const NodeIndex own = store.node_of(table.blocks[static_cast<std::size_t>(committed / size)]);
    const auto starts_with_tail = [&](NodeIndex of) {
        return RadixTree::shared_length(tree[of].tokens, tail) == tail.size();
    };
    HOLDS(own == no_node || (tree[own].parent == table.parent && starts_with_tail(own)),
          "the tail's node is another's");
    HOLDS(own == no_node || table.is_tail_shared || tree[own].tokens.size() == tail.size(),
          "the tail's node claims more than was committed");
    HOLDS(own != no_node || !tree.is_alive(table.cover) || starts_with_tail(table.cover.index),
          "the tail's cover has other tokens");
}

void KvCacheManager::Books::check_accounts(std::size_t group) const {
    std::int64_t charged = 0;
    for (const auto &[id, sequence] : sequences_) charged += sequence.tables[group].num_charged;
    const bool keeps_accounts = !accounts_[group].holders.empty();
    if (charged != (keeps_accounts ? stores_[group].num_used() : 0) || !accounts_[group].open.empty()) {
        throw std::logic_error("cache books: blocks in use are not each on one account");
    }
}

#undef HOLDS

}  // namespace trtllm::executor
