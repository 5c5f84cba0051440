// Books of the key-value cache: which block holds what, who uses it, what can be shared and what goes first.
//
// It moves no data: copies between blocks are handed to the session with the next step. A linear cache is the case in
// which a block is a whole slot. Pure bookkeeping: no clock (time is a parameter), no threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "trtllm/kv_cache.h"
#include "trtllm/session.h"
#include "trtllm/types.h"

namespace trtllm::executor {

class KvCacheManager {
public:
    KvCacheManager(const CacheShape &shape, const KvCacheOptions &options);
    ~KvCacheManager();
    KvCacheManager(const KvCacheManager &) = delete;
    KvCacheManager &operator=(const KvCacheManager &) = delete;

    // Opens the books of a sequence and gives it what the cache holds of `tokens`, at most tokens.size() - 1 tokens,
    // so that at least one is left to compute. Returns how many tokens are in its cache now. Allocates no more than the
    // one block that a partial match is copied into (per group), and one for each block that comes back from the host;
    // without free blocks it takes fewer. An unused block that matches to its end, or that would have to make room for
    // its own copy, is taken over instead of copied.
    std::int32_t add_sequence(SequenceId id, std::span<const TokenId> tokens, const SequenceOptions &options,
                              std::int64_t now_ms);

    // How many tokens add_sequence would find. Changes nothing.
    std::int32_t count_reusable_tokens(std::span<const TokenId> tokens, const CacheKey &key) const;

    // Makes room for the sequence's first `num_tokens` tokens. False, and nothing changes, without enough free blocks.
    bool reserve(SequenceId id, std::int32_t num_tokens, std::int64_t now_ms);

    // The sequence's tokens 0 .. num_committed + tokens.size() - 1 are in the cache from now on: `tokens` follow those
    // that were committed before. They become available to others (block by block, or the part of a block with partial
    // reuse), and blocks that slid out of a window are let go.
    void commit(SequenceId id, std::span<const TokenId> tokens, std::int64_t now_ms);

    // Opens `child` with the parent's first `num_tokens` committed tokens: full blocks shared, the last one copied.
    // False, and nothing changes, without a free block, or when a window has let go of blocks that are needed.
    bool fork(SequenceId parent, SequenceId child, std::int32_t num_tokens, std::int64_t now_ms);

    // Forgets committed tokens from `num_tokens` on. Blocks stay reserved, except those behind `num_tokens` that others
    // use too and what follows them. What others share is never rewritten: when the new last block is shared, the next
    // reserve(), which must come before the next commit(), makes a copy (missing_blocks() counts it). Throws
    // std::logic_error, and nothing changes, when a window has let go of blocks that are needed and no longer kept.
    void truncate(SequenceId id, std::int32_t num_tokens);

    // Closes the books. What it committed stays for reuse until the blocks are needed; with `keep` false nothing does
    // that this sequence put in, or had brought back from the host, and that no other sequence uses.
    void remove_sequence(SequenceId id, std::int64_t now_ms, bool keep = true);

    bool has_sequence(SequenceId id) const;
    std::int32_t num_committed(SequenceId id) const;
    // Blocks of a group in order of position; -1 where a window has let the block go.
    std::span<const BlockId> block_table(SequenceId id, std::int32_t group = 0) const;
    SequenceCacheStats sequence_stats(SequenceId id) const;

    // Blocks, in the scarcest group, that reserve() could take now: unused ones and those kept only for reuse.
    std::int32_t num_available_blocks() const;
    std::int32_t num_blocks() const;
    // Most blocks, of the group that needs most, that a sequence of `num_tokens` tokens holds at once. `max_chunk` is
    // the most tokens that one step adds (a window keeps blocks until the step after).
    std::int32_t blocks_for(std::int32_t num_tokens, std::int32_t max_chunk) const;
    // Blocks, of the group that needs most, that reserve(id, num_tokens) would have to take.
    std::int32_t missing_blocks(SequenceId id, std::int32_t num_tokens) const;
    // Blocks that the sequence holds, of the group that holds most, counting shared ones; when every group has a
    // window, a shared block counts for one of its sequences. So blocks_for(end) - held_blocks() is the most it will
    // still take. A tail that truncate() left shared is not counted: reserve() will take a block for its copy.
    std::int32_t held_blocks(SequenceId id) const;

    const CacheShape &shape() const;
    const KvCacheOptions &options() const;

    // Copies that were promised since the last call, to be done in this order before the next step.
    std::vector<BlockCopy> take_copies();
    std::vector<KvCacheEvent> take_events();
    KvCacheStats stats() const;

    // Forgets everything that is kept for reuse. What running sequences have is not shared any further either.
    void clear_reusable(std::int64_t now_ms);

    // Proves that the books balance: every block is free, used or kept exactly once, reference counts equal the tables
    // that name it, the tree's nodes and blocks agree, evictable blocks are leaves. Throws std::logic_error that says
    // what does not.
    void check() const;

private:
    class Books;
    std::unique_ptr<Books> books_;
};

}  // namespace trtllm::executor
