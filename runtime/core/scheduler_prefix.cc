// Comparing a waiting request's tokens with those that are being computed.
#include "scheduler_prefix.h"

#include <algorithm>

namespace trtllm::executor {
namespace {

std::int32_t common_length(std::span<const TokenId> left, std::span<const TokenId> right) {
    const auto end = std::mismatch(left.begin(), left.end(), right.begin(), right.end()).first;
    return static_cast<std::int32_t>(end - left.begin());
}

// Tokens of `waiting` that it could reuse once `computing` has computed them.
std::int32_t shareable_length(const KvCacheManager &cache, const ScheduledRequest &waiting,
                              const ScheduledSequence &computing) {
    const std::vector<TokenId> &tokens = waiting.sequences.front().tokens;
    std::int32_t length = common_length(tokens, computing.tokens);
    length = std::min({length, static_cast<std::int32_t>(tokens.size()) - 1, waiting.cache.max_reuse_tokens});
    const bool copies_parts = cache.options().enable_partial_reuse && cache.options().copy_on_partial_reuse;
    const std::int32_t tokens_per_block = cache.shape().tokens_per_block;
    return copies_parts ? length : length / tokens_per_block * tokens_per_block;
}

}  // namespace

bool is_prefix_under_way(const RequestBooks &books, const ScheduledRequest &waiting, std::int32_t num_reusable) {
    const std::int32_t worth_it = num_reusable + books.config().chunk_unit;
    for (const ScheduledRequest *request : books.active()) {
        if (!(request->cache.key == waiting.cache.key)) continue;
        for (const ScheduledSequence &sequence : request->sequences) {
            if (!sequence.is_catching_up() || sequence.size() < worth_it) continue;
            const std::int32_t shareable = shareable_length(books.cache(), waiting, sequence);
            if (shareable >= worth_it && sequence.num_computed < shareable) return true;
        }
    }
    return false;
}

}  // namespace trtllm::executor
