// What happens to one sequence's blocks in one group: they are filled, shared, released and given back.
//
// The tail is the block that holds the last committed token when that block is not full. It has a node of its own that
// grows with it, unless another node already begins with the same tokens (its cover). A block that becomes full and
// equals one in the tree is exchanged for that one at once, so that every sequence uses all blocks of its path.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block_store.h"
#include "kv_cache_sequence.h"

namespace trtllm::executor {

// A shared block whose account was closed by a sequence that no longer uses it.
struct OpenAccount {
    std::int32_t group = 0;
    std::int32_t position = 0;
    BlockId block = no_block;
};

// On whose account each block of a group is. Without a group that sees all tokens, shared blocks may part again when
// windows slide, so the promise of blocks to sequences counts each block once.
struct BlockAccounts {
    std::vector<const BlockTable *> holders;  // by block
    std::vector<OpenAccount> open;            // to be put on another user's account
};

// A view for the time of one call: changes the table, the store and the accounts together.
class TableEditor {
public:
    TableEditor(BlockStore &store, BlockAccounts &accounts, Sequence &sequence, const KvCacheOptions &options)
        : store_(store),
          accounts_(accounts),
          sequence_(sequence),
          table_(sequence.tables[static_cast<std::size_t>(store.group())]),
          options_(options) {}

    // Blocks that reserve(num_tokens) would take.
    std::int32_t missing(std::int32_t num_tokens) const;
    // There must be that many.
    void reserve(std::int32_t num_tokens);

    // The sequence's tokens from `begin` on are new.
    void commit(std::int32_t begin);
    // Lets go of blocks that no later token needs.
    void slide();
    bool holds_window_of(std::int32_t num_tokens) const { return store_.first_needed(num_tokens) >= table_.first_held; }
    // Whether truncate(num_tokens) has all blocks that the next token needs, or finds them in the tree.
    bool can_truncate(std::int32_t num_tokens) const;
    // The first block behind `num_tokens` tokens that others use too or that slid out, or the end of the table.
    std::int32_t first_shared(std::int32_t num_tokens) const;
    // Keeps no more than `most_blocks` blocks, none of them shared but full ones (and the tail until reserve()). The
    // sequence's tokens are still the old ones.
    void truncate(std::int32_t num_tokens, std::int32_t most_blocks);
    void release(bool keep);

    // Gives a new table what the first `num_tokens` tokens of another need. One block is free if the last is not full.
    void fork_from(const BlockTable &parent, std::int32_t parent_committed, std::int32_t num_tokens);

    // For building a table from the tree.
    void start(NodeIndex parent);
    void skip_position();  // slid out before it began
    void share(BlockId block);
    void claim(NodeIndex node);  // the sequence's retention applies to a node that it uses
    void add_private(BlockId block, NodeHandle cover);
    // The last block, whose node is unused but for this sequence, is its own from now on, with `num_tokens` tokens.
    void own_tail(std::int32_t num_tokens);

private:
    std::int32_t block_size() const { return store_.tokens_per_block(); }
    BlockId &block_at(std::int32_t position) { return table_.blocks[static_cast<std::size_t>(position)]; }
    std::int32_t num_blocks() const { return static_cast<std::int32_t>(table_.blocks.size()); }
    std::span<const TokenId> tokens_of_block(std::int32_t position, std::int32_t length) const;
    BlockId allocate_fresh();
    void charge(BlockId block);
    void let_go(std::int32_t position);
    void fill(std::int32_t position, std::int32_t old_length, std::int32_t new_length);
    bool is_still_covered(std::int32_t position, std::int32_t old_length, std::int32_t new_length) const;
    void place(std::int32_t position, std::int32_t length);
    void take_node(NodeIndex node, std::int32_t position);
    void exchange(std::int32_t position, NodeIndex node);
    void seal(std::int32_t position);
    void move_parent(NodeIndex parent);
    NodeIndex path_node(std::int32_t position) const;
    void regain_window(std::int32_t num_tokens);
    void unshare_tail();
    void empty_blocks(std::int32_t first, std::int32_t end);

    BlockStore &store_;
    BlockAccounts &accounts_;
    Sequence &sequence_;
    BlockTable &table_;
    const KvCacheOptions &options_;
};

}  // namespace trtllm::executor
