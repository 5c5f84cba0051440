// The life of a table, in the order in which it happens: reserve, commit, slide, truncate, release.
#include "block_table.h"

#include <algorithm>
#include <stdexcept>

namespace trtllm::executor {
namespace {

std::int32_t divide_up(std::int32_t value, std::int32_t by) { return (value + by - 1) / by; }

}  // namespace

std::span<const TokenId> TableEditor::tokens_of_block(std::int32_t position, std::int32_t length) const {
    return sequence_.range(position * block_size(), position * block_size() + length);
}

// Accounts: a block in use is on the account of one of its users.

void TableEditor::charge(BlockId block) {
    if (accounts_.holders.empty() || accounts_.holders[static_cast<std::size_t>(block)] != nullptr) return;
    accounts_.holders[static_cast<std::size_t>(block)] = &table_;
    ++table_.num_charged;
}

BlockId TableEditor::allocate_fresh() {
    const BlockId block = store_.allocate();
    charge(block);
    ++sequence_.stats.alloc_total_blocks;
    return block;
}

void TableEditor::let_go(std::int32_t position) {
    const BlockId block = block_at(position);
    block_at(position) = no_block;
    store_.drop_reference(block);
    if (accounts_.holders.empty() || accounts_.holders[static_cast<std::size_t>(block)] != &table_) return;
    accounts_.holders[static_cast<std::size_t>(block)] = nullptr;
    --table_.num_charged;
    if (store_.references(block) > 0) accounts_.open.push_back({store_.group(), position, block});
}

// Building.

void TableEditor::start(NodeIndex parent) {
    table_.parent = parent;
    if (parent != no_node) store_.pin(parent);
}

void TableEditor::skip_position() {
    table_.blocks.push_back(no_block);
    ++table_.first_held;
}

void TableEditor::share(BlockId block) {
    table_.blocks.push_back(block);
    store_.add_reference(block);
    charge(block);
}

void TableEditor::claim(NodeIndex node) {
    const std::int32_t position = num_blocks() - 1;
    const BlockRetention retention =
        retention_at(sequence_.options.retention, position * block_size(), sequence_.prompt_length);
    if (retention.is_explicit) store_.set_retention(node, retention.priority, retention.duration_ms);
}

void TableEditor::add_private(BlockId block, NodeHandle cover) {
    table_.blocks.push_back(block);
    table_.cover = cover;
    charge(block);
}

void TableEditor::own_tail(std::int32_t num_tokens) {
    const std::int32_t position = num_blocks() - 1;
    const BlockId block = block_at(position);
    const NodeIndex node = store_.node_of(block);
    if (static_cast<std::int32_t>(store_.tree()[node].tokens.size()) == num_tokens) {
        store_.retract(node);
        store_.tree()[node].contributor = sequence_.id;
        return;
    }
    store_.detach(block);
    place(position, num_tokens);
}

void TableEditor::fork_from(const BlockTable &parent, std::int32_t parent_committed, std::int32_t num_tokens) {
    const std::int32_t num_full = num_tokens / block_size(), rest = num_tokens % block_size();
    if (parent.parent != no_node) {
        start(store_.tree().ancestor(parent.parent, parent_committed / block_size() - num_full));
    }
    for (std::int32_t position = 0; position < num_full; ++position) {
        if (position < store_.first_needed(num_tokens)) {
            skip_position();
        } else {
            share(parent.blocks[static_cast<std::size_t>(position)]);
        }
    }
    if (rest == 0) return;
    const BlockId block = allocate_fresh();
    store_.copy(parent.blocks[static_cast<std::size_t>(num_full)], block, rest);
    add_private(block, {});
}

// Reserving.

std::int32_t TableEditor::missing(std::int32_t num_tokens) const {
    const std::int32_t new_blocks = std::max(0, divide_up(num_tokens, block_size()) - num_blocks());
    if (!table_.is_tail_shared) return new_blocks;
    const BlockId tail = table_.blocks[static_cast<std::size_t>(sequence_.num_committed() / block_size())];
    return new_blocks + (store_.references(tail) > 1 ? 1 : 0);
}

void TableEditor::reserve(std::int32_t num_tokens) {
    if (table_.is_tail_shared) unshare_tail();
    while (num_blocks() < divide_up(num_tokens, block_size())) {
        table_.blocks.push_back(allocate_fresh());
        ++sequence_.stats.alloc_new_blocks;
    }
}

void TableEditor::unshare_tail() {
    const std::int32_t position = sequence_.num_committed() / block_size();
    const std::int32_t length = sequence_.num_committed() % block_size();
    const BlockId shared = block_at(position);
    table_.is_tail_shared = false;
    if (store_.references(shared) == 1) {  // the others have gone
        if (store_.node_of(shared) == no_node) return;
        store_.detach(shared);
        if (sequence_.shares) place(position, length);
        return;
    }
    const BlockId own = allocate_fresh();
    store_.copy(shared, own, length);
    let_go(position);
    block_at(position) = own;
}

// Committing.

void TableEditor::commit(std::int32_t begin) {
    const std::int32_t end = sequence_.num_committed();
    if (divide_up(end, block_size()) > num_blocks()) throw std::logic_error("tokens were committed without a block");
    if (table_.is_tail_shared && end > begin) throw std::logic_error("tokens were committed to a shared block");
    if (!sequence_.shares) return;
    while (begin < end) {
        const std::int32_t position = begin / block_size(), start = position * block_size();
        const std::int32_t stop = std::min(end, start + block_size());
        fill(position, begin - start, stop - start);
        begin = stop;
    }
}

void TableEditor::fill(std::int32_t position, std::int32_t old_length, std::int32_t new_length) {
    const NodeIndex own = store_.node_of(block_at(position));
    if (own != no_node) {
        store_.tree().append(own, tokens_of_block(position, new_length).subspan(static_cast<std::size_t>(old_length)));
    } else if (new_length == block_size() || !is_still_covered(position, old_length, new_length)) {
        place(position, new_length);
    }
    if (new_length == block_size()) seal(position);
}

// Whether the cover goes on as the tail does; looks at the new tokens only.
bool TableEditor::is_still_covered(std::int32_t position, std::int32_t old_length, std::int32_t new_length) const {
    if (old_length == 0 || !store_.tree().is_alive(table_.cover)) return false;
    const std::vector<TokenId> &others = store_.tree()[table_.cover.index].tokens;
    const std::span<const TokenId> own = tokens_of_block(position, new_length);
    return static_cast<std::int32_t>(others.size()) >= new_length &&
           std::equal(own.begin() + old_length, own.end(), others.begin() + old_length);
}

// Finds the place of a block without a node among the nodes below `parent`: it stays covered by one that begins with
// its tokens, stands in for one that is shorter, or gets a node of its own.
void TableEditor::place(std::int32_t position, std::int32_t length) {
    if (length < block_size() && !options_.enable_partial_reuse) return;
    RadixTree &tree = store_.tree();
    const std::span<const TokenId> tokens = tokens_of_block(position, length);
    const ChildPlace found = tree.place(table_.parent, tokens);
    if (found.after_shared == tokens.size()) {
        const RadixNode &node = tree[found.after];
        if (node.tokens.size() > tokens.size() || (length < block_size() && store_.is_primary(node.block))) {
            table_.cover = tree.handle(found.after);
        } else if (store_.is_primary(node.block)) {
            exchange(position, found.after);
        } else {
            take_node(found.after, position);
        }
    } else if (found.before != no_node && found.before_shared == tree[found.before].tokens.size()) {
        store_.retract(found.before);
        tree.append(found.before, tokens.subspan(found.before_shared));
        take_node(found.before, position);
    } else {
        take_node(store_.insert(table_.parent, found.position, tokens), position);
    }
}

void TableEditor::take_node(NodeIndex node, std::int32_t position) {
    store_.bind(node, block_at(position));
    const BlockRetention retention =
        retention_at(sequence_.options.retention, position * block_size(), sequence_.prompt_length);
    store_.set_retention(node, retention.priority, retention.duration_ms);
    store_.tree()[node].contributor = sequence_.id;
    table_.cover = {};
}

// The same tokens are in the tree already: that block serves both, and this one is free again.
void TableEditor::exchange(std::int32_t position, NodeIndex node) {
    const BlockId shared = store_.tree()[node].block;
    store_.add_reference(shared);
    let_go(position);
    block_at(position) = shared;
    charge(shared);
}

void TableEditor::seal(std::int32_t position) {
    const NodeIndex node = store_.node_of(block_at(position));
    move_parent(node);
    table_.cover = {};
    store_.announce(node);
}

void TableEditor::move_parent(NodeIndex parent) {
    if (parent == table_.parent) return;
    store_.pin(parent);
    store_.unpin(table_.parent);
    table_.parent = parent;
}

void TableEditor::slide() {
    const std::int32_t first = store_.first_needed(sequence_.num_committed());
    for (; table_.first_held < first; ++table_.first_held) let_go(table_.first_held);
}

// Truncating.

// The tree's node of a full committed block.
NodeIndex TableEditor::path_node(std::int32_t position) const {
    return store_.tree().ancestor(table_.parent, sequence_.num_committed() / block_size() - 1 - position);
}

bool TableEditor::can_truncate(std::int32_t num_tokens) const {
    for (std::int32_t position = store_.first_needed(num_tokens); position < table_.first_held; ++position) {
        if (!sequence_.shares || !store_.is_primary(store_.tree()[path_node(position)].block)) return false;
    }
    return true;
}

// Takes blocks back that slid out of the window and are still kept.
void TableEditor::regain_window(std::int32_t num_tokens) {
    while (table_.first_held > store_.first_needed(num_tokens)) {
        const BlockId block = store_.tree()[path_node(--table_.first_held)].block;
        store_.add_reference(block);
        block_at(table_.first_held) = block;
        charge(block);
    }
}

std::int32_t TableEditor::first_shared(std::int32_t num_tokens) const {
    for (std::int32_t i = divide_up(num_tokens, block_size()); i < num_blocks(); ++i) {
        const BlockId block = table_.blocks[static_cast<std::size_t>(i)];
        if (block == no_block || store_.references(block) > 1) return i;
    }
    return num_blocks();
}

void TableEditor::truncate(std::int32_t num_tokens, std::int32_t most_blocks) {
    regain_window(num_tokens);
    const std::int32_t committed = sequence_.num_committed();
    const std::int32_t position = num_tokens / block_size(), rest = num_tokens % block_size();
    const bool is_other_block = position != committed / block_size();
    if (is_other_block || rest == 0) table_.is_tail_shared = false;
    if (is_other_block) {
        table_.cover = {};
        if (sequence_.shares) {
            move_parent(store_.tree().ancestor(table_.parent, committed / block_size() - position));
        }
    }
    empty_blocks(divide_up(num_tokens, block_size()), most_blocks);
    if (rest == 0 || table_.is_tail_shared) return;
    const BlockId tail = block_at(position);
    if (store_.references(tail) > 1) {
        table_.is_tail_shared = true;
    } else if (store_.node_of(tail) != no_node) {
        store_.detach(tail);
        place(position, rest);
    }
}

// Makes blocks first .. end - 1 private ones without content, and gives up what follows.
void TableEditor::empty_blocks(std::int32_t first, std::int32_t end) {
    for (std::int32_t position = num_blocks(); position-- > first;) {
        if (position >= end) {
            let_go(position);
        } else if (store_.node_of(block_at(position)) != no_node) {
            store_.detach(block_at(position));
        }
    }
    table_.blocks.resize(static_cast<std::size_t>(std::min(end, num_blocks())));
}

// Ending.

void TableEditor::release(bool keep) {
    const std::int32_t tail = sequence_.num_committed() / block_size();
    const std::int32_t rest = sequence_.num_committed() % block_size();
    std::vector<NodeHandle> dropped;
    if (sequence_.shares && keep && rest > 0 && !table_.is_tail_shared) {
        const bool is_private = store_.node_of(block_at(tail)) == no_node;
        if (is_private && !store_.tree().is_alive(table_.cover)) place(tail, rest);
        if (store_.node_of(block_at(tail)) != no_node) store_.announce(store_.node_of(block_at(tail)));
    }
    if (sequence_.shares && !keep) {
        const auto add = [&](NodeIndex node) {
            if (store_.tree()[node].contributor == sequence_.id) dropped.push_back(store_.tree().handle(node));
        };
        if (rest > 0 && store_.node_of(block_at(tail)) != no_node) add(store_.node_of(block_at(tail)));
        for (NodeIndex node = table_.parent; node != no_node; node = store_.tree()[node].parent) add(node);
    }
    for (std::int32_t position = num_blocks(); position-- > table_.first_held;) let_go(position);
    if (table_.parent != no_node) store_.unpin(table_.parent);
    for (const NodeHandle &node : dropped) {
        if (store_.tree().is_alive(node)) store_.forget(node.index);
    }
}

}  // namespace trtllm::executor
