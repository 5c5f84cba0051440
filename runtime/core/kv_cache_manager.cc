// The cache manager's face: it notes the time and passes on.
#include "kv_cache_manager.h"

#include <limits>
#include <utility>

#include "kv_cache_books.h"

namespace trtllm::executor {

KvCacheManager::KvCacheManager(const CacheShape &shape, const KvCacheOptions &options)
    : books_(std::make_unique<Books>(shape, options)) {}

KvCacheManager::~KvCacheManager() = default;

std::int32_t KvCacheManager::add_sequence(SequenceId id, std::span<const TokenId> tokens,
                                          const SequenceOptions &options, std::int64_t now_ms) {
    books_->set_now(now_ms);
    return books_->add(id, tokens, options);
}

std::int32_t KvCacheManager::count_reusable_tokens(std::span<const TokenId> tokens, const CacheKey &key) const {
    return books_->match(tokens, key, std::numeric_limits<std::int32_t>::max()).num_tokens;
}

bool KvCacheManager::reserve(SequenceId id, std::int32_t num_tokens, std::int64_t now_ms) {
    books_->set_now(now_ms);
    return books_->reserve(id, num_tokens);
}

void KvCacheManager::commit(SequenceId id, std::span<const TokenId> tokens, std::int64_t now_ms) {
    books_->set_now(now_ms);
    books_->commit(id, tokens);
}

bool KvCacheManager::fork(SequenceId parent, SequenceId child, std::int32_t num_tokens, std::int64_t now_ms) {
    books_->set_now(now_ms);
    return books_->fork(parent, child, num_tokens);
}

void KvCacheManager::truncate(SequenceId id, std::int32_t num_tokens) { books_->truncate(id, num_tokens); }

void KvCacheManager::remove_sequence(SequenceId id, std::int64_t now_ms, bool keep) {
    books_->set_now(now_ms);
    books_->remove(id, keep);
}

bool KvCacheManager::has_sequence(SequenceId id) const { return books_->has(id); }

std::int32_t KvCacheManager::num_committed(SequenceId id) const { return books_->sequence(id).num_committed(); }

std::span<const BlockId> KvCacheManager::block_table(SequenceId id, std::int32_t group) const {
    return books_->sequence(id).tables.at(static_cast<std::size_t>(group)).blocks;
}

SequenceCacheStats KvCacheManager::sequence_stats(SequenceId id) const { return books_->sequence(id).stats; }

std::int32_t KvCacheManager::num_available_blocks() const { return books_->num_available(); }

std::int32_t KvCacheManager::num_blocks() const { return books_->shape.num_blocks; }

std::int32_t KvCacheManager::blocks_for(std::int32_t num_tokens, std::int32_t max_chunk) const {
    return books_->blocks_for(num_tokens, max_chunk);
}

std::int32_t KvCacheManager::missing_blocks(SequenceId id, std::int32_t num_tokens) const {
    return books_->missing(id, num_tokens);
}

std::int32_t KvCacheManager::held_blocks(SequenceId id) const { return books_->held(id); }

const CacheShape &KvCacheManager::shape() const { return books_->shape; }

const KvCacheOptions &KvCacheManager::options() const { return books_->options; }

std::vector<BlockCopy> KvCacheManager::take_copies() { return std::exchange(books_->journal.copies, {}); }

std::vector<KvCacheEvent> KvCacheManager::take_events() { return books_->journal.events.take(); }

KvCacheStats KvCacheManager::stats() const { return books_->stats(); }

void KvCacheManager::clear_reusable(std::int64_t now_ms) {
    books_->set_now(now_ms);
    books_->clear();
}

void KvCacheManager::check() const { books_->check(); }

}  // namespace trtllm::executor
