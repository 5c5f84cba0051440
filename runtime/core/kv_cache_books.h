// What is behind the cache manager's face: the stores of all groups, and the sequences that use them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "block_store.h"
#include "block_table.h"
#include "kv_cache_manager.h"
#include "kv_cache_match.h"
#include "kv_cache_sequence.h"

namespace trtllm::executor {

class KvCacheManager::Books {
public:
    Books(const CacheShape &shape, const KvCacheOptions &options);
    Books(const Books &) = delete;
    Books &operator=(const Books &) = delete;

    std::int32_t add(SequenceId id, std::span<const TokenId> tokens, const SequenceOptions &options);
    bool reserve(SequenceId id, std::int32_t num_tokens);
    void commit(SequenceId id, std::span<const TokenId> tokens);
    bool fork(SequenceId parent, SequenceId child, std::int32_t num_tokens);
    void truncate(SequenceId id, std::int32_t num_tokens);
    void remove(SequenceId id, bool keep);
    void clear();
    void set_now(std::int64_t now_ms) { journal.now_ms = std::max(journal.now_ms, now_ms); }

    const Sequence &sequence(SequenceId id) const;
    bool has(SequenceId id) const { return sequences_.count(id) > 0; }
    PrefixMatch match(std::span<const TokenId> tokens, const CacheKey &key, std::int32_t most_tokens) const;

    std::int32_t num_available() const;
    std::int32_t blocks_for(std::int32_t num_tokens, std::int32_t max_chunk) const;
    std::int32_t missing(SequenceId id, std::int32_t num_tokens) const;
    std::int32_t held(SequenceId id) const;
    KvCacheStats stats() const;
    void check() const;

    const CacheShape shape;
    const KvCacheOptions options;
    CacheJournal journal;

private:
    Sequence &find(SequenceId id);
    Sequence &open(SequenceId id, const SequenceOptions &options, std::int32_t prompt_length);
    TableEditor edit(Sequence &sequence, std::size_t group);
    std::int32_t missing(Sequence &sequence, std::size_t group, std::int32_t num_tokens) const;
    void give(Sequence &sequence, std::size_t group, const GroupMatch &match, std::int32_t num_tokens);
    void give_tail(Sequence &sequence, std::size_t group, const GroupMatch &match, std::int32_t num_tokens);
    void count_prompt(Sequence &sequence, std::size_t num_prompt_tokens);
    void settle_accounts();
    void check_sequence(const Sequence &sequence) const;
    void check_table(const Sequence &sequence, const BlockStore &store, const BlockTable &table) const;
    void check_path(const Sequence &sequence, const BlockStore &store, const BlockTable &table) const;
    void check_accounts(std::size_t group) const;
    std::int32_t num_spoken_for(std::size_t group) const;

    std::vector<BlockStore> stores_;
    std::vector<BlockAccounts> accounts_;  // by group
    std::size_t widest_ = 0;               // the group whose window reaches furthest: it needs most blocks
    std::unordered_map<SequenceId, Sequence> sequences_;
};

}  // namespace trtllm::executor
