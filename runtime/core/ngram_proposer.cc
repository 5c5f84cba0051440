// An index of n-grams for each sequence, extended as it grows: a look-up costs max_matching_ngram_size probes.
#include "ngram_proposer.h"

#include <algorithm>

namespace trtllm::executor {

namespace {

// The `size` tokens that end before `end`.
std::uint64_t hash_before(std::span<const TokenId> tokens, std::size_t end, std::size_t size) {
    std::uint64_t hash = 0x9E3779B97F4A7C15ull * (size + 1);
    for (std::size_t place = end - size; place < end; ++place) {
        hash = (hash ^ static_cast<std::uint32_t>(tokens[place])) * 0xD6E8FEB86659FD93ull;
        hash ^= hash >> 32;
    }
    return hash;
}

bool same_tokens(std::span<const TokenId> tokens, std::size_t end, std::size_t other_end, std::size_t size) {
    return std::equal(tokens.begin() + static_cast<std::ptrdiff_t>(end - size),
                      tokens.begin() + static_cast<std::ptrdiff_t>(end),
                      tokens.begin() + static_cast<std::ptrdiff_t>(other_end - size));
}

// The tokens from `place` on; where they end, the guess goes on as it began, as text that repeats itself does.
std::vector<TokenId> following(std::span<const TokenId> tokens, std::size_t place, std::size_t count) {
    std::vector<TokenId> guess(count);
    for (std::size_t index = 0; index < count; ++index)
        guess[index] = place + index < tokens.size() ? tokens[place + index] : guess[place + index - tokens.size()];
    return guess;
}

}  // namespace

void NgramProposer::extend(Index &index, std::span<const TokenId> tokens) const {
    const auto most = static_cast<std::size_t>(config_.max_matching_ngram_size);
    for (std::size_t place = std::max<std::size_t>(index.num_indexed, 1); place < tokens.size(); ++place)
        for (std::size_t size = 1; size <= std::min(most, place); ++size)
            index.last[hash_before(tokens, place, size)] = place;
    index.num_indexed = tokens.size();
}

std::vector<std::vector<TokenId>> NgramProposer::propose(std::span<const Query> queries) {
    std::vector<std::vector<TokenId>> guesses(queries.size());
    for (std::size_t number = 0; number < queries.size(); ++number) {
        const auto &[sequence, tokens, max_drafts] = queries[number];
        Index &index = indices_[sequence];
        if (index.num_indexed > tokens.size()) index = {};
        extend(index, tokens);
        const auto most = std::min<std::size_t>(static_cast<std::size_t>(config_.max_matching_ngram_size), tokens.size());
        for (std::size_t size = most; size >= 1; --size) {
            const auto found = index.last.find(hash_before(tokens, tokens.size(), size));
            if (found == index.last.end() || !same_tokens(tokens, tokens.size(), found->second, size)) continue;
            guesses[number] = following(tokens, found->second, static_cast<std::size_t>(std::max(max_drafts, 0)));
            break;
        }
    }
    return guesses;
}

}  // namespace trtllm::executor
