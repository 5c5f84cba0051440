// What a sequence has said: its distinct tokens with counts, and which tokens followed which n-grams. Flat memory,
// since beam search copies it every step.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

// A set of numbered items found by hash: open addressing, at most half full.
class HashTable {
public:
    // The first item with this hash for which same(item) holds, or -1.
    template <typename Same>
    std::int32_t find(std::uint64_t hash, Same same) const {
        if (slots_.empty()) return -1;
        for (std::size_t slot = start(hash);; slot = (slot + 1) & (slots_.size() - 1)) {
            if (slots_[slot].item < 0) return -1;
            if (slots_[slot].hash == hash && same(slots_[slot].item)) return slots_[slot].item;
        }
    }
    void insert(std::uint64_t hash, std::int32_t item) {
        if (2 * ++count_ > slots_.size()) grow();
        place({hash, item});
    }
    // Makes the one item with this hash for which same(item) holds another one with that hash.
    template <typename Same>
    void replace(std::uint64_t hash, std::int32_t item, Same same) {
        for (std::size_t slot = start(hash); slots_[slot].item >= 0; slot = (slot + 1) & (slots_.size() - 1))
            if (slots_[slot].hash == hash && same(slots_[slot].item)) {
                slots_[slot].item = item;
                return;
            }
    }

private:
    struct Slot {
        std::uint64_t hash = 0;
        std::int32_t item = -1;
    };
    std::size_t start(std::uint64_t hash) const {
        return static_cast<std::size_t>((hash * 0x9E3779B97F4A7C15u) >> 32) & (slots_.size() - 1);
    }
    void place(Slot entry) {
        std::size_t slot = start(entry.hash);
        while (slots_[slot].item >= 0) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = entry;
    }
    void grow() {
        std::vector<Slot> old(slots_.empty() ? 16 : 2 * slots_.size());
        old.swap(slots_);
        for (const Slot &entry : old)
            if (entry.item >= 0) place(entry);
    }

    std::vector<Slot> slots_;
    std::size_t count_ = 0;
};

// Distinct tokens of a sequence, each with how often the output holds it.
class TokenCounts {
public:
    struct Entry {
        TokenId token;
        std::int32_t in_output;  // times
    };
    void add(TokenId token, bool is_output) {
        const auto hash = static_cast<std::uint64_t>(token);
        std::int32_t item = table_.find(hash, [](std::int32_t) { return true; });
        if (item < 0) {
            item = static_cast<std::int32_t>(entries_.size());
            entries_.push_back({token, 0});
            table_.insert(hash, item);
        }
        entries_[static_cast<std::size_t>(item)].in_output += is_output;
    }
    std::span<const Entry> entries() const { return entries_; }

private:
    std::vector<Entry> entries_;
    HashTable table_;
};

// For every run of `size - 1` tokens the distinct tokens that followed it. Adding a token costs the same however long
// the sequence is.
class NgramFollowers {
public:
    explicit NgramFollowers(std::int32_t size) : context_(static_cast<std::size_t>(size) - 1) {
        std::uint64_t square = kFactor;
        for (std::size_t bits = context_; bits != 0; bits >>= 1, square *= square)
            if (bits & 1) oldest_factor_ *= square;
    }

    // Takes note of the last of `tokens`; must be called for each token in turn.
    void add(std::span<const TokenId> tokens) {
        const std::size_t last = tokens.size() - 1;
        if (last >= context_ && !knows(tokens, last)) link(tokens, last);
        hash_ = hash_ * kFactor + coded(tokens[last]);
        if (tokens.size() > context_) hash_ -= oldest_factor_ * coded(tokens[last - context_]);
    }

    // Calls ban(token) for each token that would repeat an n-gram of `tokens` if it came next.
    template <typename Ban>
    void for_each(std::span<const TokenId> tokens, Ban ban) const {
        if (tokens.size() < context_) return;
        for (std::int32_t at = head(tokens, tokens.size()); at >= 0; at = earlier_[static_cast<std::size_t>(at)])
            ban(tokens[static_cast<std::size_t>(at)]);
    }

private:
    static constexpr std::uint64_t kFactor = 0xD1342543DE82EF95u;
    static std::uint64_t coded(TokenId token) { return (static_cast<std::uint64_t>(token) + 1) * 0xBF58476D1CE4E5B9u; }

    bool same_run(std::span<const TokenId> tokens, std::size_t a, std::size_t b, std::size_t length) const {
        for (std::size_t i = 1; i <= length; ++i)
            if (tokens[a - i] != tokens[b - i]) return false;
        return true;
    }
    // The newest place whose context is that of `end`, or -1.
    std::int32_t head(std::span<const TokenId> tokens, std::size_t end) const {
        return heads_.find(hash_, [&](std::int32_t at) {
            return same_run(tokens, static_cast<std::size_t>(at), end, context_);
        });
    }
    std::uint64_t ngram_hash(TokenId last) const { return std::rotl(hash_, 23) * kFactor + coded(last); }
    bool knows(std::span<const TokenId> tokens, std::size_t last) const {
        return ngrams_.find(ngram_hash(tokens[last]), [&](std::int32_t at) {
            return same_run(tokens, static_cast<std::size_t>(at) + 1, last + 1, context_ + 1);
        }) >= 0;
    }
    void link(std::span<const TokenId> tokens, std::size_t last) {
        const auto item = static_cast<std::int32_t>(last);
        earlier_.resize(last + 1, -1);
        const std::int32_t before = head(tokens, last);
        earlier_[last] = before;
        if (before < 0)
            heads_.insert(hash_, item);
        else
            heads_.replace(hash_, item, [before](std::int32_t at) { return at == before; });
        ngrams_.insert(ngram_hash(tokens[last]), item);
    }

    std::size_t context_;
    std::uint64_t hash_ = 0;           // of the last `context_` tokens
    std::uint64_t oldest_factor_ = 1;  // kFactor ** context_
    HashTable heads_, ngrams_;         // items are places of tokens
    std::vector<std::int32_t> earlier_;  // the place before, of the same context and another token
};

}  // namespace trtllm::executor
