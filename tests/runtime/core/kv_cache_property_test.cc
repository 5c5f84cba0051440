// Random lives of sequences over random caches: whatever happens, the books balance and every row that a sequence reads
// holds its own tokens.
#include <algorithm>

#include "kv_cache_model.h"

namespace {

using namespace model;
using testing::pick;
using testing::Random;

CacheShape random_shape(Random &random, bool is_linear) {
    CacheShape shape;
    shape.tokens_per_block = is_linear ? 64 : static_cast<std::int32_t>(pick(random, 1, 16));
    shape.num_blocks = static_cast<std::int32_t>(is_linear ? pick(random, 1, 6) : pick(random, 1, 40));
    shape.num_host_blocks = static_cast<std::int32_t>(pick(random, 0, 2) * pick(random, 0, 20));
    shape.groups.resize(static_cast<std::size_t>(pick(random, 1, 3)));
    for (CacheGroup &group : shape.groups) {
        group.window = static_cast<std::int32_t>(pick(random, 0, 1) * pick(random, 1, 40));
        group.bytes_per_token = 10;
    }
    return shape;
}

KvCacheOptions random_options(Random &random) {
    KvCacheOptions options;
    options.enable_block_reuse = pick(random, 0, 9) > 0;
    options.enable_partial_reuse = pick(random, 0, 4) > 0;
    options.copy_on_partial_reuse = pick(random, 0, 3) > 0;
    options.onboard_blocks = pick(random, 0, 3) > 0;
    options.offload_min_priority = static_cast<std::int32_t>(pick(random, 0, 1) * pick(random, 0, 60));
    options.min_partial_tokens = static_cast<std::int32_t>(pick(random, 1, 3));
    options.event_buffer_max_size = static_cast<std::size_t>(pick(random, 0, 1) * pick(random, 1, 50));
    return options;
}

class RandomLives {
public:
    explicit RandomLives(std::uint64_t seed)
        : random_(seed),
          is_linear_(pick(random_, 0, 3) == 0),
          vocabulary_(pick(random_, 1, 3)),
          world_(random_shape(random_, is_linear_), random_options(random_)) {}

    void live(int count) {
        for (int i = 0; i < count; ++i) {
            world_.now += pick(random_, 0, 3);
            act();
            if (pick(random_, 0, 3) == 0) {
                world_.check();
            } else {
                world_.cache.check();
            }
        }
        world_.check();
    }

    void end() {
        while (!world_.running.empty()) remove();
        world_.check();
        CHECK_EQ(world_.cache.num_available_blocks(), world_.cache.num_blocks());
        world_.cache.clear_reusable(world_.now);
        world_.check();
        CHECK_EQ(world_.cache.num_available_blocks(), world_.cache.num_blocks());
        CHECK_EQ(world_.cache.stats().used_num_blocks, 0);
        CHECK_EQ(world_.cache.stats().host_used_blocks, 0);
    }

private:
    std::vector<TokenId> tokens(std::int64_t count) {
        std::vector<TokenId> result;
        while (static_cast<std::int64_t>(result.size()) < count) {
            result.push_back(static_cast<TokenId>(pick(random_, 0, vocabulary_ - 1)));
        }
        return result;
    }

    std::int64_t most_tokens() const { return is_linear_ ? 64 : 60; }

    SequenceId some() {
        auto at = world_.running.begin();
        std::advance(at, pick(random_, 0, static_cast<std::int64_t>(world_.running.size()) - 1));
        return at->first;
    }

    // Like an earlier prompt for a while, then not.
    std::vector<TokenId> random_prompt() {
        std::vector<TokenId> prompt;
        if (!prompts_.empty() && pick(random_, 0, 3) > 0) {
            const std::int64_t last = static_cast<std::int64_t>(prompts_.size()) - 1;
            prompt = prompts_[static_cast<std::size_t>(pick(random_, 0, last))];
            prompt.resize(static_cast<std::size_t>(pick(random_, 0, static_cast<std::int64_t>(prompt.size()))));
        }
        const std::int64_t room = most_tokens() - static_cast<std::int64_t>(prompt.size());
        for (const TokenId token : tokens(pick(random_, 0, std::min<std::int64_t>(room, 30)))) prompt.push_back(token);
        if (prompt.empty()) prompt.push_back(0);
        prompts_.push_back(prompt);
        return prompt;
    }

    SequenceOptions random_sequence_options() {
        SequenceOptions options;
        options.key.adapter_id = static_cast<std::uint64_t>(pick(random_, 0, 5) / 5);
        if (pick(random_, 0, 7) == 0) options.max_reuse_tokens = static_cast<std::int32_t>(pick(random_, 0, 20));
        for (std::int64_t i = pick(random_, 0, 2); i > 0; --i) {
            TokenRangeRetention range;
            range.begin = static_cast<std::int32_t>(pick(random_, 0, 20));
            range.end = pick(random_, 0, 1) == 0 ? -1 : range.begin + static_cast<std::int32_t>(pick(random_, 1, 20));
            range.priority = static_cast<std::int32_t>(pick(random_, 0, 100));
            if (pick(random_, 0, 1) == 0) range.duration_ms = pick(random_, 0, 20);
            options.retention.ranges.push_back(range);
        }
        options.retention.decode_priority = static_cast<std::int32_t>(pick(random_, 0, 100));
        return options;
    }

    void act() {
        const std::int64_t kind = pick(random_, 0, 99);
        if (world_.running.empty() || (kind < 15 && world_.running.size() < 8)) return add();
        if (kind < 75) return step();
        if (kind < 82) return fork();
        if (kind < 90) return truncate();
        if (kind < 99) return remove();
        if (pick(random_, 0, 3) == 0) world_.cache.clear_reusable(world_.now);
    }

    void add() {
        const std::vector<TokenId> prompt = random_prompt();
        const SequenceId id = next_++;
        world_.add(id, prompt, random_sequence_options());
        std::vector<TokenId> &left = pending_[id];
        left.assign(prompt.begin() + world_.cache.num_committed(id), prompt.end());
    }

    void step() {
        const SequenceId id = some();
        std::vector<TokenId> &left = pending_[id];
        const std::int64_t room = most_tokens() - world_.cache.num_committed(id);
        if (room <= 0) return;
        if (left.empty()) left = tokens(pick(random_, 1, 3));
        const std::int64_t count =
            pick(random_, 1, std::min<std::int64_t>(room, static_cast<std::int64_t>(left.size())));
        const std::int32_t wanted = world_.cache.num_committed(id) + static_cast<std::int32_t>(count);
        const bool fits = world_.cache.missing_blocks(id, wanted) <= world_.cache.num_available_blocks();
        const bool is_done = world_.step(id, std::span(left).first(static_cast<std::size_t>(count)));
        if (fits) CHECK(is_done);
        if (is_done) left.erase(left.begin(), left.begin() + count);
    }

    void fork() {
        const SequenceId parent = some(), child = next_;
        const std::int64_t num_tokens = pick(random_, 0, world_.cache.num_committed(parent));
        if (!world_.fork(parent, child, static_cast<std::int32_t>(num_tokens))) return;
        ++next_;
        pending_[child] = {};
    }

    void truncate() {
        const SequenceId id = some();
        const std::int32_t committed = world_.cache.num_committed(id);
        const std::int32_t wanted = static_cast<std::int32_t>(pick(random_, std::max(0, committed - 20), committed));
        try {
            world_.truncate(id, wanted);
        } catch (const std::logic_error &) {  // a window has let go of what would be needed
            const auto &groups = world_.cache.shape().groups;
            CHECK(std::any_of(groups.begin(), groups.end(), [](const CacheGroup &group) { return group.window > 0; }));
            return;
        }
        pending_[id].clear();
    }

    void remove() {
        const SequenceId id = some();
        world_.remove(id, pick(random_, 0, 4) > 0);
        pending_.erase(id);
    }

    Random random_;
    bool is_linear_;
    std::int64_t vocabulary_;
    World world_;
    SequenceId next_ = 1;
    std::map<SequenceId, std::vector<TokenId>> pending_;
    std::vector<std::vector<TokenId>> prompts_;
};

TEST_CASE("every row that a sequence reads holds its own tokens, whatever happened before") {
    for (int seed = 0; seed < testing::scaled(600); ++seed) {
        try {
            RandomLives lives(static_cast<std::uint64_t>(seed));
            lives.live(150);
            lives.end();
        } catch (const std::exception &error) {
            throw testing::Failure("seed " + std::to_string(seed) + ": " + error.what());
        }
    }
}

}  // namespace

int main(int count, char **arguments) { return testing::run(count, arguments); }
