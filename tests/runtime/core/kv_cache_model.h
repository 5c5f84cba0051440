// A memory that only remembers what would lie in it: copies and steps are replayed on names of rows, so that a test can
// tell for each row a sequence reads whether it holds exactly that sequence's tokens.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_cache_manager.h"
#include "testing.h"

namespace model {

using namespace trtllm::executor;

// What a row holds: keys and values of a token depend on the key and on all tokens up to it.
inline std::uint64_t row_name(std::uint64_t before, TokenId token) {
    std::uint64_t name = (before ^ static_cast<std::uint64_t>(token + 1)) * 0x9E3779B97F4A7C15ull;
    return name ^ (name >> 29);
}

inline std::uint64_t first_name(const CacheKey &key) { return 0x1234567 + key.adapter_id * 1000003 + key.salt * 7919; }

// Name of the last of these tokens' rows.
inline std::uint64_t prefix_name(const CacheKey &key, std::span<const TokenId> tokens) {
    std::uint64_t name = first_name(key);
    for (const TokenId token : tokens) name = row_name(name, token);
    return name;
}

class FakeMemory {
public:
    explicit FakeMemory(const CacheShape &shape) : shape_(shape) {
        rows_.resize(shape.groups.size());
        const std::int64_t blocks = shape.num_blocks + shape.num_host_blocks;
        for (auto &group : rows_) group.resize(static_cast<std::size_t>(blocks * shape.tokens_per_block), 0);
    }

    std::uint64_t &row(std::int32_t group, BlockId block, std::int32_t index) {
        return rows_.at(static_cast<std::size_t>(group))
            .at(static_cast<std::size_t>(block) * static_cast<std::size_t>(shape_.tokens_per_block) +
                static_cast<std::size_t>(index));
    }

    void replay(const std::vector<BlockCopy> &copies) {
        for (const BlockCopy &copy : copies) {
            CHECK(copy.num_tokens > 0 && copy.num_tokens <= shape_.tokens_per_block);
            CHECK(copy.source != copy.destination);
            for (std::int32_t i = 0; i < copy.num_tokens; ++i) {
                row(copy.group, copy.destination, i) = row(copy.group, copy.source, i);
            }
        }
    }

    // A step that computes tokens `begin` .. of a sequence that has room for them.
    void compute(const KvCacheManager &cache, SequenceId id, const CacheKey &key, std::span<const TokenId> tokens,
                 std::int32_t begin) {
        std::uint64_t name = prefix_name(key, tokens.first(static_cast<std::size_t>(begin)));
        for (std::int32_t at = begin; at < static_cast<std::int32_t>(tokens.size()); ++at) {
            name = row_name(name, tokens[static_cast<std::size_t>(at)]);
            for_each_group(cache, id, at, [&](std::uint64_t &row) { row = name; });
        }
    }

    // Every row that the token after `tokens` sees is of these tokens.
    void verify(const KvCacheManager &cache, SequenceId id, const CacheKey &key, std::span<const TokenId> tokens) {
        std::uint64_t name = first_name(key);
        const std::int32_t count = static_cast<std::int32_t>(tokens.size());
        for (std::int32_t at = 0; at < count; ++at) {
            name = row_name(name, tokens[static_cast<std::size_t>(at)]);
            for (std::size_t group = 0; group < shape_.groups.size(); ++group) {
                const std::int32_t window = shape_.groups[group].window;
                if (window > 0 && at < count - window + 1) continue;
                const auto table = cache.block_table(id, static_cast<std::int32_t>(group));
                const BlockId block = table[static_cast<std::size_t>(at / shape_.tokens_per_block)];
                CHECK(block >= 0 && block < shape_.num_blocks);
                CHECK_EQ(row(static_cast<std::int32_t>(group), block, at % shape_.tokens_per_block), name);
            }
        }
    }

private:
    template <typename Use>
    void for_each_group(const KvCacheManager &cache, SequenceId id, std::int32_t at, Use use) {
        for (std::int32_t group = 0; group < static_cast<std::int32_t>(shape_.groups.size()); ++group) {
            const BlockId block = cache.block_table(id, group)[static_cast<std::size_t>(at / shape_.tokens_per_block)];
            CHECK(block >= 0 && block < shape_.num_blocks);
            use(row(group, block, at % shape_.tokens_per_block));
        }
    }

    CacheShape shape_;
    std::vector<std::vector<std::uint64_t>> rows_;
};

// A cache with its memory, and the sequences as they ought to be. Everything is checked after each step.
class World {
public:
    struct Running {
        CacheKey key;
        std::vector<TokenId> tokens;  // committed
    };

    World(const CacheShape &shape, const KvCacheOptions &options) : cache(shape, options), memory(shape) {}

    std::int32_t add(SequenceId id, std::span<const TokenId> prompt, const SequenceOptions &options = {}) {
        const std::int32_t expected = cache.count_reusable_tokens(prompt, options.key);
        const std::int32_t reused = cache.add_sequence(id, prompt, options, now);
        CHECK(reused < static_cast<std::int32_t>(prompt.size()) || prompt.empty());
        if (options.max_reuse_tokens >= static_cast<std::int32_t>(prompt.size())) CHECK_EQ(reused, expected);
        CHECK(reused <= options.max_reuse_tokens);
        running[id] = {options.key, {prompt.begin(), prompt.begin() + reused}};
        return reused;
    }

    // Room, copies, computing, commit; false without room.
    bool step(SequenceId id, std::span<const TokenId> tokens) {
        Running &sequence = running.at(id);
        const std::int32_t begin = static_cast<std::int32_t>(sequence.tokens.size());
        if (!cache.reserve(id, begin + static_cast<std::int32_t>(tokens.size()), now)) return false;
        memory.replay(cache.take_copies());
        sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
        memory.compute(cache, id, sequence.key, sequence.tokens, begin);
        cache.commit(id, tokens, now);
        return true;
    }

    bool fork(SequenceId parent, SequenceId child, std::int32_t num_tokens) {
        if (!cache.fork(parent, child, num_tokens, now)) return false;
        const Running &from = running.at(parent);
        running[child] = {from.key, {from.tokens.begin(), from.tokens.begin() + num_tokens}};
        return true;
    }

    void truncate(SequenceId id, std::int32_t num_tokens) {
        cache.truncate(id, num_tokens);
        running.at(id).tokens.resize(static_cast<std::size_t>(num_tokens));
    }

    void remove(SequenceId id, bool keep = true) {
        cache.remove_sequence(id, now, keep);
        running.erase(id);
    }

    // Copies that nobody has asked for yet are done as an idle executor would do them.
    void check() {
        cache.check();
        memory.replay(cache.take_copies());
        for (const auto &[id, sequence] : running) {
            CHECK_EQ(cache.num_committed(id), static_cast<std::int32_t>(sequence.tokens.size()));
            memory.verify(cache, id, sequence.key, sequence.tokens);
        }
    }

    // A prompt's tokens one after the other, then the end of the sequence.
    std::int32_t run(SequenceId id, std::span<const TokenId> tokens, const SequenceOptions &options = {}) {
        const std::int32_t reused = add(id, tokens, options);
        CHECK(step(id, tokens.subspan(static_cast<std::size_t>(reused))));
        check();
        remove(id);
        check();
        return reused;
    }

    std::int64_t now = 0;
    KvCacheManager cache;
    FakeMemory memory;
    std::map<SequenceId, Running> running;
};

}  // namespace model
